from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops.dst_basis import dst_basis_ref, sin_pi

from ..support.oracle import dst_basis as oracle
from ..support.oracle import to_numpy

op = torch.ops.lora.dst_basis
SIZES = st.integers(1, 400)


@st.composite
def size_and_rank(draw):
    size = draw(SIZES)
    return size, draw(st.integers(1, size))


@given(size_and_rank())
def test_matches_scipy(device, sr):
    size, rank = sr
    got = to_numpy(op(size, rank, dtype=torch.float64, device=device))
    # SciPy's FFT itself is accurate to a few eps of the largest entry.
    assert np.abs(got - oracle(size, rank)).max() <= 8 * 2**-52


@pytest.mark.parametrize("size", [11008, 14336, 49152])
def test_large_sizes_keep_full_precision(size, device):
    """Against exact rational reduction and long double, at random places."""
    rng = np.random.default_rng(0)
    basis = to_numpy(op(size, 64, dtype=torch.float64, device=device))
    i, j = rng.integers(0, size, 500), rng.integers(0, 64, 500)
    reduced = ((i + 1) * (j + 1)) % (2 * (size + 1))
    want = np.sqrt(2 / (size + 1)) * np.sin(
        np.longdouble(reduced) * np.longdouble("3.14159265358979323846264") / (size + 1)
    )
    assert np.abs(basis[i, j] - want.astype(np.float64)).max() <= 4 * 2**-53 * 0.02


@given(size_and_rank(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_one_rounding_from_float64(device, sr, dtype):
    size, rank = sr
    wide = op(size, rank, dtype=torch.float64, device=device)
    assert torch.equal(op(size, rank, dtype=dtype, device=device), wide.to(dtype))


@given(size_and_rank(), st.data())
def test_kernel_has_the_bits_of_the_reference(device, sr, data):
    size, rank = sr
    offset = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - offset))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    scale = data.draw(st.sampled_from([None, 0.37]))
    if scale is not None:
        scale = torch.tensor(scale, dtype=torch.float64, device=device)
    want = torch.full((length, rank), math.nan, dtype=dtype, device=device)
    dst_basis_ref(want, size, offset, scale)
    where = {"device": device, "offset": offset, "length": length}
    got = op(size, rank, dtype=dtype, scale=scale, **where)
    assert torch.equal(got, want)
    transposed = torch.full((rank, length), math.nan, dtype=dtype, device=device)
    torch.ops.lora._dst_basis_(transposed.T, size, offset, scale)
    assert torch.equal(transposed.T, want)


@pytest.mark.parametrize(
    "size,rank", [pytest.param(64, 64, marks=pytest.mark.sanitize), (577, 16), (4096, 128)]
)
def test_orthonormal(size, rank, device):
    basis = op(size, rank, dtype=torch.float64, device=device)
    eye = torch.eye(rank, dtype=torch.float64, device=device)
    assert (basis.T @ basis - eye).abs().max() < 1e-13


def test_same_bits_on_every_device(device):
    for size, rank in ((97, 97), (4096, 64)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            here = op(size, rank, dtype=dtype, device=device).cpu()
            assert torch.equal(here, op(size, rank, dtype=dtype))


@pytest.mark.sanitize
def test_shards_are_slices(device):
    whole = op(1000, 8, device=device)
    assert torch.equal(op(1000, 8, offset=300, length=250, device=device), whole[300:550])
    assert torch.equal(op(1000, 8, offset=300, device=device), whole[300:])


def test_defaults_follow_torch(device):
    assert op(8, 2).dtype == torch.get_default_dtype()
    with torch.device(device):
        assert op(8, 2).device.type == device


def test_sin_pi_is_exact_at_the_zeros(device):
    n = 12
    values = sin_pi(torch.arange(0, 8 * n, n, device=device), n)
    assert (values == 0).all()


def test_opcheck(device):
    opcheck(op, (33, 5), {"device": device})
    opcheck(op, (33, 5), {"device": device, "offset": 3, "length": 7, "dtype": torch.bfloat16})


def test_compiles_and_runs_under_inference_mode(device):
    double = lambda: op(40, 6, device=device) * 2  # noqa: E731
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), double())
    with torch.inference_mode():
        assert op(40, 6, device=device).is_inference()


def test_meta():
    assert op(40, 6, device="meta").shape == (40, 6)


@pytest.mark.parametrize(
    "args,kwargs,error",
    [
        ((0, 1), {}, ValueError),
        ((2**63 - 1, 1), {"length": 1}, ValueError),
        ((2**30, 1), {"length": 1}, ValueError),
        ((4, 0), {}, ValueError),
        ((4, 5), {}, ValueError),
        ((4, 2), {"offset": 3, "length": 2}, ValueError),
        ((4, 2), {"offset": -1}, ValueError),
        ((4, 2), {"dtype": torch.int32}, TypeError),
        ((4, 2), {"scale": torch.ones(2)}, ValueError),
    ],
)
def test_bad_input(args, kwargs, error, device):
    with pytest.raises(error):
        op(*args, device=device, **kwargs)


def test_scale_on_another_device_is_refused():
    with pytest.raises(ValueError, match="scale is on cpu, the basis on meta"):
        torch.ops.lora.dst_basis(8, 2, device="meta", scale=torch.tensor(1.0))
