"""`--cache_features` for image-text-to-text models."""
