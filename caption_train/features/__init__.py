"""What a frozen vision tower makes of each image, kept on disk so that it is computed once."""
