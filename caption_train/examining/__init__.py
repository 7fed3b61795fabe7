"""Looks at every image and caption of a dataset, for the page of compile_captions.py --report."""
