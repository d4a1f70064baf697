"""Weights of which every process holds a part: where the parts lie, and what all of them know."""
