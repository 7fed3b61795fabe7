"""What a run knows of millions of images: kept on disk beyond what a small run needs. No torch."""
