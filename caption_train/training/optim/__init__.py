"""Optimizers, the learning-rate schedule and Flora."""
