from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops.subtract_dst import subtract_dst_ref

from ..support.oracle import ROUNDING, TINY, dst_basis, to_numpy
from .strides import LAYOUTS, lay_out

op = torch.ops.lora.subtract_dst_
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(got: torch.Tensor, before: torch.Tensor, correction: np.ndarray) -> None:
    """One rounding of the weight's dtype, plus float32's for correction and difference."""
    dtype = before.dtype
    exact = to_numpy(before) - correction
    inner = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    # The closed form's own error is below 1e-12 of its largest value; a product's is rank * eps.
    slack = 1e-14 if dtype == torch.float64 else 1e-12
    bound = (
        1.01 * ROUNDING[dtype] * np.abs(exact)
        + 1.01 * inner * (np.abs(correction) + np.abs(exact))
        + slack * np.abs(correction).max(initial=0.0)
        + TINY[dtype]
    )
    error = np.abs(to_numpy(got) - exact)
    assert (error <= bound).all(), (error / bound).max()


def correction_of(n: int, m: int, rank: int, coefficient: float) -> np.ndarray:
    return coefficient * dst_basis(n, rank) @ dst_basis(m, rank).T


@st.composite
def cases(draw):
    n, m = draw(st.integers(1, 160)), draw(st.integers(1, 160))
    if draw(st.booleans()):  # n + 1 and m + 1 share factors, so that arguments coincide
        k = draw(st.integers(1, 20))
        n, m = k * draw(st.integers(1, 8)), k * draw(st.integers(1, 8))
        n, m = max(n - 1, 1), max(m - 1, 1)
    if draw(st.booleans()):
        m = n
    return n, m, draw(st.integers(1, min(n, m)))


@given(cases(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.integers(0, 999))
@example((1, 1, 1), torch.float32, "contiguous", 0)
@example((1, 9, 1), torch.float32, "transposed", 0)
@example((5, 11, 5), torch.float32, "contiguous", 0)
@example((7, 7, 7), torch.float32, "both_strided", 0)
def test_matches_the_product(device, case, dtype, layout, seed):
    n, m, rank = case
    torch.manual_seed(seed)
    before = torch.randn(n, m).to(device, dtype)
    coefficient = torch.tensor(2 * math.sqrt(n * m), dtype=torch.float64, device=device)
    correction = correction_of(n, m, rank, float(coefficient))
    weight = lay_out(before, layout)
    returned = op(weight, coefficient, rank)
    assert returned is weight or returned.data_ptr() == weight.data_ptr()
    check(weight, before, correction)
    reference = lay_out(before, layout)
    subtract_dst_ref(reference, coefficient, rank, n, m, 0, 0)
    check(reference, before, correction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1024, 1024), (1100, 512), (512, 2049), (2047, 1023)])
@pytest.mark.parametrize("rank", [1, 16, 512])
def test_large_shapes(shape, rank, layout, device):
    before = torch.randn(*shape).to(device)
    coefficient = math.sqrt(shape[0] * shape[1])
    weight = lay_out(before, layout)
    op(weight, torch.tensor(coefficient, dtype=torch.float64, device=device), rank)
    check(weight, before, correction_of(*shape, rank, coefficient))


@pytest.mark.parametrize("shape", [(4, 5000), (5000, 4), (3, 3), (100, 30000)])
def test_very_wide_and_tall(shape, device):
    rank = min(*shape, 16)
    before = torch.randn(*shape).to(device)
    weight = before.clone()
    op(weight, torch.tensor(50.0, device=device), rank)
    check(weight, before, correction_of(*shape, rank, 50.0))


@pytest.mark.sanitize
def test_nothing_between_the_entries_is_touched(device):
    memory = torch.full((21, 41), 7.0, device=device)
    view = memory[1::2, 2::3]
    inside = torch.zeros_like(memory, dtype=torch.bool)
    inside[1::2, 2::3] = True
    op(view, torch.tensor(3.0, device=device), 4)
    assert (memory[~inside] == 7.0).all()
    assert (memory[inside] != 7.0).any()


@given(cases(), st.data())
def test_shards_give_the_whole(device, case, data):
    n, m, rank = case
    whole = torch.randn(n, m).to(device)
    i = data.draw(st.integers(0, n))
    j = data.draw(st.integers(0, m))
    coefficient = torch.tensor(float(n + m), device=device)
    sharded = whole.clone()
    for rows, row_offset in ((slice(0, i), 0), (slice(i, n), i)):
        for cols, col_offset in ((slice(0, j), 0), (slice(j, m), j)):
            op(sharded[rows, cols], coefficient, rank, n, m, row_offset, col_offset)
    check(sharded, whole, correction_of(n, m, rank, float(n + m)))


@pytest.mark.sanitize
def test_subtracting_and_adding_gives_the_base_back(device):
    before = torch.randn(300, 200).to(device)
    weight = before.clone()
    op(weight, torch.tensor(40.0, device=device), 16)
    op(weight, torch.tensor(-40.0, device=device), 16)
    assert (weight - before).abs().max() <= 4 * 2**-24 * before.abs().max()


def test_bits_do_not_depend_on_threads():
    before = torch.randn(700, 900)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(op(before.clone(), torch.tensor(30.0), 20))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_raises_the_version_counter(device):
    weight = torch.randn(8, 8).to(device)
    version = weight._version
    op(weight, torch.tensor(1.0, device=device), 2)
    assert weight._version > version


def test_opcheck(device):
    coefficient = torch.tensor(2.0, device=device)
    opcheck(op, (torch.randn(9, 7).to(device), coefficient, 3))
    opcheck(op, (torch.randn(9, 7).to(device).T, coefficient, 3, 20, 30, 1, 2))


def test_compile_functionalizes(device):
    def step(weight, coefficient):
        return op(weight * 1.0, coefficient, 3) + 1

    weight, coefficient = torch.randn(12, 10).to(device), torch.tensor(2.0, device=device)
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(weight, coefficient), step(weight, coefficient))


def test_empty_shard_and_inference_mode(device):
    one = torch.tensor(1.0, device=device)
    op(torch.empty(0, 5, device=device), one, 2, 10, 5, 10, 0)
    with torch.inference_mode():
        op(torch.randn(6, 6).to(device), one, 2)


@pytest.mark.parametrize(
    "make,args,error,match",
    [
        (lambda: (torch.ones(4, 4), torch.ones(())), (5,), ValueError, "rank 5 is larger"),
        (lambda: (torch.ones(4, 4), torch.ones(())), (0,), ValueError, "at least 1"),
        (lambda: (torch.ones(4), torch.ones(())), (1,), ValueError, "2-D"),
        (lambda: (torch.ones(4, 4).int(), torch.ones(())), (1,), TypeError, "int32"),
        (lambda: (torch.ones(4, 1).expand(4, 4), torch.ones(())), (1,), ValueError, "expanded"),
        (lambda: (overlapping(9, 1), torch.ones(())), (1,), ValueError, "overlapping"),
        (lambda: (overlapping(10, 2), torch.ones(())), (1,), ValueError, "overlapping"),
        (lambda: (torch.ones(4, 4), torch.ones(())), (1, 2**63 - 1, 4), ValueError, "2\\^30"),
        (lambda: (torch.ones(4, 4), torch.ones(3)), (1,), ValueError, "exactly one"),
        (lambda: (torch.ones(4, 4), torch.ones(()).long()), (1,), ValueError, "floating"),
        (lambda: (torch.ones(4, 4), torch.ones((), device="meta")), (1,), ValueError, "meta"),
        (lambda: (torch.ones(4, 4), torch.ones(())), (1, 6, 4, 3, 0), ValueError, "rows"),
        (lambda: (torch.ones(4, 4), torch.ones(())), (1, 4, 4, 0, -1), ValueError, "columns"),
    ],
)
def test_bad_input(make, args, error, match, device):
    with torch.device(device):
        weight, coefficient = make()
    with pytest.raises(error, match=match):
        op(weight, coefficient, *args)
    assert (weight == 1).all()


def overlapping(size: int, stride: int) -> torch.Tensor:
    """A 4 × 4 view whose rows begin `stride` apart."""
    return torch.ones(size).as_strided((4, 4), (stride, 1))


def test_a_coefficient_that_is_nan():
    """On the CPU only: on a GPU, checking it would synchronize."""
    weight = torch.ones(4, 4)
    with pytest.raises(ValueError, match="nan"):
        op(weight, torch.tensor(float("nan")), 1)
    assert (weight == 1).all()


class TestForeach:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("transposed", [False, True])
    def test_as_one_after_the_other(self, device, dtype, transposed):
        stack = torch.randn(3, 12, 20, device=device).to(dtype)
        weights = list((stack.mT if transposed else stack).unbind())
        coefficients = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64, device=device)
        expected = [weight.clone() for weight in weights]
        for weight, coefficient in zip(expected, coefficients, strict=True):
            torch.ops.lora.subtract_dst_(weight, coefficient, 4)
        versions = [weight._version for weight in weights]
        torch.ops.lora.subtract_dst_foreach_(weights, coefficients, 4)
        assert all(map(torch.equal, weights, expected))
        assert all(w._version > v for w, v in zip(weights, versions, strict=True))

    def test_none_at_all(self):
        torch.ops.lora.subtract_dst_foreach_([], torch.zeros(0), 1)

    @pytest.mark.parametrize(
        ("coefficients", "rank", "message"),
        [
            (torch.ones(3), 2, "one floating-point number for each of 2 weights"),
            (torch.ones(2, dtype=torch.int64), 2, "one floating-point number"),
            (torch.ones(2), 9, "rank 9 is larger"),
        ],
    )
    def test_bad_arguments_change_nothing(self, coefficients, rank, message):
        weights = [torch.ones(8, 8), torch.ones(8, 8)]
        with pytest.raises(ValueError, match=message):
            torch.ops.lora.subtract_dst_foreach_(weights, coefficients, rank)
        assert all(bool((weight == 1).all()) for weight in weights)
