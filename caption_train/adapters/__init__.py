"""Wraps a model with LoRA; saves and loads adapters, and what their folders say about themselves."""
