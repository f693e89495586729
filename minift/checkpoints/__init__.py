"""Files in and out: hub folders, PEFT adapters, bitsandbytes' packed weights, and the checkpoints of a run."""
