"""Makes batches of images: how many at once, which together, opened and encoded in workers."""
