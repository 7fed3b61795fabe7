"""Scores captions against references, and finds captions that are cut, empty or repetitive."""
