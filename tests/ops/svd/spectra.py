"""Spectra that are difficult for an SVD, and the error allowed for each.

Bounds are on well-determined quantities: singular values, the norm of the remainder, products and
projectors; never on vectors, which nearly equal singular values leave undetermined.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ...support.oracle import to_numpy


def with_sigma(n: int, m: int, sigma: np.ndarray) -> torch.Tensor:
    """float64 [n, m] with these singular values and random singular vectors."""
    k = min(n, m)
    left, right = (np.linalg.qr(np.random.randn(size, k))[0] for size in (n, m))
    return torch.from_numpy(left * np.asarray(sigma) @ right.T)


def _low_rank(n: int, m: int) -> torch.Tensor:
    k = max(1, min(n, m) // 4)
    return torch.randn(n, k, dtype=torch.float64) @ torch.randn(k, m, dtype=torch.float64)


def _zero_blocks(n: int, m: int) -> torch.Tensor:
    weight = torch.randn(n, m, dtype=torch.float64)
    weight[: n // 3] = 0
    weight[:, m // 2 : m // 2 + m // 4] = 0
    return weight


def _outlier(axis: int) -> Callable[[int, int], torch.Tensor]:
    def make(n: int, m: int) -> torch.Tensor:
        weight = torch.randn(n, m, dtype=torch.float64)
        weight.select(axis, weight.shape[axis] // 2).mul_(1e4)
        return weight

    return make


def _clustered(n: int, m: int) -> torch.Tensor:
    sigma = np.ones(min(n, m))
    sigma[: max(1, len(sigma) // 3)] = 3.0
    return with_sigma(n, m, sigma)


SPECTRA: dict[str, Callable[[int, int], torch.Tensor]] = {
    "gaussian": lambda n, m: torch.randn(n, m, dtype=torch.float64),
    "low_rank": _low_rank,
    "zero": lambda n, m: torch.zeros(n, m, dtype=torch.float64),
    "zero_blocks": _zero_blocks,
    "outlier_column": _outlier(1),
    "outlier_row": _outlier(0),
    "clustered": _clustered,
    "power_law": lambda n, m: with_sigma(n, m, (10.0 + np.arange(min(n, m))) ** -0.3),
    "identity": lambda n, m: torch.eye(n, m, dtype=torch.float64),
    "ones": lambda n, m: torch.ones(n, m, dtype=torch.float64),
}

# float32: a few eps of the dimensions met here, times √n. float64 is held to the same multiple.
_NOISE = {torch.float32: 1e-5, torch.float64: 1e-12}


def noise_of(weight: torch.Tensor) -> float:
    """The least achievable error of orthonormality, and of σ relative to the largest."""
    return _NOISE[torch.float64 if weight.dtype == torch.float64 else torch.float32]


def quantum_of(weight: torch.Tensor) -> float:
    """The smallest difference that the results' dtype can represent near zero."""
    return 2.0**-1074 if weight.dtype == torch.float64 else 2.0**-149


def check_form(weight: torch.Tensor, rank: int, U, S, Vh) -> tuple[np.ndarray, ...]:
    """Check shapes, dtype, orthonormal factors, S ≥ 0 and the sign; returns them in float64."""
    (n, m), noise = weight.shape, noise_of(weight)
    assert U.shape == (n, rank) and S.shape == (rank,) and Vh.shape == (rank, m)
    factor = torch.float64 if weight.dtype == torch.float64 else torch.float32
    assert all(t.dtype == factor and t.device == weight.device for t in (U, S, Vh))
    assert all(t.is_contiguous() and not t.requires_grad for t in (U, S, Vh))
    U, S, Vh = map(to_numpy, (U, S, Vh))
    assert np.abs(U.T @ U - np.eye(rank)).max() <= noise
    assert np.abs(Vh @ Vh.T - np.eye(rank)).max() <= noise
    assert (S >= 0).all()
    pivots = U[np.abs(U).argmax(0), np.arange(rank)]  # argmax: the first of equals
    assert (pivots > 0).all()
    return U, S, Vh


def check_top(weight: torch.Tensor, rank: int, U, S, Vh, *, exact: bool = False) -> None:
    """The `rank` largest triplets.

    At least the accuracy of `torch.svd_lowrank(niter=16)` on slowly decaying spectra: the remainder
    of W within 1e-3 of the smallest possible and each σ within 5 %; with `exact`, to rounding.
    """
    U, S, Vh = check_form(weight, rank, U, S, Vh)
    W = to_numpy(weight)
    size = np.abs(W).max() or 1.0  # LAPACK's own float64 must not underflow
    sigma = np.linalg.svd(W / size, compute_uv=False)
    S, tiny = S / size, 4 * quantum_of(weight) * max(W.shape) / size
    noise = noise_of(weight) * sigma[0] + tiny
    assert (np.diff(S) <= 0).all()
    slack = 0.0 if exact else 0.05
    assert (np.abs(S - sigma[:rank]) <= slack * sigma[:rank] + noise).all()
    left = np.linalg.norm(W / size - U * S @ Vh)
    least = np.linalg.norm(sigma[rank:])
    assert left <= (1.0 if exact else 1.001) * least + noise * rank**0.5


def check_bottom(weight: torch.Tensor, rank: int, U, S, Vh) -> None:
    """The `rank` smallest triplets: σ to 1e-4 of themselves and to rounding of the largest; WᵀU =
    VS and WV = US to 1e-3 of the largest (measured: 3e-4 at κ = 5e4).
    """
    U, S, Vh = check_form(weight, rank, U, S, Vh)
    W = to_numpy(weight)
    size = np.abs(W).max() or 1.0
    sigma = np.linalg.svd(W / size, compute_uv=False)
    S, tiny = S / size, 4 * quantum_of(weight) * max(W.shape) / size
    assert (np.diff(S) >= 0).all()
    least = sigma[::-1][:rank]
    assert (np.abs(S - least) <= 1e-4 * least + noise_of(weight) * sigma[0] + tiny).all()
    bound = (1e-9 if weight.dtype == torch.float64 else 1e-3) * sigma[0] + tiny
    assert np.abs(W.T / size @ U - Vh.T * S).max() <= bound
    assert np.abs(W / size @ Vh.T - U * S).max() <= bound


def check_same_values(weight: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Singular values of the same weight, by the same method with different roundings: a GPU uses
    other library algorithms for a batch. The engines of the CPU and of GPUs (run on a CPU),
    which share no kernel, differ by 1.2e-6 of the largest in float32 and by 1.3e-15 in float64.
    """
    largest = float(torch.linalg.matrix_norm(weight.double(), 2))
    assert (one.double() - other.double()).abs().max() <= noise_of(weight) * largest
