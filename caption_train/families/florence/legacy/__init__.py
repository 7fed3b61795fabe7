"""Reads and writes Florence-2 in the layout of Microsoft's own code: config, weights, processor, adapters."""
