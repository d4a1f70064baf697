"""Registers the Triton kernels for CUDA tensors. Triton itself is imported at the first call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..grouped_linear import grouped_linear_backward_ref, grouped_linear_forward_ref
from ..linear.dora import dora_scale_backward_ref, dora_scale_ref
from ..loram_init import check_distinct, largest_sum, log_gain, refuse_unfit
from .library import LIBRARY


@functools.cache  # `import_module` takes 1 us a call
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"lora_kernels.triton_kernels.{name}")


def _dst_basis_(out: Tensor, size: int, offset: int, scale: Tensor | None) -> None:
    _module("dst_basis").dst_basis_(out, size, offset, scale)


def _frobenius_stats(weights: list[Tensor]) -> Tensor:
    return _module("frobenius_stats").frobenius_stats(weights)


def _subtract_dst_(weight: Tensor, coefficient: Tensor, rank: int, *placement: int) -> None:
    _module("subtract_dst").subtract_dst_(weight, coefficient, rank, *placement)


def _loram_init_(
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    beta: Tensor,
    rank: int,
    scaling: float,
    check: bool,
    stats: Tensor | None = None,
) -> None:
    check_distinct(weights)
    if stats is None:
        stats = _frobenius_stats(weights)
    _module("loram_init").loram_init_(
        weights,
        lora_A,
        lora_B,
        beta,
        stats,
        rank,
        scaling,
        lambda shape: log_gain(rank, *shape),
        partial(largest_sum, rank, scaling),
        (lambda sums: refuse_unfit(weights, sums, rank, scaling)) if check else None,
    )


def _linear_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _module("linear").linear_forward(*args)


def _linear_backward(*args: Any) -> tuple[Tensor, ...]:
    return _module("linear").linear_backward(*args)


def _grouped_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *extras: Any,
) -> tuple[Tensor, Tensor]:
    # The reference, for float64 and empty sizes, waits for the device.
    kernels = _module("grouped")
    suits = kernels.suits(x, weight, rows, lora_A, lora_B)
    forward = kernels.grouped_linear_forward if suits else grouped_linear_forward_ref
    return forward(x, weight, bias, ends, rows, lora_A, lora_B, *extras)


def _grouped_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    kernels = _module("grouped")
    suits = kernels.suits(x, weight, rows, lora_A, lora_B)
    backward = kernels.grouped_linear_backward if suits else grouped_linear_backward_ref
    return backward(grad, x, weight, ends, rows, lora_A, lora_B, *others)


def _row_norms(weight: Tensor, right: Tensor, left: Tensor, scaling: float) -> Tensor:
    norms: Tensor = _module("row_norms").row_norms(weight, right, left, scaling)
    return norms


def _dora_scale(y0: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    kernels = _module("dora")
    scale = kernels.dora_scale if kernels.suits(y0, gain) else dora_scale_ref
    y: Tensor = scale(y0, gain, bias)
    return y


def _dora_scale_backward(
    grad: Tensor, y0: Tensor | None, gain: Tensor, needs_y0: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _module("dora")
    suits = kernels.suits(grad, gain)
    backward = kernels.dora_scale_backward if suits else dora_scale_backward_ref
    return backward(grad, y0, gain, needs_y0, needs_bias)


KERNELS: dict[str, Callable[..., object]] = {
    "_dst_basis_": _dst_basis_,
    "_frobenius_stats": _frobenius_stats,
    "_subtract_dst_": _subtract_dst_,
    "_loram_init_": _loram_init_,
    "linear_forward": _linear_forward,
    "linear_backward": _linear_backward,
    "grouped_linear_forward": _grouped_linear_forward,
    "grouped_linear_backward": _grouped_linear_backward,
    "_row_norms": _row_norms,
    "_dora_scale": _dora_scale,
    "_dora_scale_backward": _dora_scale_backward,
}


def _on_its_device(kernel: Callable[..., object]) -> Callable[..., object]:
    """The kernel, run on its tensors' device: Triton would launch it on the current device."""

    def run(first: Tensor | list[Tensor] | tuple[Tensor, ...], *args: Any) -> object:
        tensor = first[0] if isinstance(first, (list, tuple)) else first
        with torch.cuda.device_of(tensor):
            return kernel(first, *args)

    return run


def register_triton() -> None:
    """Register all kernels; on a GPU build of torch that cannot run them, warn instead."""
    missing = importlib.util.find_spec("triton") is None
    if missing or torch.version.hip is not None:
        if torch.version.cuda is not None or torch.version.hip is not None:
            warnings.warn(
                "lora_kernels runs its plain-torch references on GPU tensors: the results are the "
                "same, but everything is slower. The kernels are for NVIDIA GPUs and need Triton "
                "(pip install triton)",
                RuntimeWarning,
                stacklevel=2,
            )
        return
    for name, kernel in KERNELS.items():
        LIBRARY.impl(name, _on_its_device(kernel), "CUDA")
