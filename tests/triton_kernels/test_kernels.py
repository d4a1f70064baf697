"""The kernels of the LoRAM path, through the operators, against float64 and the references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.ops.dst_basis import dst_basis_ref
from lora_kernels.ops.loram_init import largest_sum, loram_init_ref, refuse_unfit
from lora_kernels.triton_kernels import dst_basis, frobenius_stats, jobs, loram_init, subtract_dst
from lora_kernels.triton_kernels.dst_basis import _round_apart

from ..ops.strides import LAYOUTS, lay_out
from ..ops.test_subtract_dst import check as check_subtraction
from ..ops.test_subtract_dst import correction_of
from ..support.exhaustive import ALL_KERNELS, sampled
from ..support.oracle import ROUNDING, to_numpy
from ..support.oracle import dst_basis as dst_oracle

ops = torch.ops.lora
FP64 = torch.float64
ALL = (FP64, torch.float32, torch.float16)


SMALL = [(1, 1, 0, 1), (2, 2, 0, 2), (40, 7, 0, 40), (1200, 20, 1100, 90), (16, 3, 5, 0)]
LARGE = [(257, 257, 0, 257), (2048, 16, 0, 2048), (3000, 129, 2000, 200)]
BASES = [(*place, dtype) for place in SMALL + LARGE for dtype in ALL]
if not ALL_KERNELS:  # the interpreter takes seconds for each of the large ones
    BASES = [(*place, dtype) for place in SMALL for dtype in ALL]
    BASES += [(*place, dtype) for place, dtype in zip(LARGE, ALL, strict=True)]


@pytest.mark.parametrize(("size", "rank", "offset", "length", "dtype"), BASES)
def test_dst_basis_has_the_bits_of_the_reference(size, rank, offset, length, dtype, device):
    for scale in (None, torch.tensor(1.7, dtype=torch.float64, device=device)):
        place = {"offset": offset, "length": length, "scale": scale}
        got = ops.dst_basis(size, rank, dtype=dtype, device=device, **place)
        want = torch.empty(length, rank, dtype=dtype, device=device)
        dst_basis_ref(want, size, offset, scale)
        integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
        assert torch.equal(got.view(integer), want.view(integer))  # zeros have their signs


@triton.jit
def round_apart_kernel(low, high, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, _round_apart(tl.load(low + i), tl.load(high + i)))


def test_round_apart_is_whether_the_conversions_differ(device):
    """At powers of two, with both signs, halfway between neighbors and near it."""
    count = 4096
    near = (torch.randn(count) * 2.0 ** torch.randint(-100, 100, (count,))).abs()
    near[:64] = 2.0 ** torch.arange(-32, 32)
    beside = torch.nextafter(near, torch.full_like(near, math.inf))
    half = 0.5 * (near.double() + beside.double())
    width = half * 2.0 ** torch.randint(-50, -26, (count,))
    middle = half + width * (torch.rand(count, dtype=FP64) - 0.5) * 4
    sign = torch.where(torch.rand(count) < 0.5, -1.0, 1.0).double()
    low, high = (torch.stack([middle - width, middle + width]) * sign).sort(0).values.to(device)
    out = torch.zeros(count, dtype=torch.int32, device=device)
    round_apart_kernel[(count // 128,)](low, high, out, BLOCK=128)
    differ = low.float() != high.float()
    assert 0.2 < differ.float().mean() < 0.8
    # An end that is halfway itself is the closest case, and may go either way.
    ends = torch.stack([low, high]).view(torch.int64)
    inside = ((ends & (2**29 - 1)) != 2**28).all(0)
    assert inside.float().mean() > 0.9
    assert torch.equal((out != 0)[inside], differ[inside])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dst_basis_on_strides(layout, device):
    out = lay_out(torch.zeros(300, 48, device=device), layout)
    ops._dst_basis_(out, 400, 7, None)
    want = dst_oracle(400, 48)[7:307]
    assert np.abs(to_numpy(out) - want).max() <= 1.01 * ROUNDING[torch.float32] * np.abs(want).max()


@pytest.mark.parametrize("layout", LAYOUTS if ALL_KERNELS else list(LAYOUTS)[:2])
def test_frobenius_stats_of_mixed_weights(layout, device):
    shapes = [(100, 37), (512, 300), (1, 1), (3, 70000), (64, 64), (0, 5)]
    weights = [
        lay_out(torch.randn(*shape).to(device, dtype), layout) if shape[0] else torch.zeros(0, 5)
        for shape in shapes
        for dtype in ALL
    ]
    weights = [w.to(device) if w.numel() == 0 else w for w in weights]
    got = to_numpy(ops.frobenius_stats(weights))
    for row, weight in zip(got, weights, strict=True):
        wide = to_numpy(weight)
        slack = 1e-14 * np.abs(wide).sum() + 1e-300
        assert abs(row[0] - wide.sum()) <= slack
        assert abs(row[1] - np.square(wide).sum()) <= 1e-14 * np.square(wide).sum()
    assert torch.equal(ops.frobenius_stats(weights), ops.frobenius_stats(weights))


@pytest.mark.parametrize("count", [1, 2, 17])
def test_frobenius_stats_of_few_small_weights(count, device):
    got = ops.frobenius_stats([torch.full((3, 5), 2.0, device=device)] * count)
    assert got.tolist() == [[30.0, 60.0]] * count


def test_frobenius_stats_of_one_weight_alone_has_the_bits_of_a_list(device):
    """Of several programs, the last to arrive adds up and resets the counter to zero."""
    weight = torch.randn(700, 300).to(device)
    assert weight.numel() > 3 * frobenius_stats.CHUNK
    (want, _) = ops.frobenius_stats([weight, weight[:50]])
    for _ in range(3):
        assert torch.equal(ops.frobenius_stats([weight])[0], want)
    assert not frobenius_stats._arrivals(torch.device(device)).any()


def test_frobenius_stats_keeps_small_and_large_values(device):
    small = torch.full((100, 100), 1e-30, device=device)  # squares underflow float32
    large = torch.full((100, 100), 1e30, device=device)
    got = ops.frobenius_stats([small, large]).cpu()
    torch.testing.assert_close(got[:, 1].log10(), torch.tensor([-56.0, 64.0]).double())


SUBTRACTED = [
    *((1, 1, 1), (1, 9, 1), (5, 11, 5), (40, 40, 3), (130, 129, 16), (16, 2000, 16), (600, 64, 64))
]
SUBTRACTIONS = ((*sizes, layout) for layout in LAYOUTS for sizes in SUBTRACTED)


@pytest.mark.parametrize(("n", "m", "rank", "layout"), sampled(SUBTRACTIONS))
def test_subtract_dst(n, m, rank, layout, device, dtypes):
    for dtype in dtypes:
        before = torch.randn(n, m).to(device, dtype)
        weight = lay_out(before, layout)
        coefficient = 2 * math.sqrt(n * m)
        ops.subtract_dst_(weight, torch.tensor(coefficient, dtype=FP64, device=device), rank)
        check_subtraction(weight, before, correction_of(n, m, rank, coefficient))


def test_subtract_dst_on_float64(device):
    before = torch.randn(70, 50, device=device).double()
    weight = before.clone()
    ops.subtract_dst_(weight, torch.tensor(30.0, device=device), 9)
    check_subtraction(weight, before, correction_of(70, 50, 9, 30.0))


def test_subtract_dst_by_shards_has_the_bits_of_the_whole(device):
    before = torch.randn(90, 140).to(device)
    coefficient = torch.tensor(77.0, dtype=torch.float64, device=device)
    whole, sharded = before.clone(), before.clone()
    ops.subtract_dst_(whole, coefficient, 11)
    for i, j in ((0, 0), (0, 64), (33, 0), (33, 64)):
        shard = sharded[i : i + (33 if i == 0 else 57), j : j + (64 if j == 0 else 76)]
        ops.subtract_dst_(shard, coefficient, 11, 90, 140, i, j)
    assert torch.equal(whole, sharded)


def test_subtract_dst_of_a_shard_of_a_huge_weight(device):
    size = 2**20 - 1  # the arguments of its sines need 62 bits
    weight = torch.zeros(8, 8, device=device)
    coefficient = torch.tensor(float(size), dtype=torch.float64, device=device)
    ops.subtract_dst_(weight, coefficient, 16, size, 2 * size, size // 3, 2 * size // 3)
    i, j = (
        np.arange(size // 3, size // 3 + 8) + 1.0,
        np.arange(2 * size // 3, 2 * size // 3 + 8) + 1,
    )
    k = np.arange(1, 17)
    left = np.sqrt(2 / (size + 1)) * np.sin(np.outer(i, k) % (2 * size + 2) * np.pi / (size + 1))
    period = 2 * size + 1
    right = np.sqrt(2 / period) * np.sin(np.outer(j, k) % (2 * period) * np.pi / period)
    want = -size * left @ right.T
    assert np.abs(to_numpy(weight) - want).max() <= 1e-6 * np.abs(want).max()


def test_tables_of_a_graph_share_no_memory(monkeypatch):
    """Each replay of a graph reads them again. (Here with memory that is not pinned.)"""
    empty = torch.empty
    unpinned = lambda *args, pin_memory=False, **options: empty(*args, **options)  # noqa: E731
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(jobs, "_reserves", [])
    monkeypatch.setattr(jobs, "RESERVE", 8)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    jobs._pinned(3)
    capturing = True
    tables = [jobs._pinned(5).copy_(torch.arange(k, k + 5)) for k in (0, 10, 20)]
    assert [t.tolist() for t in tables] == [list(range(k, k + 5)) for k in (0, 10, 20)]
    with pytest.raises(RuntimeError, match="warm-up"):
        jobs._pinned(5)
    capturing = False
    jobs._pinned(3)
    capturing = True
    jobs._pinned(5).fill_(0)
    assert [t.tolist() for t in tables] == [list(range(k, k + 5)) for k in (0, 10, 20)]


def weights_of(device, dtype) -> list[torch.Tensor]:
    shapes = [(40, 60), (96, 32), (48, 48), (33, 35)]
    return [torch.randn(*shape).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_loram_init(scaling, device, dtypes):
    for dtype in (torch.float64, *dtypes):
        weights = weights_of(device, dtype)
        before = [w.clone() for w in weights]
        want = [w.clone() for w in weights]
        lora_A, lora_B, beta = ops.loram_init_foreach(weights, 8, scaling)
        want_A, want_B = (
            [torch.empty_like(t) for t in lora_A],
            [torch.empty_like(t) for t in lora_B],
        )
        want_beta = torch.empty_like(beta)
        loram_init_ref(want, want_A, want_B, want_beta, 8, scaling, True)
        # The sums of squares are added in a different order: an ulp of them, and its rounding.
        torch.testing.assert_close(beta, want_beta, rtol=1e-14, atol=0)
        for k, weight in enumerate(weights):
            tight = {"rtol": 2e-7 if dtype != torch.float64 else 1e-13, "atol": 0}
            torch.testing.assert_close(lora_A[k], want_A[k], **tight)
            torch.testing.assert_close(lora_B[k], want_B[k], **tight)
            n, m = weight.shape
            coefficient = scaling * float(want_beta[k]) ** 2
            check_subtraction(weight, before[k], correction_of(n, m, 8, coefficient))


def test_loram_init_takes_mixed_dtypes_and_layouts(device):
    base = [torch.randn(30, 50), torch.randn(64, 20).double(), torch.randn(40, 40).half()]
    for layout in LAYOUTS:
        weights = [lay_out(w.to(device), layout) for w in base]
        lora_A, lora_B, beta = ops.loram_init_foreach(weights, 4)
        for weight, before, A, B in zip(weights, base, lora_A, lora_B, strict=True):
            assert (
                A.dtype
                == B.dtype
                == (torch.float64 if before.dtype.itemsize == 8 else torch.float32)
            )
            again = to_numpy(weight) + to_numpy(B) @ to_numpy(A)
            slack = 4 * ROUNDING[before.dtype] + 4 * ROUNDING[torch.float32]
            assert np.abs(again - to_numpy(before)).max() <= slack * np.abs(to_numpy(before)).max()
        assert torch.isfinite(beta).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_loram_init_refuses_before_it_writes(bad, device):
    weights = weights_of(device, torch.float32)
    if bad == 0.0:
        weights[2].zero_()
    else:
        weights[2][3, 4] = bad
    before = [w.clone() for w in weights]
    with pytest.raises(ValueError, match=r"weight 2 .*no weight was changed"):
        ops.loram_init_foreach(weights, 8)
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight, old, rtol=0, atol=0, equal_nan=True)


def test_loram_init_without_the_check_does_not_raise(device):
    weights = [torch.zeros(8, 8, device=device), torch.randn(8, 8).to(device)]
    want = weights[1].clone()
    _, _, beta = ops.loram_init_foreach(weights, 4, check=False)
    assert beta[0] == 0 and torch.equal(weights[0], torch.zeros_like(weights[0]))
    _, _, alone = ops.loram_init(want, 4)
    assert torch.equal(weights[1], want) and torch.equal(beta[1], alone)


SCALES = [0.0, -1.7, 1e-44, 1e30, float("nan")]


@pytest.mark.parametrize(
    ("size", "rank", "scale"),
    sampled((*s, scale) for scale in SCALES for s in [(16, 5), (40, 40), (1023, 9), (306, 40)]),
)
def test_dst_basis_in_few_long_programs(size, rank, scale, device, monkeypatch):
    """Angle addition over many blocks, however much stays undecided, including signs of zeros."""
    monkeypatch.setattr(dst_basis, "ENOUGH_PROGRAMS", 1)
    factor = torch.tensor(scale, dtype=FP64, device=device)
    for dtype in (torch.float32, torch.float16):
        got = torch.ops.lora.dst_basis(size, rank, dtype=dtype, device=device, scale=factor)
        want = torch.empty(size, rank, dtype=dtype, device=device)
        dst_basis_ref(want, size, 0, factor)
        integer = {4: torch.int32, 2: torch.int16}[got.element_size()]
        same = got.view(integer) == want.view(integer)
        assert (same | (got.isnan() & want.isnan())).all()


class Recorder:
    """Replaces a kernel and records its launches."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __getitem__(self, grid):
        return lambda *args, **options: self.log.append(self.name)


def test_what_a_model_launches_and_when(device, monkeypatch):
    """First the statistics, before A and B are allocated; then one launch for all weights."""
    log = []
    for module, names in (
        (frobenius_stats, ["stats_kernel"]),
        (loram_init, ["scales_kernel"]),
        (dst_basis, ["dst_fill_kernel"]),
        (subtract_dst, ["axis_tables_kernel", "subtract_kernel"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(name, log))
    empty_factors = ops._empty_factors
    allocate = lambda *args: log.append("factors") or empty_factors(*args)  # noqa: E731
    monkeypatch.setattr(ops, "_empty_factors", allocate)
    weights = [
        torch.empty(*shape, device=device) for shape in ((64, 96), (96, 64)) for _ in range(9)
    ]
    ops.loram_init_foreach(weights, 4, check=False)
    others = ["scales_kernel", "axis_tables_kernel", *["dst_fill_kernel"] * 2, "subtract_kernel"]
    assert log == ["stats_kernel", "factors", *others]
    # A single weight is passed as arguments instead of tables, without a copy to the device.
    monkeypatch.setattr(jobs, "upload", None)
    log.clear()
    ops.frobenius_stats(weights[:1])
    ops.subtract_dst_(weights[0], torch.ones((), device=device), 4)
    ops.dst_basis(64, 4, device=device)
    assert log == [
        "stats_kernel",
        "axis_tables_kernel",
        "subtract_kernel",
        "dst_fill_kernel",
    ]


def test_a_sum_of_squares_at_the_limit_of_the_quick_check(device):
    """The exact check accepts whatever the quick check accepts."""
    for dtype in (torch.float16, torch.float32):
        weight = torch.zeros(32, 40, dtype=dtype)
        for scaling in (0.0, 0.01, -4.0, 1e30):
            most = largest_sum(8, scaling, dtype, weight.shape)
            refuse_unfit([weight], [most], 8, scaling)
