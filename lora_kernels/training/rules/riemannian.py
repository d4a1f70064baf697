"""Riemannian preconditioning: scaled gradient descent and scaled AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import Rule, gram, spectrum, split
from .blocks import Block


@dataclass(frozen=True)
class Riemannian(Rule):
    """g_A ← (BᵀB + δI)⁻¹ g_A and g_B ← g_B (AAᵀ + δI)⁻¹.

    Riemannian Preconditioned LoRA (Zhang, Pilanci, arXiv 2402.02347, equation 1 and algorithm 1):
    with SGD this is their scaled GD, with AdamW their scaled AdamW. Both gradients are
    preconditioned with A and B as they are before the step. s is not used.

    Attributes:
        damping: δ, 1e-6 as in the authors' code. It must be positive, because B may be 0 at the
            start.

    """

    damping: float = 1e-6
    name: ClassVar[str] = "riemannian"
    positive: ClassVar[bool] = True

    def rewrite_(self, blocks: Sequence[Block]) -> None:
        """Overwrites the gradients of A and B."""
        left = spectrum(blocks, (gram(b.lora_B().mT) for b in blocks)).inverse(self.damping)
        right = spectrum(blocks, (gram(b.lora_A()) for b in blocks)).inverse(self.damping)
        parts = zip(blocks, split(blocks, left), split(blocks, right), strict=True)
        for block, left_inverse, right_inverse in parts:
            block.write_grad_A_(left_inverse @ block.grad_A())
            block.write_grad_B_(block.grad_B() @ right_inverse)
