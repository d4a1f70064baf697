from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops.svd.minor_svd import minor_svd_ref

from ...support.devices import rng_state
from ...support.oracle import to_numpy
from ..compiled import needs_compiled
from ..strides import LAYOUTS, lay_out
from .spectra import SPECTRA, check_bottom, check_same_values, with_sigma

op = torch.ops.lora.minor_svd
foreach = torch.ops.lora.minor_svd_foreach
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 30), (30, 1), (2, 2), (60, 60), (150, 40), (40, 150), (257, 130)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_spectra(spectrum, shape, device):
    weight = SPECTRA[spectrum](*shape).to(device, torch.float32)
    for rank in sorted({1, min(*shape, 7), min(shape)}):
        check_bottom(weight, rank, *op(weight, rank))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(spectrum, dtype, device):
    weight = (SPECTRA[spectrum](90, 70) / 8).to(device, dtype)
    for rank in (1, 16, 70):
        check_bottom(weight, rank, *op(weight, rank))


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
    torch.manual_seed(seed % 2**32)
    np.random.seed(seed % 2**32)
    rank = data.draw(st.integers(1, min(n, m)))
    weight = lay_out((SPECTRA[spectrum](n, m) / 8).to(device, dtype), layout)
    before = weight.clone()
    U, S, Vh = op(weight, rank, seed)
    assert torch.equal(weight, before)
    check_bottom(weight, rank, U, S, Vh)


@pytest.mark.parametrize("shape", [(500, 500), (700, 400), (400, 700)])
@pytest.mark.parametrize("spectrum", ["gaussian", "power_law", "outlier_row", "zero_blocks"])
def test_larger_than_its_subspace(spectrum, shape, device):
    """Large enough that iterating pays off."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = SPECTRA[spectrum](*shape).to(device, dtype)
        check_bottom(weight, 16, *op(weight, 16))


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-41])
def test_scales(scale, device):
    weight = torch.randn(90, 70, dtype=torch.float64).mul(scale).to(device, torch.float32)
    check_bottom(weight, 9, *op(weight, 9))


@pytest.mark.parametrize("shape", [(400, 400), (450, 300), (300, 450)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-41])
def test_singular_at_any_scale(shape, scale, device):
    """Where the inverse fails, the exact SVD that replaces it works at the same scale."""
    sigma = np.linspace(1, 0.01, min(shape))
    sigma[-5:] = 0
    weight = with_sigma(*shape, sigma * scale).to(device, torch.float32)
    check_bottom(weight, 16, *op(weight, 16))


@pytest.mark.parametrize("how", ["zero", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_that_are_zero_or_equal(how, dtype, device):
    """An exactly singular square weight, whose inverse maps all vectors to few directions."""
    weight = torch.randn(400, 400)
    weight[:, -7:] = 0 if how == "zero" else weight[:, :7]
    weight = weight.to(device, dtype)
    check_bottom(weight, 16, *op(weight, 16))


@pytest.mark.parametrize("shape", [(90, 70), (300, 300)])
def test_a_gap_fixes_the_space(shape, device):
    """The bottom 8 are a tenth of the next, which determines the projectors."""
    sigma = np.concatenate([np.linspace(2, 1, min(shape) - 8), np.linspace(0.1, 0.05, 8)])
    weight = with_sigma(*shape, sigma).to(device, torch.float32)
    left, _, right = np.linalg.svd(to_numpy(weight), full_matrices=False)
    U, _, Vh = map(to_numpy, op(weight, 8))
    assert np.abs(U @ U.T - left[:, -8:] @ left[:, -8:].T).max() <= 1e-3
    assert np.abs(Vh.T @ Vh - right[-8:].T @ right[-8:]).max() <= 1e-3


@pytest.mark.sanitize
def test_zero(device):
    weight = torch.zeros(33, 20, device=device)
    U, S, Vh = op(weight, 6)
    assert (S == 0).all()
    check_bottom(weight, 6, U, S, Vh)


def test_seed(device):
    weight = torch.randn(200, 200).to(device)
    state = rng_state(device)
    first, second = op(weight, 8, 5), op(weight, 8, 5)
    assert torch.equal(rng_state(device), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_compiled("_minor_svd")
def test_bits_do_not_depend_on_threads():
    weights = [torch.randn(200, 200), torch.randn(90, 300).bfloat16()]
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
@pytest.mark.parametrize("shape", [(50, 70), (190, 190)])
def test_foreach_is_each(dtype, shape, device):
    weights = [(f(*shape) / 8).to(device, dtype) for f in SPECTRA.values()]
    weights = [lay_out(w, LAYOUTS[k % len(LAYOUTS)]) for k, w in enumerate(weights)]
    together = foreach(weights, 6, 3)
    for k, weight in enumerate(weights):
        many, alone = [t[k] for t in together], op(weight, 6, 3)
        if device == "cpu":
            assert all(map(torch.equal, many, alone))
        else:
            check_bottom(weight, 6, *many)
            check_same_values(weight, many[1], alone[1])


def test_reference(device):
    weights = [f(60, 45).to(device, torch.float32) for f in SPECTRA.values()]
    U, S, Vh = minor_svd_ref(weights, 9, 0)
    for k, weight in enumerate(weights):
        check_bottom(weight, 9, U[k], S[k], Vh[k])


def test_opcheck(device):
    opcheck(op, (torch.randn(9, 7).to(device), 3))
    weights = [torch.randn(9, 7).to(device), torch.randn(7, 9).to(device).T]
    opcheck(foreach, (weights, 3))
    opcheck(torch.ops.lora._minor_svd, (weights, 3, 0))


def test_compile(device):
    def product(weight):
        U, S, Vh = op(weight * 1.0, 20)
        return U * S @ Vh

    weight = torch.randn(20, 30).to(device)
    compiled = torch.compile(product, fullgraph=True)
    torch.testing.assert_close(compiled(weight), weight, rtol=1e-4, atol=1e-4)


def test_inference_mode(device):
    with torch.inference_mode():
        weight = torch.randn(20, 30).to(device)
        check_bottom(weight, 4, *op(weight, 4))


def test_meta():
    U, S, Vh = op(torch.empty(20, 30, device="meta", dtype=torch.float64), 4)
    assert U.shape == (20, 4) and S.shape == (4,) and Vh.shape == (4, 30)
    assert U.is_meta and U.dtype == S.dtype == Vh.dtype == torch.float64


@pytest.mark.parametrize(
    "make,rank,error,match",
    [
        (lambda: torch.ones(4, 6), 0, ValueError, "at least 1"),
        (lambda: torch.ones(4, 6), 5, ValueError, r"rank 5 is larger than min\(n, m\) = 4"),
        (lambda: torch.ones(0, 6), 1, ValueError, "empty"),
        (lambda: torch.ones(6), 1, ValueError, "2-D"),
        (lambda: torch.ones(4, 6, dtype=torch.int8), 2, TypeError, "int8"),
        (lambda: torch.full((4, 6), math.nan), 2, ValueError, "weight holds NaN or Inf"),
        (lambda: torch.full((4, 6), math.inf), 2, ValueError, "weight holds NaN or Inf"),
    ],
)
def test_bad_arguments(make, rank, error, match, device):
    with torch.device(device):
        weight = make()
    with pytest.raises(error, match=match):
        op(weight, rank)


def test_one_bad_of_many(device):
    weights = [torch.ones(4, 6, device=device) for _ in range(3)]
    weights[2][3, 5] = math.nan
    with pytest.raises(ValueError, match=r"weights\[2\] holds NaN"):
        foreach(weights, 2)
    with pytest.raises(ValueError, match=r"weights\[1\] has shape"):
        foreach([weights[0], weights[1].T], 2)
