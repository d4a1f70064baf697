"""Sharded models, one script each: `torchrun --nproc-per-node 2 -m examples.distributed.<name>`."""
