"""The memory layouts tested for every operator on a weight."""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "transposed", "row_slice", "both_strided", "offset")


def lay_out(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor equal to `weight` with other strides; the memory between its entries is NaN."""
    n, m = weight.shape
    if layout == "contiguous":
        return weight.clone()
    if layout == "transposed":
        return weight.T.clone(memory_format=torch.contiguous_format).T
    shape, view = {
        "row_slice": ((2 * n, m), lambda t: t[::2]),
        "both_strided": ((2 * n, 3 * m), lambda t: t[::2, ::3]),
        "offset": ((n + 3, m + 5), lambda t: t[2 : 2 + n, 3 : 3 + m]),
    }[layout]
    memory = torch.full(shape, float("nan"), dtype=weight.dtype, device=weight.device)
    out = view(memory)
    out.copy_(weight)
    return out
