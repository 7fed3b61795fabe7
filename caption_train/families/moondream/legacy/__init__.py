"""Reads and writes Moondream 2 in the layouts of the official code."""
