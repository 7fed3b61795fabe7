"""Reads datasets: finds images and captions, matches them, opens the images, splits the pairs."""
