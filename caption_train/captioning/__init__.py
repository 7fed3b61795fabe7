"""The captioning command: finds images, generates captions and writes them."""
