from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops.svd.thin_qr import thin_qr_ref

from ...support.oracle import to_numpy
from ..compiled import needs_compiled
from ..strides import LAYOUTS, lay_out
from .spectra import SPECTRA, noise_of, quantum_of

op = torch.ops.lora.thin_qr
foreach = torch.ops.lora.thin_qr_foreach
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 30), (30, 1), (2, 2), (60, 60), (150, 40), (40, 150), (500, 300)]


def check_qr(weight: torch.Tensor, rank: int, Q, R) -> None:
    """Q is orthonormal, R = QᵀW begins with a triangle whose diagonal is not negative, and QR = W
    in the first columns: together, the truncated QR of W.
    """
    n, m = weight.shape
    factor = torch.float64 if weight.dtype == torch.float64 else torch.float32
    assert Q.shape == (n, rank) and R.shape == (rank, m)
    assert all(t.dtype == factor and t.is_contiguous() and not t.requires_grad for t in (Q, R))
    Q, R, W = to_numpy(Q), to_numpy(R), to_numpy(weight)
    noise = noise_of(weight)
    assert np.abs(Q.T @ Q - np.eye(rank)).max() <= noise
    assert (np.tril(R[:, :rank], -1) == 0).all() and (R.diagonal() >= 0).all()
    # Householder's error in a column is a few eps of that column.
    size = np.abs(W).max() or 1.0
    norms = np.linalg.norm(W / size, axis=0)
    tiny = 4 * quantum_of(weight) * n / size
    assert (
        np.abs(Q @ (R[:, :rank] / size) - W[:, :rank] / size) <= noise * norms[:rank] + tiny
    ).all()
    assert (np.abs(R / size - Q.T @ (W / size)) <= noise * norms + tiny).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_spectra(spectrum, shape, device):
    weight = SPECTRA[spectrum](*shape).to(device, torch.float32)
    for rank in sorted({1, min(*shape, 7), min(*shape, 64), min(shape)}):
        check_qr(weight, rank, *op(weight, rank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (64, 64)])
def test_is_the_full_qr_cut(dtype, shape, device):
    """Q[:, :r] and R[:r] of LAPACK's float64 QR, which are unique up to the sign of each row."""
    weight = torch.randn(*shape).to(device, dtype)
    want_Q, want_R = np.linalg.qr(to_numpy(weight))
    sign = np.sign(want_R.diagonal()[:16])
    Q, R = map(to_numpy, op(weight, 16))
    bound = 10 * noise_of(weight)  # the condition of 16 of 64 or more Gaussian columns is below 5
    assert np.abs(Q - want_Q[:, :16] * sign).max() <= bound
    assert np.abs(R - want_R[:16] * sign[:, None]).max() <= bound * np.abs(want_R).max()


@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.data(),
    st.sampled_from(sorted(SPECTRA)),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
)
def test_anything(device, n, m, data, spectrum, dtype, layout):
    rank = data.draw(st.integers(1, min(n, m)))
    weight = lay_out((SPECTRA[spectrum](n, m) / 8).to(device, dtype), layout)
    before = weight.clone()
    check_qr(weight, rank, *op(weight, rank))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-41])
def test_scales(scale, device):
    weight = torch.randn(90, 70, dtype=torch.float64).mul(scale).to(device, torch.float32)
    check_qr(weight, 9, *op(weight, 9))


def test_dependent_columns(device):
    """The first columns span less than r dimensions: Q is completed, and QR is still W."""
    weight = torch.randn(60, 40).to(device)
    weight[:, 1], weight[:, 2], weight[:, 5] = weight[:, 0], 0, 3 * weight[:, 4]
    check_qr(weight, 8, *op(weight, 8))


@needs_compiled("_thin_qr")
def test_bits_do_not_depend_on_threads():
    weight = torch.randn(900, 700)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = op(weight, 32)
        torch.set_num_threads(4)
        many = op(weight, 32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_foreach_is_each(dtype, device):
    weights = [(f(50, 70) / 8).to(device, dtype) for f in SPECTRA.values()]
    weights = [lay_out(w, LAYOUTS[k % len(LAYOUTS)]) for k, w in enumerate(weights)]
    Q, R = foreach(weights, 6)
    for k, weight in enumerate(weights):
        if device == "cpu":
            assert all(map(torch.equal, (Q[k], R[k]), op(weight, 6)))
        else:  # the library uses a different algorithm for a batch
            check_qr(weight, 6, Q[k], R[k])


def test_reference(device):
    weights = [f(60, 45).to(device, torch.float32) for f in SPECTRA.values()]
    Q, R = thin_qr_ref(weights, 9)
    for k, weight in enumerate(weights):
        check_qr(weight, 9, Q[k], R[k])


def test_opcheck(device):
    opcheck(op, (torch.randn(9, 7).to(device), 3))
    weights = [torch.randn(9, 7).to(device), torch.randn(7, 9).to(device).T]
    opcheck(foreach, (weights, 3))
    opcheck(torch.ops.lora._thin_qr, (weights, 3))


def test_compile(device):
    def product(weight):
        Q, R = op(weight * 1.0, 20)
        return Q @ R

    weight = torch.randn(20, 30).to(device)
    compiled = torch.compile(product, fullgraph=True)
    torch.testing.assert_close(compiled(weight), weight, rtol=1e-4, atol=1e-4)


def test_inference_mode(device):
    with torch.inference_mode():
        weight = torch.randn(20, 30).to(device)
        check_qr(weight, 4, *op(weight, 4))


def test_meta():
    Q, R = op(torch.empty(20, 30, device="meta", dtype=torch.float16), 4)
    assert Q.shape == (20, 4) and R.shape == (4, 30)
    assert Q.is_meta and Q.dtype == R.dtype == torch.float32


@pytest.mark.parametrize(
    "make,rank,error,match",
    [
        (lambda: torch.ones(4, 6), 0, ValueError, "at least 1"),
        (lambda: torch.ones(4, 6), 5, ValueError, r"rank 5 is larger than min\(n, m\) = 4"),
        (lambda: torch.ones(0, 6), 1, ValueError, "empty"),
        (lambda: torch.ones(6), 1, ValueError, "2-D"),
        (lambda: torch.ones(4, 6, dtype=torch.int8), 2, TypeError, "int8"),
        (lambda: torch.full((4, 6), math.nan), 2, ValueError, "weight holds NaN or Inf"),
    ],
)
def test_bad_arguments(make, rank, error, match, device):
    with torch.device(device):
        weight = make()
    with pytest.raises(error, match=match):
        op(weight, rank)
