"""Adapters of a smaller rank or in 16 bits, and the error of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..._utils.checks import FLOATS, as_integer
from ...layers.state import LayerState, svd_factors
from ...model.config import AdapterState
from .peft_format.magnitudes import is_magnitude


def truncated(state: AdapterState, r: int) -> AdapterState:
    """The best adapter of rank r for the original base, which has no start to subtract and no R.

    s(BA − B₀A₀), of twice the rank, is truncated to its r largest singular values, and s becomes 1.
    Magnitudes do not change: the rows of the adapted weight keep their norms for every r. A layer
    whose rank is r or less keeps its factors.
    """
    as_integer(r, "compress_to", minimum=1)
    layers = {name: _truncated(layer, r) for name, layer in state.layers.items()}
    return replace(state, layers=layers)


@torch.no_grad()
def _truncated(layer: LayerState, r: int) -> LayerState:
    right, left = layer.portable_factors()
    if r < right.shape[-2]:
        right, left = svd_factors(right, left, r)
    return LayerState(
        right,
        left,
        1.0,
        right.shape[-2],
        weight_norm=layer.weight_norm,
        lora_bias=layer.portable_bias(),
        embedding=layer.embedding,
        kernel=layer.kernel,
        groups=layer.groups,
        lora_magnitude=layer.lora_magnitude,
    )


@torch.no_grad()
def product_norm(right: Tensor, left: Tensor) -> float:
    """‖B'A'‖_F in float64, of A' [..., k, in] and B' [..., out, k], whose parts may cancel.

    The norm is computed from QR decompositions of the factors: no matrix [out, in] is formed.
    """
    return float((_triangle(left.double()) @ _triangle(right.double().mT).mT).norm())


def _triangle(matrix: Tensor) -> Tensor:
    """R of the QR decomposition of [..., n, k]; the matrix itself if it is not taller than wide."""
    if matrix.shape[-2] <= matrix.shape[-1]:
        return matrix
    return torch.linalg.qr(matrix, mode="r").R


@torch.no_grad()
def update_errors(
    state: AdapterState, written: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], float]:
    """‖ΔW − B'A'‖_F / ‖ΔW‖_F of each layer, where `written` has A' and B', and the same ratio over
    all layers; the ratio is 0 where ΔW is zero. With magnitudes, ΔW is V − W_base, the change of
    the direction.
    """
    errors, lost, total = {}, 0.0, 0.0
    for name, (right, left) in written.items():
        A, B = state.layers[name].portable_factors()
        size, r = product_norm(A, B), A.shape[-2]
        # The remaining rows and columns are zeros.
        if torch.equal(right[..., :r, :], A) and torch.equal(left[..., :r], B):
            missing = 0.0
        else:
            missing = product_norm(
                torch.cat([A.double(), right.double()], -2),
                torch.cat([B.double(), -left.double()], -1),
            )
        errors[name] = missing / size if size else 0.0
        lost, total = lost + missing**2, total + size**2
    return errors, (lost / total) ** 0.5 if total else 0.0


def balanced(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A' and B' of these layers, rescaled so that the entries of each row of A' are as large as
    those of the matching column of B'. The scales are powers of two, so that the product keeps
    its bits. Without this, small updates would have entries that float16 cannot hold.
    """
    found = {}
    for name, (right, left) in factors.items():
        sizes = [f.double().norm(dim=d) / f.shape[d] ** 0.5 for f, d in ((right, -1), (left, -2))]
        powers = (0.5 * torch.log2(sizes[1] / sizes[0])).round().nan_to_num(0.0, 0.0, 0.0)
        scale = torch.exp2(powers).to(right.dtype)
        found[name] = right * scale[..., None], left / scale[..., None, :]
    return found


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The tensors in this dtype; the same mapping if all tensors have it already. Magnitudes are
    kept in float32 or wider: their rounding error is relative to the whole weight, not to its
    update.

    Raises:
        ValueError: a number is too large for the dtype.

    """
    dtypes = {
        name: torch.promote_types(dtype, torch.float32) if is_magnitude(name) else dtype
        for name, tensor in tensors.items()
        if tensor.dtype in FLOATS
    }
    wider = {name for name, wanted in dtypes.items() if tensors[name].dtype != wanted}
    if not wider:
        return tensors
    new = {n: t.to(dtypes[n]) if n in wider else t for n, t in tensors.items()}
    for name in wider:
        if not bool(new[name].isfinite().all()):
            raise ValueError(
                f"{name!r} has numbers up to {float(tensors[name].abs().max()):.3g}, too large for "
                f"{str(dtype).removeprefix('torch.')}: "
                + ("use dtype='bfloat16'" if dtype == torch.float16 else "leave out dtype")
            )
    return new
