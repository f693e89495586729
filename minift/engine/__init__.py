"""What a step runs on: optimizer, precision, processes, recorded graphs, memory."""
