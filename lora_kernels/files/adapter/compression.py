"""Truncates an adapter to a smaller rank, with the smallest possible error."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..._utils.checks import as_integer
from ...layers.state import LayerState
from ...model.config import AdapterState


def truncated(state: AdapterState, r: int) -> tuple[AdapterState, dict[str, float], float]:
    """The best adapter of rank r for the original base, and its error.

    s(BA − B₀A₀), of twice the rank, is truncated to its r largest singular values. The SVD is that
    of the small core of two QRs, in float64: no [out, in] matrix is formed. s stays, √σ goes into
    both factors. A layer whose rank is r or less keeps its factors.

    Returns:
        The adapter, without a start to subtract and without R; ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of each
        layer; and the same over all layers. The error is 0 where ΔW is zero.

    """
    as_integer(r, "compress_to", minimum=1)
    layers, errors = {}, {}
    lost = total = 0.0
    for name, layer in state.layers.items():
        layers[name], missing, size = _truncated(layer, r)
        errors[name] = missing / size if size else 0.0
        lost += (layer.scaling * missing) ** 2
        total += (layer.scaling * size) ** 2
    error = math.sqrt(lost / total) if total else 0.0
    return replace(state, layers=layers), errors, error


@torch.no_grad()
def _truncated(layer: LayerState, r: int) -> tuple[LayerState, float, float]:
    """The layer, ‖·‖_F of the part of B'A' that was cut off, and ‖B'A'‖_F."""
    right, left = layer.update_factors()
    QB, RB = torch.linalg.qr(left.double())  # [out, k], [k, k]
    QA, RA = torch.linalg.qr(right.double().T)  # [in, k], [k, k]
    U, S, Vh = torch.linalg.svd(RB @ RA.T)
    size = float(S.norm())
    keep = min(r, right.shape[0])
    missing = 0.0
    if keep < right.shape[0]:
        root = S[:keep].sqrt()
        missing = float(S[keep:].norm())
        left = ((QB @ U[:, :keep]) * root).to(left.dtype)
        right = ((root[:, None] * Vh[:keep]) @ QA.T).to(right.dtype)
    state = LayerState(right, left, layer.scaling, layer.lora_alpha, weight_norm=layer.weight_norm)
    return state, missing, size
