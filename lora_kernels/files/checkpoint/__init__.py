"""Rewrites checkpoints that are larger than memory, shard by shard and tensor by tensor."""
