"""The kernels of `lora::grouped_linear`, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_kernels.ops.grouped_linear import (
    grouped_linear_backward_ref,
    grouped_linear_forward_ref,
)
from lora_kernels.triton_kernels.grouped import grads, operator, schedule

from ..support.exhaustive import EXHAUSTIVE
from .grouped_cases import call, check, inputs

COUNTS = {  # rows of each expert
    "ragged": (3, 0, 70, 1, 0),
    "few": (2, 0, 1),
    "one": (130,),
    "all in one": (0, 0, 140),
}
SHAPES = [(40, 24, 4), (72, 136, 16), (24, 40, 40), (33, 27, 3)]  # N, K, r
KINDS = [
    {},
    {"tail": 5, "tokens": 7},
    {"start": True, "transposed": True},
    {"start": True, "transposed": True, "bias": False, "tokens": 40, "tail": 3},
]
FLOATING = ("x", "weight", "bias", "lora_A", "lora_B")
GRID = list(itertools.product(COUNTS, SHAPES, range(len(KINDS)), (0.0, 0.3)))
# Each value of each; continuous integration has all combinations.
SOME = [([*COUNTS][i], SHAPES[i], i, 0.3 * (i % 2)) for i in range(4)]
CASES = GRID if EXHAUSTIVE else SOME


@pytest.fixture(params=["pointers", "tma"])
def access(request, device, monkeypatch) -> str:
    """How W is loaded; on a GPU, the tensor memory accelerator only where there is one."""
    if request.param == "pointers":
        monkeypatch.setattr(operator, "_has_tma", lambda device: False)
    elif device == "cpu":  # the interpreter supports it
        monkeypatch.setattr(operator, "_has_tma", lambda device: True)
    elif not operator._has_tma(torch.device(device, 0)):
        pytest.skip("needs Hopper or later")
    return request.param


def seeded(dropout: float, device: str) -> torch.Tensor | None:
    return torch.tensor(2**33 + 5, device=device) if dropout else None


@pytest.mark.parametrize(("counts", "shape", "kind", "dropout"), CASES)
def test_matches_float64(counts, shape, kind, dropout, access, device, dtypes):
    suitable = dtypes[1:] if access == "tma" else dtypes  # not float32
    if not EXHAUSTIVE:  # the interpreter takes half a second for each, compiling ten
        suitable = [suitable[kind % len(suitable)]]
    for dtype in suitable:
        torch.manual_seed(0)
        t = inputs(COUNTS[counts], *shape, dtype, device=device, **KINDS[kind])
        check(t, 0.7, dropout, seeded(dropout, device))


@pytest.mark.sanitize
def test_sanitized(access, device):
    """What `make gpu` runs under compute-sanitizer: every kernel, at a small size."""
    if device == "cpu":
        pytest.skip("the interpreter runs these kernels in test_matches_float64")
    dropout = 0.3 if access == "pointers" else 0.0
    t = inputs((3, 0, 70), 72, 40, 8, torch.bfloat16, tokens=9, tail=3, start=True, device=device)
    check(t, 0.7, dropout, seeded(dropout, device))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_experts_of_several_chunks(dropout, device, dtypes, monkeypatch):
    """Sums in parts: of 3 chunks, none, one, two."""
    monkeypatch.setattr(operator, "CHUNK", 32)
    t = inputs((80, 0, 32, 33), 24, 40, 4, dtypes[-1], tokens=50, tail=40, device=device)
    check(t, 0.7, dropout, seeded(dropout, device))


@pytest.mark.parametrize("r", [1, 128, 200])
def test_ranks(r, device):
    check(inputs((20, 5), 24, 40, r, torch.float16, start=r == 200, device=device), 1.0)


def test_no_rank(access, device):
    """A product with W alone."""
    t = inputs((8, 0, 5), 24, 40, 0, torch.float16, tokens=9, tail=3, device=device)
    t |= {"start_A": t["lora_A"], "start_B": t["lora_B"]}
    got = check(t, 0.7, 0.3, seeded(0.3, device))
    assert got["lora_A"].shape == (3, 0, 40)


def test_factors_in_16_bits(access, device):
    t = inputs((20, 5), 24, 40, 8, torch.float16, tokens=9, device=device)
    check(t | {name: t[name].half() for name in ("lora_A", "lora_B")}, 0.7)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "ends", "rows", "lora_A", "lora_B"])
def test_strides(name, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(operator, "_has_tma", lambda device: True)
    t = inputs((6, 11), 24, 40, 8, torch.float16, tokens=9, device=device)
    want = call(t, 0.5)
    value = t[name]
    for strided in (
        value.mT.contiguous().mT if value.dim() > 1 else value.repeat_interleave(2)[::2],
        torch.stack([value, value], -1)[..., 0],
        torch.cat([value, value], -1)[..., : value.shape[-1]],
    ):
        # Other loads may add the products in another order: some roundings of fp16.
        torch.testing.assert_close(call(t | {name: strided}, 0.5), want, rtol=4e-3, atol=4e-3)
        if EXHAUSTIVE and name in ("x", "lora_A", "lora_B"):
            check(t | {name: strided.detach()}, 0.5)


def backward_arguments(device: str, **kinds: object) -> tuple[torch.Tensor, list]:
    t = inputs((6, 0, 11), 24, 40, 8, torch.float16, tokens=9, device=device, **kinds)
    first = [t[k] for k in ("x", "weight", "ends", "rows", "lora_A", "lora_B")]
    extras = (0.5, 0.0, None, t["start_A"], t["start_B"])
    x, weight, *others = first
    _, z = torch.ops.lora.grouped_linear_forward(x, weight, t["bias"], *others, *extras)
    dy = torch.randn(len(t["rows"]), 24).to(device, torch.float16)
    return dy, [*first, z, *extras]


def test_z_is_zero_in_rows_of_no_expert(device):
    t = inputs((6, 0, 11), 24, 40, 8, torch.float16, tokens=9, tail=3, device=device)
    names = ("x", "weight", "bias", "ends", "rows", "lora_A", "lora_B")
    arguments = [*(t[name] for name in names), 0.5, 0.0, None, None, None]
    y, z = torch.ops.lora.grouped_linear_forward(*arguments)
    want_y, want_z = grouped_linear_forward_ref(*arguments)
    assert want_z[:-3].all() and not z[-3:].any() and not y[-3:].any()
    # One rounding of fp16, of sums of size 1.
    torch.testing.assert_close((y, z), (want_y, want_z), rtol=2**-9, atol=2**-9)


@pytest.mark.parametrize("start", [False, True])
def test_what_is_not_needed_is_empty_and_changes_nothing(start, device):
    dy, arguments = backward_arguments(device, start=start, tail=2)
    every = torch.ops.lora.grouped_linear_backward(dy, *arguments, [True] * 4)
    want = grouped_linear_backward_ref(dy, *arguments, [True] * 4)
    # A few roundings of fp16, of sums of size 1 to 10.
    torch.testing.assert_close(every, want, rtol=2e-2, atol=2e-2)
    for wanted in range(4):
        needs = [i == wanted for i in range(4)]
        got = torch.ops.lora.grouped_linear_backward(dy, *arguments, needs)
        assert [g.numel() > 0 for g in got] == needs
        assert torch.equal(got[wanted], every[wanted])


def test_expanded_gradient_and_strided_z(device):
    dy, arguments = backward_arguments(device)
    ones = torch.ones(1, 1, dtype=dy.dtype, device=device).expand_as(dy)
    want = torch.ops.lora.grouped_linear_backward(ones.contiguous(), *arguments, [True] * 4)
    arguments[6] = arguments[6].T.contiguous().T
    got = torch.ops.lora.grouped_linear_backward(ones, *arguments, [True] * 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_start_and_adapter_cancel(access, device):
    """Before y is rounded: y is that of the bare product, to the last bits of an accumulator."""
    t = inputs((20, 5), 24, 40, 8, torch.float16, bias=False, device=device)
    bare = call(t, 0.0)
    large = {name: 8 * t[f"lora_{name[-1]}"] for name in ("start_A", "start_B")}
    t |= large | {"lora_A": large["start_A"], "lora_B": large["start_B"]}
    torch.testing.assert_close(call(t, 0.7), bare, rtol=2**-10, atol=2**-12)


def test_same_bits_twice(device):
    dy, arguments = backward_arguments(device, start=True)
    runs = [torch.ops.lora.grouped_linear_backward(dy, *arguments, [True] * 4) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("ends", [[4, 4, 9], [0, 0, 0], [12, 12, 12], [3, 5, 90], [9, -2, 5]])
@pytest.mark.parametrize("rows", [2, 8])
def test_schedule(ends, rows, device):
    """The tiles of each expert, then those of no expert; wrong ends stay within the bounds."""
    size = 12
    plan = schedule.schedule(torch.tensor(ends, dtype=torch.int32, device=device), size, rows)
    tiles = plan.tiles[: int(plan.firsts[-1]), :3].tolist()
    assert len(tiles) <= plan.limit
    assert all(0 <= begin < end <= size and end - begin <= rows for _, begin, end in tiles)
    if sorted(ends) != ends or ends[-1] > size:
        return
    want = []
    for expert, (begin, end) in enumerate(zip([0, *ends], [*ends, size], strict=True)):
        starts = range(begin, end, rows)
        assert int(plan.firsts[expert]) == len(want)
        want += [[expert, start, min(start + rows, end)] for start in starts]
    assert tiles == want


@pytest.mark.parametrize("size", [1, 5, 40])
def test_scatter(size, device):
    values = torch.randn(64, 48, device=device)
    rows = torch.randint(size, (64,), device=device)
    want = torch.zeros(size, 48, dtype=torch.float64, device=device)
    want.index_add_(0, rows, values.double())
    got = grads.scatter(values, rows, size)
    # Float32 sums of up to 64 numbers of size 1.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=64 * 2**-22)


def test_left_to_the_reference(device):
    """float64, and sizes of zero."""
    t = inputs((3, 0, 4), 8, 16, 2, torch.float64, tokens=5, device=device)
    check(t, 0.7)
    t = {name: v.detach().float() if name in FLOATING else v for name, v in t.items()}
    for empty in ({"rows": t["rows"][:0]}, {"rows": None, "x": t["x"][:0]}):
        case = t | empty | {"ends": t["ends"] * 0}
        x, weight, rows, A, B = (case[k] for k in ("x", "weight", "rows", "lora_A", "lora_B"))
        assert not operator.suits(x, weight, rows, A, B)
        arguments = (x, weight, case["bias"], case["ends"], rows, A, B, 0.5, 0.0, None, None, None)
        y, z = torch.ops.lora.grouped_linear_forward(*arguments)
        torch.testing.assert_close((y, z), grouped_linear_forward_ref(*arguments))
        assert y.shape == (0, 8)
