"""Estimates what a run holds in memory, and does gradient checkpointing."""
