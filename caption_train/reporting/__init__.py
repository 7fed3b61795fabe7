"""Writes report.html: summary, curves and captions beside their images, in one file without a network."""
