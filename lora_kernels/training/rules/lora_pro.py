"""LoRA-Pro: the step of A and B that is nearest to full fine-tuning's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Rule, gram, spectrum, split
from .blocks import Block


@dataclass(frozen=True)
class LoRAPro(Rule):
    """g_A ← s⁻² P g_A + X A and g_B ← s⁻² (I − B P Bᵀ) g_B Q − B X, with P = (BᵀB + δI)⁺,
    Q = (AAᵀ + δI)⁺ and BᵀB X + X AAᵀ = −s⁻² P g_A Aᵀ.

    LoRA-Pro (Wang et al., arXiv 2407.18242, theorems 2.1 and 2.3). s(B g_A + g_B A) is the matrix
    nearest to full fine-tuning's gradient, in the Frobenius norm, among those that a step of A and
    B can make. X does not change that matrix; it makes g_A and g_B nearest to the gradients of A
    and B. At a start with B = 0, g_A is 0.

    With SGD this is the paper's theorem. With Adam, the moments are those of the rewritten
    gradients, as in the authors' "efficient" AdamW (LoRAProAdamW); their "full" AdamW stores
    moments of full [out, in] gradients, which this rule does not. As in their code, pseudo-inverses
    treat eigenvalues of at most r · eps times the largest as 0. The rule needs gradients of the
    loss, up to a common factor; gradients that were clipped by value are not of that form.

    Attributes:
        damping: δ, 1e-8 as in the authors' code.

    """

    damping: float = 1e-8
    name: ClassVar[str] = "lora_pro"

    def rewrite_(self, blocks: Sequence[Block]) -> None:
        """Overwrites the gradients of A and B."""
        gram_A, gram_B, grad_A_A, B_grad_B = _products(blocks)
        of_A, of_B = spectrum(blocks, gram_A), spectrum(blocks, gram_B)
        inverse_squared = torch.cat([b.inverse_squared_scaling() for b in blocks])  # s⁻²
        P = of_B.pseudo_inverse(self.damping) * inverse_squared
        Q = of_A.pseudo_inverse(self.damping)
        X = of_B.sylvester(of_A, -P @ torch.cat(grad_A_A).double())
        Y = P @ torch.cat(B_grad_B).double() @ Q + X
        matrices = [split(blocks, M) for M in (P, Q * inverse_squared, X, Y)]
        for block, p, q, x, y in zip(blocks, *matrices, strict=True):
            block.write_grad_A_(torch.baddbmm(p @ block.grad_A(), x, block.lora_A()))
            block.write_grad_B_(torch.baddbmm(block.grad_B() @ q, block.lora_B(), y, alpha=-1))


def _products(blocks: Sequence[Block]) -> list[list[Tensor]]:
    """AAᵀ, BᵀB, g_A Aᵀ and Bᵀ g_B [N, r, r], each a list with a tensor for each block."""
    found: list[list[Tensor]] = [[], [], [], []]
    for block in blocks:
        A, B = block.lora_A(), block.lora_B()
        grams = gram(A), gram(B.mT)
        products = block.grad_A() @ A.mT, B.mT @ block.grad_B()
        for tensors, new in zip(found, (*grams, *products), strict=True):
            tensors.append(new)
    return found
