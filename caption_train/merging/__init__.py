"""merge_captions.py: the captions of several independent jobs become one file. No torch."""
