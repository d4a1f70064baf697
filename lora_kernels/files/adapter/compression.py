"""An adapter of a smaller rank that changes the base as nearly the same as that rank can."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..._utils.checks import as_integer
from ...layers.state import LayerState
from ...model.config import AdapterState


def recompressed(state: AdapterState, r: int) -> tuple[AdapterState, dict[str, float], float]:
    """The best adapter of rank r for the original base, and what it lacks.

    s(BA − B₀A₀), of rank 2r, is cut to its r largest singular values. The SVD is that of the small
    core of two QRs, in float64: no [out, in] matrix is formed. s stays, √σ goes into both factors.
    A layer whose rank is r or less keeps its factors.

    Returns:
        The adapter, which has no start to take out and no R; ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of each layer;
        and the same over all layers. 0 where ΔW is zero.

    """
    if as_integer(r, "compress_to") < 1:
        raise ValueError(f"compress_to must be at least 1, got {r}")
    layers, errors = {}, {}
    lost = total = 0.0
    for name, layer in state.layers.items():
        layers[name], missing, size = _cut(layer, r)
        errors[name] = missing / size if size else 0.0
        lost += (layer.scaling * missing) ** 2
        total += (layer.scaling * size) ** 2
    error = math.sqrt(lost / total) if total else 0.0
    return replace(state, layers=layers), errors, error


@torch.no_grad()
def _cut(layer: LayerState, r: int) -> tuple[LayerState, float, float]:
    """The layer, ‖·‖_F of what was cut off B'A', and ‖B'A'‖_F."""
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
    cut = LayerState(right, left, layer.scaling, layer.lora_alpha, weight_norm=layer.weight_norm)
    return cut, missing, size
