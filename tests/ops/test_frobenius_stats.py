from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops.frobenius_stats import frobenius_stats_ref

from ..support.oracle import to_numpy
from .strides import LAYOUTS, lay_out

op = torch.ops.lora.frobenius_stats
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
weight_spec = st.tuples(
    st.integers(0, 300), st.integers(0, 300), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)
)


def oracle(weights) -> np.ndarray:
    return np.array([[to_numpy(w).sum(), (to_numpy(w) ** 2).sum()] for w in weights])


def check(got: torch.Tensor, weights) -> None:
    want = oracle(weights).reshape(-1, 2)
    assert got.dtype == torch.float64 and got.shape == want.shape
    # Float64 sums of N terms: N eps of the sum of magnitudes is the worst case, sqrt(N) usual.
    for row, exact, w in zip(to_numpy(got), want, weights, strict=True):
        magnitude = np.abs(to_numpy(w)).sum()
        assert abs(row[0] - exact[0]) <= 1e-13 * magnitude
        assert abs(row[1] - exact[1]) <= 1e-13 * exact[1]


@given(st.lists(weight_spec, max_size=4), st.integers(0, 2**16))
def test_matches_float64(device, specs, seed):
    torch.manual_seed(seed)
    weights = [
        lay_out(torch.randn(n, m).to(device, dtype), layout) for n, m, dtype, layout in specs
    ]
    check(op(weights), weights)
    if weights:
        check(frobenius_stats_ref(weights), weights)


def test_large_and_mixed(device):
    weights = [
        lay_out(torch.randn(n, m).to(device, dtype), layout)
        for (n, m), dtype, layout in zip(
            [(1030, 517), (3, 70001), (70001, 3), (512, 512)],
            DTYPES,
            ["contiguous", "transposed", "row_slice", "both_strided"],
            strict=True,
        )
    ]
    check(op(weights), weights)


@pytest.mark.sanitize
def test_float32_range_does_not_overflow(device):
    weight = torch.full((8, 8), 3e38, device=device)
    assert op([weight])[0, 1].item() == pytest.approx(64 * 3e38**2)
    weight = torch.full((8, 8), 1e-44, device=device)
    assert op([weight])[0, 1].item() > 0


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_shows(bad, device):
    weight = torch.randn(301, 203).to(device)
    weight[300, 202] = bad
    assert not torch.isfinite(op([weight])[0, 1])


def test_bits_do_not_depend_on_threads():
    weights = [torch.randn(1000, 777), torch.randn(64, 33).bfloat16()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = op(weights)
        torch.set_num_threads(4)
        assert torch.equal(op(weights), one)
    finally:
        torch.set_num_threads(before)


def test_opcheck(device):
    opcheck(op, ([torch.randn(5, 7).to(device), torch.randn(9, 2).to(device).T],))


def test_compile(device):
    weights = [torch.randn(5, 7).to(device), torch.randn(3, 3).to(device)]
    compiled = torch.compile(lambda ws: op(ws).sum(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights), op(weights).sum())


@pytest.mark.parametrize(
    "weights,error",
    [
        (lambda: [torch.ones(3)], ValueError),
        (lambda: [torch.ones(3, 3), torch.ones(3, 3, dtype=torch.int8)], TypeError),
        (lambda: [torch.ones(3, 3, dtype=torch.complex64)], TypeError),
        (lambda: [torch.ones(3, 3), torch.ones(3, 3, device="meta")], ValueError),
    ],
)
def test_bad_input(weights, error, device):
    with torch.device(device):
        bad = weights()
    with pytest.raises(error):
        op(bad)
