"""`lora_kernels.svd`: what it adds to the operators: methods, batches and the error estimate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import svd

from ...support.oracle import to_numpy
from ...support.packages import needs_real_model
from .spectra import SPECTRA, check_bottom, check_same_values, check_top

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
METHODS = ["randomized", "exact"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_both_methods(spectrum, dtype, method, device):
    weight = (SPECTRA[spectrum](60, 90) / 8).to(device, dtype)
    top = svd.truncated(weight, 7, method)
    assert isinstance(top, svd.TruncatedSVD) and top.error is None
    check_top(weight, 7, *top[:3], exact=method == "exact")
    check_bottom(weight, 7, *svd.minor(weight, 7, method)[:3])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [svd.truncated, svd.minor])
def test_batches(call, method, device):
    batch = torch.randn(3, 40, 30).to(device)
    for weights in (batch, list(batch), tuple(batch), batch.mT):
        together = call(weights, 5, method)
        assert together.error is None
        for k, weight in enumerate(weights):
            many, alone = [t[k] for t in together[:3]], call(weight, 5, method)[:3]
            if device == "cpu":
                assert all(map(torch.equal, many, alone))
            else:
                check = check_top if call is svd.truncated else check_bottom
                check(weight, 5, *many)
                check_same_values(weight, many[1], alone[1])
    single = call(batch[:1], 5, method)
    assert single.U.shape == (1, 40, 5) and single.S.shape == (1, 5)
    assert single.Vh.shape == (1, 5, 30)


@pytest.mark.parametrize("call", [svd.truncated, svd.minor])
def test_seed_and_operator(call, device):
    weight = torch.randn(300, 200).to(device)
    U, S, Vh, _ = call(weight, 8, seed=5)
    op = torch.ops.lora.randomized_svd if call is svd.truncated else torch.ops.lora.minor_svd
    for got, want in zip((U, S, Vh), op(weight, 8, seed=5), strict=True):
        assert torch.equal(got, want)


def test_tolerance(device):
    batch = torch.randn(2, 300, 260).to(device)
    result = svd.truncated(batch, 8, tol=1e-3)
    assert result.error.shape == (2,) and result.error.dtype == torch.float64
    assert (result.error <= 1e-3).all()
    one = svd.truncated(batch[0], 8, tol=1e-3)
    assert one.error.shape == () and one.error <= 1e-3
    if device == "cpu":  # a GPU's batch goes on until its last weight has settled
        assert torch.equal(one.error, result.error[0])
    sigma = np.linalg.svd(to_numpy(batch[0]), compute_uv=False)[:8]
    np.testing.assert_allclose(to_numpy(one.S), sigma, rtol=1e-3)
    assert svd.truncated(batch[0], 8, tol=1e-3, subspace=9).error >= 0
    assert svd.truncated(batch[0], 8, tol=0.0).error is None


def test_whole_subspace_is_exact(device):
    weight = torch.randn(150, 130).to(device)
    check_top(weight, 20, *svd.truncated(weight, 20, subspace=130)[:3], exact=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [svd.truncated, svd.minor])
def test_parameters_carry_no_gradient(call, method, device):
    weight = nn.Linear(12, 9).to(device).weight
    assert not any(t.requires_grad for t in call(weight, 3, method)[:3])


def test_integers_of_numpy(device):
    weight = torch.randn(20, 30).to(device)
    got = svd.truncated(weight, np.int64(4), subspace=np.int32(9), seed=np.int64(3))
    want = svd.truncated(weight, 4, subspace=9, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


@needs_real_model
def test_real_weights(real_model, device):
    block = real_model.model.layers[15]
    for linear in (block.self_attn.k_proj, block.mlp.down_proj):
        for dtype in (torch.float32, torch.bfloat16):
            weight = linear.weight.detach().to(device, dtype)
            check_top(weight, 16, *svd.truncated(weight, 16)[:3])
            check_bottom(weight, 16, *svd.minor(weight, 16)[:3])


@pytest.mark.parametrize("call", [svd.truncated, svd.minor])
@pytest.mark.parametrize(
    "make,r,method,error,match",
    [
        (lambda: torch.ones(4, 6), 2, "exac", ValueError, "unknown method.*did you mean 'exact'"),
        (lambda: torch.ones(4, 6), 2, "randomised", ValueError, "did you mean 'randomized'"),
        (lambda: torch.ones(4, 6), 2, "zzz", ValueError, "expected one of randomized, exact$"),
        (lambda: torch.ones(4, 6), 2.0, None, TypeError, "r must be an integer, got float"),
        (lambda: torch.ones(4, 6), True, None, TypeError, "r must be an integer, got bool"),
        (lambda: torch.ones(4, 6), 5, None, ValueError, "rank 5 is larger"),
        (lambda: torch.ones(4, 6), 0, None, ValueError, "at least 1"),
        (lambda: torch.ones(6), 1, None, ValueError, "2-D"),
        (lambda: torch.ones(1, 2, 4, 6), 1, None, ValueError, "2-D"),
        (lambda: torch.ones(0, 4, 6), 1, None, ValueError, "empty"),
        (lambda: torch.ones(2, 0, 6), 1, None, ValueError, r"weights\[0\] is empty"),
        (lambda: [], 1, None, ValueError, "empty"),
        (lambda: [torch.ones(4, 6), torch.ones(6, 4)], 1, None, ValueError, r"weights\[1\] has"),
        (lambda: [torch.ones(4, 6), 3], 1, None, TypeError, "list of tensors, got int"),
        (lambda: np.ones((4, 6)), 1, None, TypeError, "list of tensors, got ndarray"),
        (lambda: torch.full((2, 4, 6), math.nan), 1, None, ValueError, r"weights\[0\] holds NaN"),
        (lambda: torch.ones(4, 6, dtype=torch.int8), 1, None, TypeError, "int8"),
    ],
)
def test_bad_arguments(call, make, r, method, error, match, device):
    with torch.device(device):
        weight = make()
    for name in METHODS if method is None else [method]:
        with pytest.raises(error, match=match):
            call(weight, r, name)


@pytest.mark.parametrize(
    "options,error,match",
    [
        ({"tol": -1.0}, ValueError, "tol must not be negative"),
        ({"tol": math.nan}, ValueError, "tol must be finite"),
        ({"tol": math.inf}, ValueError, "tol must be finite"),
        ({"subspace": 1}, ValueError, r"subspace must be in .* = \[2, 4\], got 1"),
        ({"subspace": 5}, ValueError, r"subspace must be in .* got 5"),
        ({"subspace": 3.0}, TypeError, "subspace must be an integer"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"method": "exact", "tol": 0.1}, ValueError, "tol is an option of method='randomized'"),
        ({"method": "exact", "subspace": 3}, ValueError, "subspace is an option of"),
    ],
)
def test_bad_options(options, error, match, device):
    with pytest.raises(error, match=match):
        svd.truncated(torch.ones(4, 6, device=device), 2, **options)
