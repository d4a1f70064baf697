"""`lora::dora_linear`: y = g ∘ (x Wᵀ + s·drop(x) Aᵀ Rᵀ Bᵀ − s·x A₀ᵀ B₀ᵀ) + b with the gain
g = m ⊘ ‖V‖, where ‖V‖ are the norms of the rows of V = W + s·(B R A − B₀ A₀) (DoRA, arXiv
2402.09353, eq. 5), with its backward. R, A₀ and B₀ are optional.

The norms are constants in the backward (section 4.3 of the paper). Where a norm is 0 the gain is 1:
the row's output is its bias, and it can leave zero by training. Dropout acts on the update only.

Shapes: those of `lora::linear`; magnitude m [N], and the norms and gains [N] are float32 (float64
if an operand is). Under torch.autocast x, W and b are cast, but the norms are those of the uncast
W. Saved for the backward: x, z = drop(x) Aᵀ [M, r], y₀ = the parenthesis [M, N], the norms and
gains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backends.library import LIBRARY, define_composite, define_kernel
from .factors import product_factors
from .lora import as_rows, autocast_copies, check_linear, check_operand
from .row_norms import row_gain


def _gain(magnitude: Tensor, norms: Tensor, x_dtype: torch.dtype) -> Tensor:
    """`row_gain` [N] in the dtype of the passes over y: float64 if x is, else float32."""
    wide = torch.float64 if x_dtype == torch.float64 else torch.float32
    return row_gain(magnitude, norms).to(wide)


def dora_scale_ref(y0: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """y₀ ∘ g + b, rounded once to y₀'s dtype."""
    y = y0 * gain  # in the dtype of the gain
    if bias is not None:
        y = y + bias
    return y.to(y0.dtype)


def dora_scale_fake(y0: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    return y0.new_empty(y0.shape)


def dora_scale_backward_ref(
    grad: Tensor, y0: Tensor | None, gain: Tensor, needs_y0: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy ∘ g in dy's dtype, Σ dy ∘ y₀ over the rows if y₀ is given, Σ dy); empty if not needed."""
    wide = as_rows(grad).to(gain.dtype)  # [M, N]
    dy0 = (wide * gain).to(grad.dtype).reshape(grad.shape) if needs_y0 else grad.new_empty(0)
    dgain = gain.new_empty(0)
    if y0 is not None:
        dgain = (wide * as_rows(y0).to(gain.dtype)).sum(0)
    dbias = wide.sum(0).to(grad.dtype) if needs_bias else grad.new_empty(0)
    return dy0, dgain, dbias


def dora_scale_backward_fake(
    grad: Tensor, y0: Tensor | None, gain: Tensor, needs_y0: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = gain.shape[0]
    return (
        grad.new_empty(grad.shape if needs_y0 else (0,)),
        gain.new_empty(0 if y0 is None else n),
        grad.new_empty(n if needs_bias else 0),
    )


class _DoRALinear(torch.autograd.Function):
    """The forward kernels and their backward; `norms` are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_R: Tensor | None,
        magnitude: Tensor,
        norms: Tensor,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        start_A: Tensor | None,
        start_B: Tensor | None,
    ) -> Tensor:
        extras = (scaling, dropout, seed, start_A, start_B, lora_R)
        y0, z = torch.ops.lora.linear_forward(x, weight, None, lora_A, lora_B, *extras)
        gain = _gain(magnitude, norms, x.dtype)
        kept = y0 if ctx.needs_input_grad[6] else None
        saved = (x, weight, lora_A, lora_B, z, seed, start_A, start_B, lora_R)
        ctx.save_for_backward(kept, norms, gain, *saved)
        ctx.scaling, ctx.dropout, ctx.magnitude_dtype = scaling, dropout, magnitude.dtype
        y: Tensor = torch.ops.lora._dora_scale(y0, gain, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y0, norms, gain, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        through = [*needs[:2], False, *needs[3:6]]  # the bias's gradient does not pass the gain
        # The forward applied autocast already, which would cast the kernels' operands again here.
        with torch.amp.autocast(grad.device.type, enabled=False):
            dy0, dgain, dbias = torch.ops.lora._dora_scale_backward(
                grad, y0, gain, any(through), needs[2]
            )
            grads: list[Tensor | None] = [None] * 6
            if any(through):
                found = _linear_backward(dy0, ctx, saved, through)
                grads = [g if need else None for g, need in zip(found, through, strict=True)]
            dmagnitude = None
            if needs[6]:
                # A row of norm 0 has no direction along which its magnitude could change.
                zero = norms == 0
                dmagnitude = torch.where(zero, torch.zeros_like(dgain), dgain / norms)
                dmagnitude = dmagnitude.to(ctx.magnitude_dtype)
        grads[2] = dbias if needs[2] else None
        return (*grads, dmagnitude, None, None, None, None, None, None)


def _linear_backward(
    dy0: Tensor, ctx: Any, saved: list[Tensor], needs: list[bool]
) -> tuple[Tensor, ...]:
    x, weight, lora_A, lora_B, z, *extras = saved
    operands = (dy0, x, weight, lora_A, lora_B, z, ctx.scaling, ctx.dropout, *extras)
    grads: tuple[Tensor, ...] = torch.ops.lora.linear_backward(*operands, needs, 0)
    return grads


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    start_A: Tensor | None = None,
    start_B: Tensor | None = None,
    lora_R: Tensor | None = None,
    *,
    measured: Tensor | None = None,
) -> Tensor:
    """The norms are those of `measured` if it is given, else those of `weight`."""
    extras = (scaling, dropout, seed, start_A, start_B)
    check_linear(x, weight, bias, lora_A, lora_B, *extras, lora_R, 0)
    check_operand("magnitude", magnitude, (weight.shape[0],), x, weight, lora_A.shape[0])
    measured = weight if measured is None else measured
    with torch.no_grad():
        factors = product_factors(lora_A, lora_B, lora_R, start_A, start_B)
        norms = torch.ops.lora.row_norms(measured, *factors, scaling)
    learned = (x, weight, bias, lora_A, lora_B, lora_R, magnitude)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        return _DoRALinear.apply(*learned, norms, *extras)
    y0, _ = torch.ops.lora.linear_forward(x, weight, None, lora_A, lora_B, *extras, lora_R)
    y: Tensor = torch.ops.lora._dora_scale(y0, _gain(magnitude, norms, x.dtype), bias)
    return y


def _define_autocast() -> None:
    """x, W and b are cast as for nn.Linear, but the norms are those of the uncast W, so that a gain
    is exactly 1 at the start under autocast too.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def with_autocast(
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            *args: Any,
            device: str = device,
            **kwargs: Any,
        ) -> Tensor:
            cast = autocast_copies(device, x, weight, bias)
            with torch.amp.autocast(device, enabled=False):
                return dora_linear(*cast, *args, **kwargs, measured=weight)

        LIBRARY.impl("dora_linear", with_autocast, key)


define_kernel(
    "_dora_scale(Tensor y0, Tensor gain, Tensor? bias) -> Tensor", dora_scale_ref, dora_scale_fake
)
define_kernel(
    "_dora_scale_backward(Tensor grad, Tensor? y0, Tensor gain, bool needs_y0, bool needs_bias) "
    "-> (Tensor y0, Tensor gain, Tensor bias)",
    dora_scale_backward_ref,
    dora_scale_backward_fake,
)
define_composite(
    "dora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "Tensor magnitude, float scaling, float dropout=0.0, Tensor? seed=None, Tensor? start_A=None, "
    "Tensor? start_B=None, Tensor? lora_R=None) -> Tensor",
    dora_linear,
)
_define_autocast()
