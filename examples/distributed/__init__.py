"""Sharded models, a script each: `torchrun --nproc-per-node 2 -m examples.distributed.<name>`."""
