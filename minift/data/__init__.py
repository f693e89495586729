"""From a user's files to batches: lines, examples, passages, tokens, and sequences laid end to end."""
