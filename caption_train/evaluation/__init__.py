"""Captions a dataset with a base and its adapters, scores both, and writes a report to look at."""
