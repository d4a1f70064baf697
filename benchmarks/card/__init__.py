"""`make gpu` and `make gpu-again`: everything to do on a GPU in one call. Standard library only."""
