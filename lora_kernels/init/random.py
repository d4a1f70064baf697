"""LoRA's own start (Hu et al., arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Initializer, Start
from .registry import register_initializer


@dataclass(frozen=True)
class LoRA(Initializer):
    """A ~ U(±1/√m), B = 0: kaiming_uniform_(a=√5) on A, as in PEFT and the authors' code.

    The layer starts as its base, which is left alone. With `seed` the draw is that of a generator
    of its own; without, of torch's global one, as in every layer of torch.
    """

    seed: int | None = None
    changes_base = False

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; `weight` gives shape, dtype and device only."""
        rows, cols = weight.shape
        options = {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }
        generator = None
        if self.seed is not None and not weight.is_meta:
            generator = torch.Generator(weight.device).manual_seed(self.seed)
        bound = 1 / math.sqrt(cols)
        lora_A = torch.empty(r, cols, **options).uniform_(-bound, bound, generator=generator)
        return Start(lora_A, torch.zeros(rows, r, **options))


register_initializer("lora", LoRA)
