"""`lora::linear`: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ (Hu et al., arXiv 2106.09685, eq. 3), with its
backward. With `lora_R` the last term is s · drop(x) Aᵀ Rᵀ Bᵀ (LoRA-XS, arXiv 2405.17604). With
`start_A` and `start_B` (the implicit residual), the constant s · x A₀ᵀ B₀ᵀ is subtracted.

Shapes: x [..., K], weight [N, K], bias [N], lora_A and start_A [r, K], lora_B and start_B [N, r],
lora_R [r, r]; M is the number of rows of x. The computation is in x's dtype. A, B and R may have a
wider dtype (fp32 masters), in which they receive their gradients. Saved for the backward: x and
z = drop(x) Aᵀ [M, r]. The dropout mask is recomputed from `seed`. If x holds only some columns of a
wider matrix (tensor parallelism), its first column is column `col_offset` of that matrix, a
multiple of 4, and the mask equals the whole matrix's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._utils.checks import FLOATS
from .._backends.library import LIBRARY, define_composite, define_kernel
from ..philox import dropout as drop_elements

_EXTRAS = "float dropout, Tensor? seed, Tensor? start_A, Tensor? start_B, Tensor? lora_R"


def as_rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def dropped(rows: Tensor, dropout: float, seed: Tensor | None, col_offset: int = 0) -> Tensor:
    """drop(rows) [M, K]; a `dropout` of 0 needs no seed."""
    if dropout == 0:
        return rows
    if seed is None:
        raise ValueError("dropout > 0 needs seed, an int64 tensor of one element")
    return drop_elements(rows, dropout, seed, col_offset)


def linear_forward_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
    lora_R: Tensor | None,
    col_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)  # [M, K]
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    z = dropped(rows, dropout, seed, col_offset) @ A.T  # [M, r]
    into_B = z if lora_R is None else z @ lora_R.to(x.dtype).T  # [M, r]
    y = torch.nn.functional.linear(rows, weight, bias)  # [M, N]
    if start_A is None or start_B is None:
        y.addmm_(into_B, B.T, alpha=scaling)
    else:
        # One product of rank 2r, so that start and adapter cancel before y is rounded.
        z0 = rows @ start_A.to(x.dtype).T  # [M, r]
        factors = torch.cat([B, -start_B.to(x.dtype)], 1)  # [N, 2r]
        y.addmm_(torch.cat([into_B, z0], 1), factors.T, alpha=scaling)
    # Not a view, because users may write into y in place.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]]), z


def linear_forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(as_rows(x).shape[0], lora_A.shape[0])


def linear_plain_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    scaling, *extras = others
    return linear_forward_ref(x, weight, bias, lora_A, lora_B, scaling, 0.0, None, *extras)


def linear_backward_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
    lora_R: Tensor | None,
    needs: list[bool],
    col_offset: int = 0,
) -> tuple[Tensor, ...]:
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_R = needs
    dy, rows = as_rows(grad), as_rows(x)
    A = lora_A.to(x.dtype)
    dx = dweight = dbias = dA = dB = dR = x.new_empty(0)
    dz = (dy @ lora_B.to(x.dtype)) * scaling  # [M, r]
    into_B = z
    if lora_R is not None:
        R = lora_R.to(x.dtype)
        into_B = z @ R.T
        if needs_R:
            dR = (dz.T @ z).to(lora_R.dtype)
        dz = dz @ R
    if needs_x:
        dx = dy @ weight
        through_A = dz @ A  # [M, K]
        dx += dropped(through_A, dropout, seed, col_offset)
        if start_A is not None and start_B is not None:
            dx -= (dy @ start_B.to(x.dtype)) * scaling @ start_A.to(x.dtype)
        dx = dx.reshape(x.shape)
    if needs_A:
        dA = (dz.T @ dropped(rows, dropout, seed, col_offset)).to(lora_A.dtype)
    if needs_B:
        dB = (dy.T @ into_B).to(lora_B.dtype) * scaling
    if needs_weight:
        dweight = dy.T @ rows
    if needs_bias:
        dbias = dy.sum(0)
    return tuple(t.clone() if t.numel() == 0 else t for t in (dx, dweight, dbias, dA, dB, dR))


def linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    lora_R, needs = others[6:8]
    R = x if lora_R is None else lora_R  # without R, any tensor will do
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_A.shape, lora_B.shape, R.shape)
    dtypes = (x.dtype, x.dtype, x.dtype, lora_A.dtype, lora_B.dtype, R.dtype)
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype if need else x.dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


class _Linear(torch.autograd.Function):
    """The forward kernel and its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_R: Tensor | None,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        start_A: Tensor | None,
        start_B: Tensor | None,
        col_offset: int,
    ) -> Tensor:
        extras = (scaling, dropout, seed, start_A, start_B, lora_R, col_offset)
        y, z = torch.ops.lora.linear_forward(x, weight, bias, lora_A, lora_B, *extras)
        ctx.save_for_backward(x, weight, lora_A, lora_B, z, seed, start_A, start_B, lora_R)
        ctx.scaling, ctx.dropout, ctx.col_offset = scaling, dropout, col_offset
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, z, *extras = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        # The forward applied autocast already, which would cast the kernel's operands again here.
        operands = (grad, x, weight, lora_A, lora_B, z, ctx.scaling, ctx.dropout, *extras)
        with torch.amp.autocast(grad.device.type, enabled=False):
            grads = torch.ops.lora.linear_backward(*operands, needs, ctx.col_offset)
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*wanted, None, None, None, None, None, None)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    start_A: Tensor | None = None,
    start_B: Tensor | None = None,
    lora_R: Tensor | None = None,
    col_offset: int = 0,
) -> Tensor:
    operands = (x, weight, bias, lora_A, lora_B)
    extras = (scaling, dropout, seed, start_A, start_B)
    check_linear(*operands, *extras, lora_R, col_offset)
    learned = (*operands, lora_R)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        return _Linear.apply(*learned, *extras, col_offset)
    return torch.ops.lora.linear_forward(*operands, *extras, lora_R, col_offset)[0]


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
    lora_R: Tensor | None,
    col_offset: int,
) -> None:
    """Raise if the arguments do not fit together. Plain comparisons, because every call of a layer
    runs this: torch._check and its closures took 20 us, as long as a small layer itself.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be a real float, got {x.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be 2-D, got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] to fit weight [{n}, {k}], got {list(x.shape)}")
    if lora_A.dim() != 2:
        raise ValueError(f"lora_A must be 2-D, got {list(lora_A.shape)}")
    r = lora_A.shape[0]
    check_operand("bias", bias, (n,), x, weight, r)
    check_operand("lora_A", lora_A, (r, k), x, weight, r)
    check_operand("lora_B", lora_B, (n, r), x, weight, r)
    check_operand("start_A", start_A, (r, k), x, weight, r)
    check_operand("start_B", start_B, (n, r), x, weight, r)
    check_operand("lora_R", lora_R, (r, r), x, weight, r)
    check_together(x, weight, bias, dropout, seed, start_A, start_B)
    if col_offset < 0 or col_offset % 4:
        raise ValueError(f"col_offset must be a multiple of 4 and at least 0, got {col_offset}")


def check_together(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
) -> None:
    """Raises ValueError or TypeError if devices or dtypes differ, or an argument lacks its pair."""
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"x is {x.dtype} but {name} is {tensor.dtype}; cast one, or use torch.autocast"
            )
    if (start_A is None) != (start_B is None):
        raise ValueError("give both start_A and start_B, or neither")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")
    if dropout > 0.0:
        if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError("dropout > 0 needs seed, an int64 tensor of one element")
        if seed.device != x.device:
            raise ValueError(f"seed is on {seed.device}, x on {x.device}")


def check_operand(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor, weight: Tensor, r: int
) -> None:
    """Raises ValueError or TypeError unless the operand is None or a float tensor of this shape."""
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must be {list(shape)} to fit weight {list(weight.shape)} and rank {r}, "
            f"got {list(tensor.shape)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be a real float, got {tensor.dtype}")


def autocast_copies(
    device_type: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors cast as torch.autocast does for nn.Linear: floats, except float64."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if bias is None else cast(bias)


def _autocast_to(operator: Any, device_type: str) -> Callable[..., Tensor]:
    """`operator` with x, W and b cast as torch.autocast does for nn.Linear, and the rest uncast."""

    def with_autocast(
        x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        cast = autocast_copies(device_type, x, weight, bias)
        with torch.amp.autocast(device_type, enabled=False):
            result: Tensor = operator(*cast, *args, **kwargs)
            return result

    return with_autocast


def define_autocast(name: str) -> None:
    """Lets the operator `name`, whose first arguments are x, weight and bias, obey autocast."""
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, _autocast_to(getattr(torch.ops.lora, name), device), key)


define_kernel(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    f"float scaling, {_EXTRAS}, int col_offset=0) -> (Tensor y, Tensor z)",
    linear_forward_ref,
    linear_forward_fake,
)
# The forward without dropout consists of ATen calls only. C++ issues them in half the time that
# Python needs, which matters when the GPU has little to do.
define_kernel(
    "_linear_plain(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "float scaling, Tensor? start_A, Tensor? start_B, Tensor? lora_R) -> (Tensor y, Tensor z)",
    linear_plain_ref,
    linear_forward_fake,
)
define_kernel(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor z, "
    f"float scaling, {_EXTRAS}, bool[6] needs, int col_offset=0) "
    "-> (Tensor x, Tensor weight, Tensor bias, Tensor lora_A, Tensor lora_B, Tensor lora_R)",
    linear_backward_ref,
    linear_backward_fake,
)
define_composite(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
    "float dropout=0.0, Tensor? seed=None, Tensor? start_A=None, Tensor? start_B=None, "
    "Tensor? lora_R=None, int col_offset=0) -> Tensor",
    linear,
)
define_autocast("linear")
