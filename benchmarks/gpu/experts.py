"""The projections of experts that are compared, and the block of a mixture around them.

All accept (x, W [E, N, K], the adapter's A [E, r, K] and B [E, N, r] in fp32, ends, rows). They are
the frozen experts alone, ours, the adapter as two additional grouped products ("split"), and what
PEFT 0.21 computes for `target_parameters`, W + B A of all experts ("PEFT's formula").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from benchmarks.gpu.peers import BARE, OURS

SPLIT, FORMULA = "split", "PEFT's formula"
Project = Callable[[Tensor, "Stack", Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Stack:
    """One parameter of experts with its adapter; the scaling is 1."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor

    @classmethod
    def random(cls, experts: int, n: int, k: int, r: int, device: torch.device) -> Stack:
        """W in bf16, A and B in fp32; random, because the power that a product draws depends on
        data.
        """

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype).div_(shape[-1] ** 0.5)

        weight = make(experts, n, k, dtype=torch.bfloat16)
        lora_A, lora_B = make(experts, r, k), make(experts, n, r)
        return cls(weight, lora_A.requires_grad_(), lora_B.requires_grad_())

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B


def _gathered(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def bare(x: Tensor, stack: Stack, ends: Tensor, rows: Tensor | None) -> Tensor:
    """The frozen experts alone."""
    return grouped_mm(_gathered(x, rows), stack.weight.mT, offs=ends)


def ours(x: Tensor, stack: Stack, ends: Tensor, rows: Tensor | None) -> Tensor:
    """`lora::grouped_linear`, which gathers x itself."""
    return torch.ops.lora.grouped_linear(x, stack.weight, None, ends, rows, *stack.factors, 1.0)


def split(x: Tensor, stack: Stack, ends: Tensor, rows: Tensor | None) -> Tensor:
    """The adapter as two additional grouped products."""
    x = _gathered(x, rows)
    lora_A, lora_B = (factor.to(x.dtype) for factor in stack.factors)
    z = grouped_mm(x, lora_A.mT, offs=ends)
    return grouped_mm(x, stack.weight.mT, offs=ends) + grouped_mm(z, lora_B.mT, offs=ends)


def formula(x: Tensor, stack: Stack, ends: Tensor, rows: Tensor | None) -> Tensor:
    """One product with W + B A, which stays in memory from the forward to the backward."""
    lora_A, lora_B = (factor.to(x.dtype) for factor in stack.factors)
    merged = torch.baddbmm(stack.weight, lora_B, lora_A)
    return grouped_mm(_gathered(x, rows), merged.mT, offs=ends)


PROJECTIONS: dict[str, Project] = {BARE: bare, OURS: ours, SPLIT: split, FORMULA: formula}


@dataclass(frozen=True)
class Routing:
    """The tokens of each expert: `rows` by expert, and the `place` of each (token, choice) in
    `rows`.
    """

    ends: Tensor
    rows: Tensor
    place: Tensor
    weights: Tensor

    @classmethod
    def random(cls, tokens: int, experts: int, top_k: int, device: torch.device) -> Routing:
        """`top_k` different experts for each token, all of them equally likely."""
        scores = torch.rand(tokens, experts, device=device)
        weights, chosen = scores.topk(top_k)
        ascending, order = chosen.flatten().sort(stable=True)
        bounds = torch.arange(experts, device=device)
        ends = torch.searchsorted(ascending, bounds, right=True).to(torch.int32)
        weights = weights.to(torch.bfloat16).requires_grad_()
        return cls(ends, order // top_k, order.argsort(), weights)


def block(x: Tensor, up: Stack, down: Stack, routing: Routing, project: Project) -> Tensor:
    """The experts of a layer as transformers computes them with grouped products."""
    gate, value = project(x, up, routing.ends, routing.rows).chunk(2, -1)
    y = project(silu(gate) * value, down, routing.ends, None)
    y = y[routing.place].view(*routing.weights.shape, -1)
    return (y * routing.weights[..., None]).sum(1)
