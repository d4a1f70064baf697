"""Float64 NumPy/SciPy oracles, written from the papers' formulas and not from the code."""

from __future__ import annotations

import numpy as np
import torch
from scipy.fft import dst

ROUNDING = {  # largest relative error of one rounding
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TINY = {  # largest absolute error of one rounding among subnormals
    torch.float64: 2.0**-1075,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def dst_basis(size: int, rank: int) -> np.ndarray:
    """The first `rank` columns of the orthonormal DST-I of `size`, computed by SciPy."""
    if size == 1:
        return np.ones((1, 1))[:, :rank]
    return dst(np.eye(size, rank), type=1, norm="ortho", axis=0)


def loram_beta(weight: np.ndarray, rank: int) -> float:
    """β = (Q[r] ν[W] / ν[ΦₙΦₘᵀ])^(1/4) as in the paper, with ν of the formed product."""
    n, m = weight.shape
    full = min(n, m)
    gain = 1.0 if full <= 2 else np.log(max(rank, 2)) / np.log(full)
    product = dst_basis(n, rank) @ dst_basis(m, rank).T
    return float((gain * np.mean(weight**2) / np.mean(product**2)) ** 0.25)


def assert_close(
    got: np.ndarray, want: np.ndarray, size: np.ndarray, ratio: float, dtype: torch.dtype
) -> None:
    """Asserts ‖got − want‖ ≤ ratio · ‖size‖, and that no entry is off by more than 64 eps of the
    largest size; both plus 64 subnormal roundings per entry.
    """
    assert got.shape == want.shape == size.shape
    assert np.isfinite(got).all()
    error, tiny = np.abs(got - want), 64 * TINY[dtype]
    assert np.linalg.norm(error) <= ratio * np.linalg.norm(size) + tiny * size.size**0.5
    assert error.max() <= 64 * ROUNDING[dtype] * size.max() + tiny
