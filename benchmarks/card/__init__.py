"""One call on a machine with a GPU: `make gpu` and `make gpu-again`. Standard library only."""
