"""review_captions.py: a local page to go through a folder of images and captions."""
