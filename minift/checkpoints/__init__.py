"""Files in and out: hub folders, PEFT adapters, bitsandbytes' four bits, and the checkpoints of a run."""
