"""Captions datasets in shards: a shard in, the same shard with captions out."""
