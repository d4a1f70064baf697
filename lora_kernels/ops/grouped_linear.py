"""`lora::grouped_linear`: `lora::linear` for all experts of a mixture in one call, each with its
own W, b, A and B; and its backward.

Row i of the product is x[rows[i]], or x[i] if `rows` is None. The rows of an expert are
consecutive: expert e has rows [ends[e − 1], ends[e]). Rows from ends[-1] on belong to no expert: y
is zero there, and these rows have no gradient.

Shapes: x [T, K], weight [E, N, K] of any strides, bias [E, N], ends int32 [E], rows int64 [S]
(S = T if it is None), lora_A and start_A [E, r, K], lora_B and start_B [E, N, r], y [S, N]. r may
be 0. The computation is in x's dtype; A and B may have a wider one (fp32 masters), in which they
receive their gradients. Saved for the backward: x, rows and z = drop(x[rows]) Aᵀ [S, r]. Experts
are frozen: weight gets no gradient. The gradients of an expert without rows are zero.

The dropout mask is a function of (row of the product, column, seed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import FLOATS
from ._backends.library import define_composite, define_kernel
from .linear import check_operand, check_together, define_autocast, dropped

_EXTRAS = "float scaling, float dropout, Tensor? seed, Tensor? start_A, Tensor? start_B"


def _experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(e, the rows of expert e) for every expert that has rows."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if end > begin:
            yield e, slice(begin, end)
        begin = end


def _gathered(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _check_values(x: Tensor, ends: Tensor, rows: Tensor | None) -> None:
    """Raise ValueError unless `ends` ascend within the number of rows, and IndexError unless `rows`
    are row numbers of x. On a GPU, the indexing itself checks `rows`.
    """
    size, before = (x if rows is None else rows).shape[0], 0
    for e, end in enumerate(ends.tolist()):
        if end < before:
            raise ValueError(f"ends must not decrease, got {end} for expert {e} after {before}")
        if end > size:
            raise ValueError(
                f"ends must not exceed the number of rows, {size}, got {end} for expert {e}"
            )
        before = end
    if rows is None or rows.device.type != "cpu":
        return
    wrong = ((rows < 0) | (rows >= x.shape[0])).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise IndexError(
            f"rows must be row numbers of x, at least 0 and below {x.shape[0]}, "
            f"got {int(rows[first])} at position {first}"
        )


def grouped_linear_forward_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_values(x, ends, rows)
    gathered = _gathered(x, rows)  # [S, K]
    into_A = dropped(gathered, dropout, seed)  # [S, K]
    size = gathered.shape[0]
    y = x.new_zeros(size, weight.shape[1])
    z = x.new_zeros(size, lora_A.shape[1])
    for e, part in _experts(ends):
        A, B = lora_A[e].to(x.dtype), lora_B[e].to(x.dtype)
        z_part = into_A[part] @ A.T  # [s, r]
        y_part = torch.nn.functional.linear(
            gathered[part], weight[e], None if bias is None else bias[e]
        )
        if start_A is None or start_B is None:
            y_part.addmm_(z_part, B.T, alpha=scaling)
        else:
            # One product of rank 2r, so that start and adapter cancel before y is rounded.
            z0 = gathered[part] @ start_A[e].to(x.dtype).T  # [s, r]
            factors = torch.cat([B, -start_B[e].to(x.dtype)], 1)  # [N, 2r]
            y_part.addmm_(torch.cat([z_part, z0], 1), factors.T, alpha=scaling)
        z[part], y[part] = z_part, y_part
    return y, z


def grouped_linear_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    size = x.shape[0] if rows is None else rows.shape[0]
    return x.new_empty(size, weight.shape[1]), x.new_empty(size, lora_A.shape[1])


def grouped_linear_backward_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    _check_values(x, ends, rows)
    needs_x, needs_bias, needs_A, needs_B = needs
    size = grad.shape[0]
    base, through_A = (x.new_zeros(size, x.shape[1]) for _ in range(2))  # [S, K]
    into_A = dropped(_gathered(x, rows), dropout, seed) if needs_A else x
    dA, dB = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    dbias = x.new_zeros(weight.shape[:2])
    for e, part in _experts(ends):
        A, B, dy = lora_A[e].to(x.dtype), lora_B[e].to(x.dtype), grad[part]
        dz = (dy @ B) * scaling  # [s, r]
        if needs_x:
            base[part] = dy @ weight[e]
            through_A[part] = dz @ A
            if start_A is not None and start_B is not None:
                base[part] -= (dy @ start_B[e].to(x.dtype)) * scaling @ start_A[e].to(x.dtype)
        if needs_A:
            dA[e] = (dz.T @ into_A[part]).to(lora_A.dtype)
        if needs_B:
            dB[e] = (dy.T @ z[part]).to(lora_B.dtype) * scaling
        if needs_bias:
            dbias[e] = dy.sum(0)
    dx = base + dropped(through_A, dropout, seed) if needs_x else base
    if needs_x and rows is not None:
        # The gradients of repeated rows are added in float32 and rounded once.
        work = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(x.shape, dtype=work, device=x.device)
        dx = total.index_add_(0, rows, dx.to(work)).to(x.dtype)
    none = [x.new_empty(0) for _ in range(4)]
    grads = (dx, dbias, dA, dB)
    return tuple(g if need else n for g, n, need in zip(grads, none, needs, strict=True))


def grouped_linear_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    *_, needs = others
    shapes = (x.shape, weight.shape[:2], lora_A.shape, lora_B.shape)
    dtypes = (x.dtype, x.dtype, lora_A.dtype, lora_B.dtype)
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype if need else x.dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


class _GroupedLinear(torch.autograd.Function):
    """The forward kernel and its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: Tensor,
        ends: Tensor,
        rows: Tensor | None,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        start_A: Tensor | None,
        start_B: Tensor | None,
    ) -> Tensor:
        extras = (scaling, dropout, seed, start_A, start_B)
        y, z = torch.ops.lora.grouped_linear_forward(
            x, weight, bias, ends, rows, lora_A, lora_B, *extras
        )
        ctx.save_for_backward(x, weight, ends, rows, lora_A, lora_B, z, seed, start_A, start_B)
        ctx.scaling, ctx.dropout = scaling, dropout
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *operands, seed, start_A, start_B = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        # The forward applied autocast already, which would cast the kernel's operands again here.
        with torch.amp.autocast(grad.device.type, enabled=False):
            grads = torch.ops.lora.grouped_linear_backward(
                grad, *operands, ctx.scaling, ctx.dropout, seed, start_A, start_B, needs
            )
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*wanted, *[None] * 8)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    start_A: Tensor | None = None,
    start_B: Tensor | None = None,
) -> Tensor:
    operands = (x, weight, bias, ends, rows, lora_A, lora_B)
    extras = (scaling, dropout, seed, start_A, start_B)
    check_grouped(*operands, *extras)
    learned = (x, bias, lora_A, lora_B)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        return _GroupedLinear.apply(*learned, weight, ends, rows, *extras)
    return torch.ops.lora.grouped_linear_forward(*operands, *extras)[0]


def check_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
) -> None:
    """Raise if the arguments do not fit together. The values of `ends` and `rows` are not read: on
    a GPU, reading them would wait for the device.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be a real float, got {x.dtype}")
    if weight.dim() != 3:
        raise ValueError(f"weight must be 3-D, [experts, out, in], got {list(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires a gradient, which grouped_linear does not compute: experts are "
            "frozen. Set weight.requires_grad_(False)"
        )
    e, n, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [T, {k}] to fit weight [{e}, {n}, {k}], got {list(x.shape)}")
    for name, index, dtype in (("ends", ends, torch.int32), ("rows", rows, torch.int64)):
        if index is None:
            continue
        if index.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"{name} must be 1-D, got {list(index.shape)}")
        if index.device != x.device:
            raise ValueError(f"{name} is on {index.device}, x on {x.device}")
    if ends.shape[0] != e:
        raise ValueError(f"ends must have one number for each of {e} experts, got {len(ends)}")
    if lora_A.dim() != 3:
        raise ValueError(f"lora_A must be 3-D, [experts, r, in], got {list(lora_A.shape)}")
    r = lora_A.shape[1]
    check_operand("bias", bias, (e, n), x, weight, r)
    check_operand("lora_A", lora_A, (e, r, k), x, weight, r)
    check_operand("lora_B", lora_B, (e, n, r), x, weight, r)
    check_operand("start_A", start_A, (e, r, k), x, weight, r)
    check_operand("start_B", start_B, (e, n, r), x, weight, r)
    check_together(x, weight, bias, dropout, seed, start_A, start_B)


define_kernel(
    "grouped_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor ends, Tensor? rows, "
    f"Tensor lora_A, Tensor lora_B, {_EXTRAS}) -> (Tensor y, Tensor z)",
    grouped_linear_forward_ref,
    grouped_linear_forward_fake,
)
define_kernel(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor ends, Tensor? rows, "
    f"Tensor lora_A, Tensor lora_B, Tensor z, {_EXTRAS}, bool[4] needs) "
    "-> (Tensor x, Tensor bias, Tensor lora_A, Tensor lora_B)",
    grouped_linear_backward_ref,
    grouped_linear_backward_fake,
)
define_composite(
    "grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor ends, Tensor? rows, "
    "Tensor lora_A, Tensor lora_B, float scaling, float dropout=0.0, Tensor? seed=None, "
    "Tensor? start_A=None, Tensor? start_B=None) -> Tensor",
    grouped_linear,
)
define_autocast("grouped_linear")
