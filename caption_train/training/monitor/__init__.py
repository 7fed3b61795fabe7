"""Watches a run: validation, previews, logs, trackers, the loss curve and the health of training."""
