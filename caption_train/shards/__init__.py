"""Datasets in shards: WebDataset tars and Parquet files, read and written one shard at a time."""
