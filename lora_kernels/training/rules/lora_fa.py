"""LoRA-FA: A is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Rule, gram, spectrum, split
from .blocks import Block
from .pairs import FactorPair


@dataclass(frozen=True)
class LoRAFA(Rule):
    """g_B ← s⁻² g_B (AAᵀ + δI)⁺, and A gets no gradient, so that no optimizer changes or decays it.

    LoRA-FA (Zhang et al., arXiv 2308.03303), with the gradient correction of PEFT's
    `LoraFAOptimizer`: s·g_B·A is the matrix nearest to full fine-tuning's gradient, in the
    Frobenius norm, among those that a step of B alone can make. The pseudo-inverse treats
    eigenvalues of at most r · eps times the largest as 0, as PEFT's does.

    Attributes:
        damping: δ, 1e-8 as in PEFT.

    """

    damping: float = 1e-8
    name: ClassVar[str] = "lora_fa"
    needs_A: ClassVar[bool] = False

    def prepare_(self, pairs: Sequence[FactorPair]) -> list[FactorPair]:
        """As for other rules; then removes the gradients of A."""
        found = super().prepare_(pairs)
        for pair in pairs:
            pair.lora_A.grad = None
        return found

    def rewrite_(self, blocks: Sequence[Block]) -> None:
        """Overwrites the gradients of B."""
        inverse = spectrum(blocks, (gram(b.lora_A()) for b in blocks)).pseudo_inverse(self.damping)
        inverse *= torch.cat([b.inverse_squared_scaling() for b in blocks])
        for block, right in zip(blocks, split(blocks, inverse), strict=True):
            block.write_grad_B_(block.grad_B() @ right)
