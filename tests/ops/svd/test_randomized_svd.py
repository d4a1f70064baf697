from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops.svd.randomized_svd import randomized_svd_ref

from ...support.devices import rng_state
from ...support.exhaustive import thinned
from ...support.oracle import to_numpy
from ..compiled import needs_compiled
from ..strides import LAYOUTS, lay_out
from .spectra import SPECTRA, check_same_values, check_top, with_sigma

op = torch.ops.lora.randomized_svd
foreach = torch.ops.lora.randomized_svd_foreach
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 30), (30, 1), (2, 2), (60, 60), (150, 40), (40, 150), (257, 130)]


def ranks(n: int, m: int) -> list[int]:
    return sorted({1, min(n, m, 7), min(n, m)})


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_spectra(spectrum, shape, device):
    weight = SPECTRA[spectrum](*shape).to(device, torch.float32)
    for rank in ranks(*shape):
        check_top(weight, rank, *op(weight, rank))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(spectrum, dtype, device):
    weight = (SPECTRA[spectrum](90, 70) / 8).to(device, dtype)
    for rank in (1, 16, 70):
        check_top(weight, rank, *op(weight, rank))


@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.data(),
    st.sampled_from(sorted(SPECTRA)),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**62),
)
def test_anything(device, n, m, data, spectrum, dtype, layout, seed):
    seeded(seed % 2**32)
    rank = data.draw(st.integers(1, min(n, m)))
    subspace = data.draw(st.none() | st.integers(rank, min(n, m)))
    weight = lay_out((SPECTRA[spectrum](n, m) / 8).to(device, dtype), layout)
    before = weight.clone()
    U, S, Vh = op(weight, rank, subspace, seed)
    assert torch.equal(weight, before)
    if subspace is None or subspace == min(n, m):
        check_top(weight, rank, U, S, Vh, exact=subspace is not None)
    else:  # as good as that space allows, and never better than the optimum
        W, P = to_numpy(weight), to_numpy(U) * to_numpy(S) @ to_numpy(Vh)
        assert np.linalg.norm(W - P) <= (1 + 1e-5) * np.linalg.norm(W)


@pytest.mark.parametrize("spectrum", ["gaussian", "power_law", "outlier_column", "low_rank"])
@pytest.mark.parametrize("rank", [16, 64])
def test_larger_than_its_subspace(spectrum, rank, device):
    """Large enough that iterating pays off."""
    weight = SPECTRA[spectrum](700, 520).to(device, torch.float32)
    check_top(weight, rank, *op(weight, rank))
    wide = weight.T.to(torch.bfloat16)
    check_top(wide, rank, *op(wide, rank))


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-41])
@pytest.mark.parametrize("shape", [(90, 70), (400, 300)])
def test_scales(scale, shape, device):
    """Squares of entries over- and underflow float32; 1e-41 is in its denormals."""
    weight = torch.randn(*shape, dtype=torch.float64).mul(scale).to(device, torch.float32)
    check_top(weight, 9, *op(weight, 9))
    assert (op(weight, 9)[1] > 0).all()


@pytest.mark.parametrize("shape", [(50, 40), (400, 300)])
def test_float64_beyond_the_squares(shape, device):
    for scale in (1e200, 1e-200, 1e-300):
        weight = torch.randn(*shape, dtype=torch.float64).mul(scale).to(device)
        check_top(weight, 5, *op(weight, 5))


@pytest.mark.parametrize("scale", [1e-36, 1e-38, 1e-40])
def test_bfloat16_near_its_subnormals(scale, device):
    """Large enough for bfloat16 products, which flush subnormal numbers to zero."""
    weight = torch.randn(800, 700, dtype=torch.float64).mul(scale).to(device, torch.bfloat16)
    check_top(weight, 9, *op(weight, 9))


@pytest.mark.parametrize("what", [(3, slice(None)), (slice(None), 3), (3, 5)])
def test_float64_beside_one_that_is_1e8_as_large(what, device):
    """The values below it are 1e8 eps of it, and as accurate as LAPACK's."""
    weight = torch.randn(400, 300, dtype=torch.float64)
    weight[what] *= 1e8
    sigma = np.linalg.svd(to_numpy(weight), compute_uv=False)[:16]
    weight = weight.to(device)
    U, S, Vh = op(weight, 16)
    check_top(weight, 16, U, S, Vh)
    assert (np.abs(to_numpy(S) - sigma) <= 0.05 * sigma).all()


@pytest.mark.parametrize("rank", thinned([2, 1, 5]))
def test_equal_columns(rank, device):
    """Rank one: LAPACK in float32 fails on some of these matrices, with repeated values."""
    for _ in range(20):
        weight = torch.randn(700, 1).to(device).expand(700, 760)
        check_top(weight, rank, *op(weight, rank))


@pytest.mark.parametrize("spectrum", ["zero", "zero_blocks", "low_rank", "ones", "identity"])
def test_float64_where_the_space_is_soon_exhausted(spectrum, device):
    """After the first few blocks, a further one adds only noise, or nothing."""
    weight = SPECTRA[spectrum](400, 300).to(device)
    check_top(weight, 16, *op(weight, 16))
    check_top(weight, 16, *op(weight, 16, 190))


def test_float64_with_a_steep_spectrum(device):
    """Down to 3e-12 of the largest: LAPACK's values are off by less than 14 eps of that.

    cuSOLVER finds them by Jacobi rotations: up to 15 sweeps of 199 per column (two thirds of 300
    dimensions), whose roundings add up like a random walk to √(15 · 199) = 55 eps; three times
    that.
    """
    sigma = 10.0 ** (-np.arange(300) / 2)
    weight = with_sigma(400, 300, sigma).to(device)
    S = to_numpy(op(weight, 24)[1])
    rounding = 165 * np.finfo(float).eps if device == "cuda" else 0.0
    assert (np.abs(S - sigma[:24]) <= 1e-3 * sigma[:24] + rounding).all()


@pytest.mark.parametrize("shape", [(90, 70), (300, 500)])
def test_a_gap_fixes_the_space(shape, device):
    """σ_8 = 100 σ_9, which determines the projectors, to rounding / gap."""
    sigma = np.concatenate([np.linspace(2, 1, 8), 0.01 * np.ones(min(shape) - 8)])
    weight = with_sigma(*shape, sigma).to(device, torch.float32)
    left, _, right = np.linalg.svd(to_numpy(weight), full_matrices=False)
    U, S, Vh = map(to_numpy, op(weight, 8))
    assert np.abs(U @ U.T - left[:, :8] @ left[:, :8].T).max() <= 1e-4
    assert np.abs(Vh.T @ Vh - right[:8].T @ right[:8]).max() <= 1e-4
    best = left[:, :8] * np.linalg.svd(to_numpy(weight), compute_uv=False)[:8] @ right[:8]
    assert np.linalg.norm(U * S @ Vh - best) <= 1e-4 * np.linalg.norm(best)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(33, 20), (20, 33)])
def test_zero(shape, device):
    U, S, Vh = op(torch.zeros(*shape, device=device), 6)
    assert (S == 0).all()
    check_top(torch.zeros(*shape, device=device), 6, U, S, Vh)


def test_seed(device):
    weight = torch.randn(300, 200).to(device)
    state = rng_state(device)
    first, second = op(weight, 8, None, 5), op(weight, 8, None, 5)
    assert torch.equal(rng_state(device), state)
    torch.manual_seed(99)
    third = op(weight, 8, None, 5)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for seed in (-(2**63), -1, 2**63 - 1):
        check_top(weight, 8, *op(weight, 8, None, seed))


@needs_compiled("_randomized_svd")
def test_bits_do_not_depend_on_threads():
    weights = [torch.randn(n, m).to(d) for n, m, d in [(300, 200, DTYPES[1]), (90, 400, DTYPES[2])]]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [op(w, 8) for w in weights]
        torch.set_num_threads(4)
        many = [op(w, 8) for w in weights]
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, many, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50, 70), (260, 190)])
def test_foreach_is_each(dtype, shape, device):
    """On a CPU with the same bits: the other weights of the call change nothing."""
    weights = [(f(*shape) / 8).to(device, dtype) for f in SPECTRA.values()]
    weights = [lay_out(w, LAYOUTS[k % len(LAYOUTS)]) for k, w in enumerate(weights)]
    U, S, Vh, error = foreach(weights, 6, None, 3)
    assert error.dtype == torch.float64 and error.shape == (len(weights),) and error.isnan().all()
    for k, weight in enumerate(weights):
        together, alone = (U[k], S[k], Vh[k]), op(weight, 6, None, 3)
        if device == "cpu":
            assert all(map(torch.equal, together, alone))
        else:
            check_top(weight, 6, *together)
            check_same_values(weight, together[1], alone[1])


@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_tolerance(tol, device):
    """The estimate is at least the error of σ, and below tol if the space could grow to the end."""
    weights = [SPECTRA[s](300, 260).to(device, torch.float32) for s in ("gaussian", "power_law")]
    _, S, _, error = foreach(weights, 8, None, 0, tol)
    assert ((error >= 0) & (error <= tol)).all()
    for k, weight in enumerate(weights):
        sigma = np.linalg.svd(to_numpy(weight), compute_uv=False)[:8]
        assert (np.abs(to_numpy(S[k]) - sigma) <= max(tol, 1e-5) * sigma).all()
    _, S, _, error = foreach(weights, 8, 8, 0, tol)  # so small a space may not reach it
    assert (error >= 0).all() and S.shape == (2, 8)


def steep(n: int, m: int) -> torch.Tensor:
    return with_sigma(n, m, 10.0 ** (-np.arange(min(n, m)) / 4))


def two_clusters(n: int, m: int) -> torch.Tensor:
    """Hundreds of equal values, and hundreds that are 1 % smaller."""
    k = min(n, m)
    sigma = np.where(np.arange(k) < k // 3, 1.0, np.where(np.arange(k) < 2 * k // 3, 0.99, 0.1))
    return with_sigma(n, m, sigma)


def haar(n: int, m: int) -> torch.Tensor:
    return with_sigma(n, m, np.ones(min(n, m)))


def gap_at_the_rank(n: int, m: int) -> torch.Tensor:
    k = np.arange(min(n, m))
    return with_sigma(n, m, np.where(k < 16, 1.0, 0.999) * 0.9995**k)


TRICKY = {"steep": steep, "two_clusters": two_clusters, "haar": haar, "gap": gap_at_the_rank}


def check_error(weight: torch.Tensor, rank: int, tol: float, subspace=None, seed=0) -> None:
    """The estimate is at least the error of σ, and at most tol if the space could grow."""
    _, S, _, error = foreach([weight], rank, subspace, seed, tol)
    W = to_numpy(weight)
    size = np.abs(W).max() or 1.0  # LAPACK's own float64 must not underflow
    sigma = np.linalg.svd(W / size, compute_uv=False)[:rank]
    scale = np.maximum(sigma, 1e-7 * sigma[0])
    off = np.abs(to_numpy(S[0]) / size - sigma) / np.where(scale > 0, scale, 1)
    lapack = 1e-14 * sigma[0] / scale.min() if sigma[0] > 0 else 0.0
    assert off.max() <= error.item() + lapack < math.inf
    if subspace is None:
        rounding = 3e-13 if weight.dtype == torch.float64 else 2e-7
        relative = sigma[0] / scale.min() if sigma[0] > 0 else 1.0
        assert error.item() <= max(tol, rounding * relative)


UNDERSTATED = product(
    ["gaussian", "clustered", "power_law", "steep"],
    [torch.float64, torch.float32, torch.bfloat16],
    [1e-1, 1e-3, 1e-5, 1e-7, 1e-9],
)


@pytest.mark.parametrize(("spectrum", "dtype", "tol"), thinned(UNDERSTATED, 7))
def test_the_error_is_not_understated(spectrum, dtype, tol, device):
    """Relative to each σ, or 1e-7 of the largest; weights are large enough for bfloat16."""
    weight = (SPECTRA | TRICKY)[spectrum](900, 700)
    check_error(weight.to(device, dtype), 16, tol)


SMALLER = product(
    sorted(SPECTRA | TRICKY), [torch.float32, torch.bfloat16, torch.float16], [3e-2, 1e-4]
)


@pytest.mark.parametrize(("spectrum", "dtype", "tol"), thinned(SMALLER, 5))
def test_the_error_of_smaller_weights(spectrum, dtype, tol, device):
    for shape, rank, seed in (((300, 260), 1, 1), ((180, 420), 24, -5)):
        weight = (SPECTRA | TRICKY)[spectrum](*shape).to(device, dtype)
        check_error(weight, rank, tol, seed=seed)
        check_error(weight, rank, tol, rank + 40, seed)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-36])
def test_the_error_at_any_scale(scale, device):
    weight = SPECTRA["power_law"](400, 300).mul(scale).to(device, torch.float32)
    check_error(weight, 9, 1e-3)


def test_the_error_holds_for_any_seed(device):
    """With some of the seeds, a space that missed a value would show."""
    weight = SPECTRA["gaussian"](260, 240).to(device, torch.float32)
    sigma = np.linalg.svd(to_numpy(weight), compute_uv=False)[:4]
    for seed in range(40):
        _, S, _, error = foreach([weight], 4, None, seed, 0.05)
        assert (np.abs(to_numpy(S[0]) - sigma) <= error.item() * sigma).all()
        assert error.item() <= 0.05


def test_reference(device):
    weights = [f(60, 45).to(device, torch.float32) for f in SPECTRA.values()]
    for tol, want in ((0.0, math.nan), (0.1, 0.0)):
        U, S, Vh, error = randomized_svd_ref(weights, 9, 0, 0, tol)
        for k, weight in enumerate(weights):
            check_top(weight, 9, U[k], S[k], Vh[k], exact=True)
            assert error[k] == want or (math.isnan(want) and math.isnan(error[k]))


def test_opcheck(device):
    opcheck(op, (torch.randn(9, 7).to(device), 3))
    opcheck(op, (torch.randn(9, 7).to(device).requires_grad_(), 3, 5, 1))
    weights = [torch.randn(9, 7).to(device), torch.randn(7, 9).to(device).T]
    # With a tolerance: otherwise the error is NaN, which opcheck finds unequal to itself.
    opcheck(foreach, (weights, 3, None, 0, 0.1))
    opcheck(torch.ops.lora._randomized_svd, (weights, 3, 5, 0, 0.1))


def test_carries_no_gradient(device):
    weight = torch.randn(9, 7).to(device).requires_grad_()
    assert not any(t.requires_grad for t in op(weight, 3))
    assert not any(t.requires_grad for t in foreach([weight], 3))


def test_compile(device):
    def product(weight):
        U, S, Vh = op(weight * 1.0, 20)
        return U * S @ Vh

    weight = torch.randn(20, 30).to(device)
    compiled = torch.compile(product, fullgraph=True)
    torch.testing.assert_close(compiled(weight), weight, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="NaN or Inf"):
        compiled(torch.full((20, 30), math.nan, device=device))


def test_inference_mode(device):
    with torch.inference_mode():
        weight = torch.randn(20, 30).to(device)
        check_top(weight, 4, *op(weight, 4))


def test_meta():
    U, S, Vh = op(torch.empty(20, 30, device="meta", dtype=torch.bfloat16), 4)
    assert U.shape == (20, 4) and S.shape == (4,) and Vh.shape == (4, 30)
    assert U.is_meta and U.dtype == S.dtype == Vh.dtype == torch.float32
    with pytest.raises(ValueError, match="rank 21"):
        op(torch.empty(20, 30, device="meta"), 21)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(bad, dtype, device):
    good, broken = (torch.randn(30, 20).to(device, dtype) for _ in range(2))
    broken[29, 19] = bad
    with pytest.raises(ValueError, match="weight holds NaN or Inf"):
        op(broken, 3)
    with pytest.raises(ValueError, match=r"weights\[1\] holds NaN or Inf"):
        foreach([good, broken], 3)


def test_singular_values_that_would_overflow(device):
    with pytest.raises(ValueError, match=r"norm of weight overflows torch.float32.*power of two"):
        op(torch.full((40, 30), 3e38, device=device), 2)


@pytest.mark.parametrize(
    "make,args,error,match",
    [
        (lambda: torch.ones(4, 6), (0,), ValueError, "at least 1"),
        (lambda: torch.ones(4, 6), (5,), ValueError, r"rank 5 is larger than min\(n, m\) = 4"),
        (lambda: torch.ones(0, 6), (1,), ValueError, r"empty, shape \[0, 6\]"),
        (lambda: torch.ones(4, 0), (1,), ValueError, r"empty, shape \[4, 0\]"),
        (lambda: torch.ones(6), (1,), ValueError, "2-D"),
        (lambda: torch.ones(2, 4, 6), (1,), ValueError, "2-D"),
        (lambda: torch.ones(4, 6, dtype=torch.int8), (2,), TypeError, "int8"),
        (lambda: torch.ones(4, 6, dtype=torch.complex64), (2,), TypeError, "complex64"),
        (lambda: torch.ones(4, 6).to_sparse(), (2,), ValueError, "dense"),
        (lambda: torch.ones(4, 6), (3, 2), ValueError, r"subspace must be in .* = \[3, 4\], got 2"),
        (lambda: torch.ones(4, 6), (3, 5), ValueError, r"subspace must be in .* got 5"),
        (lambda: torch.ones(4, 6), (3, 0), ValueError, r"subspace must be in .* got 0"),
    ],
)
def test_bad_arguments(make, args, error, match, device):
    with torch.device(device):
        weight = make()
    with pytest.raises(error, match=match):
        op(weight, *args)


@pytest.mark.parametrize(
    "second,match",
    [
        (lambda: torch.ones(6, 4), r"weights\[1\] has shape \[6, 4\], weights\[0\] has \[4, 6\]"),
        (lambda: torch.ones(4, 6).half(), r"weights\[1\] has dtype torch.float16.*per dtype"),
        (lambda: torch.ones(4, 6, device="meta"), r"weights\[1\] is on meta"),
    ],
)
def test_weights_that_are_unlike(second, match, device):
    with pytest.raises(ValueError, match=match):
        foreach([torch.ones(4, 6, device=device), second()], 2)


def test_no_weight():
    with pytest.raises(ValueError, match="empty"):
        foreach([], 2)


@pytest.mark.parametrize("tol", [-1e-3, math.nan, math.inf])
def test_bad_tolerance(tol, device):
    with pytest.raises(ValueError, match="tol must"):
        foreach([torch.ones(4, 6, device=device)], 2, None, 0, tol)
