"""The formulas of `add_weighted_adapter` for one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ....layers.state import LayerState, scaled, svd_factors
from ...starts import naming

Factors = tuple[Tensor, Tensor]
Parts = Sequence[tuple[float, LayerState]]  # of one layer: the weight of each adapter that has it


def combination(kind: str, r: int) -> Callable[[Parts], Factors]:
    """The function that computes the new A [k, in] and B [out, k] of a layer, k ≤ r."""
    if kind == "svd":
        return lambda parts: svd_factors(*_concatenated(parts), r)
    return _concatenated if kind == "cat" else _added


def combined_layer(
    path: str, parts: Parts, r: int, combined: Callable[[Parts], Factors]
) -> LayerState:
    """A layer's state in the new adapter, padded to rank r with zeros."""
    first = parts[0][1]
    with naming(path), torch.no_grad():
        right, left = combined(parts)
    missing = r - right.shape[-2]
    biases = [
        scaled(own.lora_bias, w * own.scaling) for w, own in parts if own.lora_bias is not None
    ]
    work = first.update_factors()[0].dtype
    return LayerState(
        lora_A=nn.functional.pad(right, (0, 0, 0, missing)).to(work),
        lora_B=nn.functional.pad(left, (0, missing)).to(work),
        scaling=1.0,
        lora_alpha=float(r),
        residual="implicit",
        lora_bias=torch.stack(biases).sum(0) if biases else None,
        embedding=first.embedding,
        kernel=first.kernel,
        groups=first.groups,
    )


def _factors(layer: LayerState) -> Factors:
    """A' and B' of a layer's update, in float64."""
    right, left = layer.update_factors()
    return right.double(), left.double()


def _concatenated(parts: Parts) -> Factors:
    pairs = [(weight * layer.scaling, *_factors(layer)) for weight, layer in parts]
    rights = [factor * right for factor, right, _ in pairs]
    return torch.cat(rights, -2), torch.cat([left for _, _, left in pairs], -1)


def _added(parts: Parts) -> Factors:
    ranks = {layer.update_factors()[0].shape[-2] for _, layer in parts}
    if len(ranks) > 1:
        raise ValueError(
            f"combination_type='linear' adds adapters of one rank, this layer's have "
            f"{', '.join(map(str, sorted(ranks)))}: use 'cat' or 'svd'"
        )
    rights, lefts = [], []
    for weight, layer in parts:
        right, left = _factors(layer)
        factor = weight * layer.scaling
        root = math.sqrt(abs(factor))
        rights.append(right * math.copysign(root, factor))
        lefts.append(left * root)
    return torch.stack(rights).sum(0), torch.stack(lefts).sum(0)
