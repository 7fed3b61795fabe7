"""The places that captions are written to: files beside the images, one file of all, drawings."""
