"""Pairs in columns: a dataset of a million images in some two hundred megabytes."""
