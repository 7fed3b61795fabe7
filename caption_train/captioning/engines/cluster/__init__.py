"""Captioning on a Ray cluster: `--engine ray`."""
