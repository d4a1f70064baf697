"""The product BRA − B₀A₀ of an adapter and its start, as two factors that may be rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def product_factors(
    lora_A: Tensor,
    lora_B: Tensor,
    lora_R: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[RA; RA − A₀] [k, in] and [B − B₀, B₀] [out, k], whose product is BRA − B₀A₀, in float32 or
    wider, also under autocast. k = 2r, or r without initial factors. For experts, every shape has a
    leading dimension [E].

    These factors may be rounded, because the terms of their product have the size of the update.
    With [RA; A₀] and [B, −B₀] the terms have the size of W and cancel: bfloat16 can lose all of a
    small update.
    """
    work = widest(lora_A, lora_B, lora_R, start_A, start_B)
    right, left = lora_A.to(work), lora_B.to(work)
    if lora_R is not None:
        with without_autocast(right):
            right = lora_R.to(work) @ right
    if start_A is None or start_B is None:
        return right, left
    start_A, start_B = start_A.to(work), start_B.to(work)
    return torch.cat([right, right - start_A], -2), torch.cat([left - start_B, start_B], -1)


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds all tensors, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def without_autocast(like: Tensor) -> Any:
    """A context in which products on the device of `like` keep their dtype."""
    kind = like.device.type
    return torch.autocast(kind if _has_autocast(kind) else "cpu", enabled=False)


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
