"""Trains with several processes: the accelerator, FSDP, DeepSpeed, and errors on all ranks."""
