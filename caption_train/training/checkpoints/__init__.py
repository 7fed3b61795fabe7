"""Writes, finds, checks and deletes checkpoints."""
