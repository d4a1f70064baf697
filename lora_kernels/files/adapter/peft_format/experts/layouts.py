"""The two layouts of an expert parameter's A [E, k, in] and B [E, out, k] in a file.

"each": for each expert and each tensor of the checkpoint, A [k, in] and B [rows, k] as for a linear
layer. gate and up have the same A, and each has its own rows of B. "stacked" (PEFT's since 0.19):
A [E·k, in], in whose rows the expert varies slowest, and B [out, k·E], in whose columns the expert
varies **fastest**.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .....model.config import ExpertPart

EACH, STACKED = "each", "stacked"
LAYOUTS = ("auto", EACH, STACKED)

Pair = tuple[Tensor, Tensor]


def stacked(right: Tensor, left: Tensor) -> Pair:
    """PEFT's A [E·k, in] and B [out, k·E] from A [E, k, in] and B [E, out, k]."""
    return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)


def unstacked(lora_A: Tensor, lora_B: Tensor, experts: int, slowest: bool = False) -> Pair:
    """A [E, k, in] and B [E, out, k] from PEFT's A [E·k, in] and B [out, k·E].

    `slowest`: the expert varies slowest in the columns of B too, as Unsloth wrote it before
    September 2026.
    """
    right = lora_A.unflatten(0, (experts, -1))
    if slowest:
        return right, lora_B.unflatten(1, (experts, -1)).transpose(0, 1).contiguous()
    return right, lora_B.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()


def to_pairs(right: Tensor, left: Tensor, parts: Sequence[ExpertPart]) -> dict[str, Pair]:
    """The 2-D A and B of a file's tensors, by their names, from `right` [E, k, in] and `left`
    [E, out, k] of an expert parameter.
    """
    pairs = {}
    for part in parts:
        rows = left[:, part.start : part.stop]
        names = part.names(len(right))
        if names == [part.name]:
            pairs[part.name] = stacked(right, rows)
        else:
            pairs |= {name: (right[e], rows[e]) for e, name in enumerate(names)}
    return pairs


def from_pairs(pairs: Mapping[str, Pair], parts: Sequence[ExpertPart], experts: int) -> Pair:
    """The inverse of `to_pairs`.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the shapes do not fit each other, or two parts have different A.

    """
    found = [_of_part(pairs, part, experts) for part in parts]
    right, left = found[0]
    for part, (other, rows) in zip(parts[1:], found[1:], strict=True):
        if not torch.equal(right, other):
            raise ValueError(f"lora_A of {part.name!r} and of {parts[0].name!r} differ")
        left = torch.cat([left, rows], dim=1)
    return right, left


def _of_part(pairs: Mapping[str, Pair], part: ExpertPart, experts: int) -> Pair:
    """A [E, k, in] and B [E, rows, k] of one part of the parameter."""
    names = part.names(experts)
    found = [pairs[name] for name in names]
    if names == [part.name]:
        lora_A, lora_B = found[0]
        if len(lora_A) % experts or lora_B.shape[1] != len(lora_A):
            raise ValueError(
                f"lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} of {part.name!r} are "
                f"not those of {experts} experts"
            )
        return unstacked(lora_A, lora_B, experts)
    if len({(A.shape, B.shape, A.dtype, B.dtype) for A, B in found}) > 1:
        raise ValueError(f"the experts of {part.name!r} have tensors of different shapes")
    right, left = zip(*found, strict=True)
    return torch.stack(right), torch.stack(left)
