"""The devices of this machine. With a GPU, every operator's tests run on the GPU too."""

from __future__ import annotations

import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def rng_state(device: str) -> torch.Tensor:
    """The state of torch's global generator for `device`."""
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
