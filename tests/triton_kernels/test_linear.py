"""The layer's kernels: each implementation on its own, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from lora_kernels.ops.philox import dropout as drop_ref
from lora_kernels.triton_kernels import philox
from lora_kernels.triton_kernels.integers import next_power_of_2
from lora_kernels.triton_kernels.linear import choice, gemm, operator, rank

from ..ops.test_linear import check, check_columns, inputs
from ..support.exhaustive import ALL_KERNELS, sampled

CONFIGS = list(gemm.CONFIGS)
SHAPES = [  # rows, N, K, r
    ((1,), 48, 40, 3),
    ((2, 3), 96, 200, 16),
    ((64,), 136, 72, 40),
    ((130,), 264, 136, 70),
    ((129,), 264, 136, 24),
    ((200,), 24, 344, 8),
]


@pytest.fixture
def force(monkeypatch, device):
    """`force(name)`: every choice takes the implementation of that name, where there is one."""
    taken = []

    def use(*names: str) -> list[str]:
        def chosen(key, ways, device, count_launches=False):
            name = next((name for name in names if name in ways), next(iter(ways)))
            taken.append(name)
            return ways[name]()

        monkeypatch.setattr(operator, "fastest", chosen)
        if device == "cpu":  # the interpreter supports the tensor memory accelerator too
            monkeypatch.setattr(operator, "_is_hopper", lambda device: True)
            monkeypatch.setattr(operator, "_multiprocessors", lambda device: 3)
        # Also sizes, and without a GPU a dtype, that would be left to the library.
        halves = operator.HALVES if device == "cuda" else (*operator.HALVES, torch.float32)
        monkeypatch.setattr(
            operator, "_thin", lambda a, *o: a.dtype in halves and all(t.numel() for t in (a, *o))
        )
        return taken

    return use


WAYS = [
    *(("kernel", "decode"), ("kernel", "steps", "reversed"), ("steps", "library")),
    ("kernel", "overlapped"),
    *(("steps", config) for config in CONFIGS),
]


def sweep(ways: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of the ways with shapes, dropout and a start: every way with every shape."""
    combinations = product(ways, SHAPES, (0.0, 0.3), (False, True))
    return sampled((way, *shape, dropout, start) for way, shape, dropout, start in combinations)


@pytest.mark.parametrize(("ways", "lead", "n", "k", "r", "dropout", "start"), sweep(WAYS))
def test_every_way(ways, lead, n, k, r, dropout, start, device, dtypes, force):
    for dtype in dtypes:
        bias = (n + k) % 3 != 0
        t = inputs(lead, n, k, r, dtype, bias=bias, start=start, device=device)
        seed = torch.tensor(2**33 + 5, device=device) if dropout else None
        taken = force(*ways)
        check(t, 0.7, dropout, seed)
    names = gemm.offered(r, start, operator._capability(t["x"].device)[0] < 10)
    offered = {
        "decode": t["x"].numel() // k <= 64,
        "overlapped": t["x"].numel() // k > 64
        and operator._is_hopper(t["x"].device)
        and gemm.overlaps(r, dropout > 0)
        and not start,
    } | {config: operator._is_hopper(t["x"].device) and config in names for config in CONFIGS}
    assert (ways[-1] in taken) == offered.get(ways[-1], True)


R_WAYS = ["decode", "reversed", "library", CONFIGS[0]]


@pytest.mark.parametrize(("way", "lead", "n", "k", "r", "dropout", "start"), sweep(R_WAYS))
def test_with_R(way, lead, n, k, r, dropout, start, device, dtypes, force):
    for dtype in dtypes:
        t = inputs(lead, n, k, r, dtype, start=start, core=True, device=device)
        taken = force("kernel", "steps", way)
        check(t, 0.7, dropout, torch.tensor(9, device=device) if dropout else None)
        assert "decode" not in taken  # its kernels do not support R


PLAIN = ((*shape, *rest) for shape, *rest in product(SHAPES, (False, True), (False, True)))


@pytest.mark.parametrize(("lead", "n", "k", "r", "core", "start"), sampled(PLAIN))
def test_plain(lead, n, k, r, core, start, device, force):
    """All library calls from one C++ function: the only implementation for a wide dtype."""
    for dtype in (torch.float16, torch.float64):
        t = inputs(lead, n, k, r, dtype, start=start, core=core, device=device)
        taken = force("plain", "kernel", "reversed")
        taken.clear()
        check(t, 0.7)
        assert taken[0] == "plain"
        taken.clear()
        check(t, 0.7, 0.3, torch.tensor(9, device=device))
        assert "plain" not in taken  # it draws no mask


@pytest.mark.parametrize("ways", [("kernel", "decode"), ("steps", "reversed"), ("overlapped",)])
def test_the_mask_of_some_columns(ways, device, force):
    """In tensor parallelism, a rank has some columns of x and of A."""
    rows, start = (7, True) if "decode" in ways else (66, False)
    t = inputs((rows,), 48, 144, 16, torch.float16, bias=False, start=start, device=device)
    force("kernel", *ways)
    check_columns(t, 132, 3e-2)


RANKS = zip((1, 2, 15, 17, 100, 128, 200, 512), cycle((5, 80)))
OTHERS = zip((1, 2, 15, 17, 100, 128, 200, 512), cycle((80, 5)))


@pytest.mark.parametrize(("r", "rows"), [*RANKS, *OTHERS] if ALL_KERNELS else [(1, 5), (100, 80)])
def test_ranks(r, rows, device, force):
    t = inputs((rows,), 520, 528, r, torch.float16, start=r < 128, device=device)
    force("kernel", "steps", "reversed")
    check(t, 1.0, 0.1, torch.tensor(1, device=device))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", ["decode", "reversed", "overlapped", CONFIGS[0]])
@pytest.mark.parametrize("rows", [7, 130])
def test_factors_in_16_bits(rows, way, dropout, device, force):
    force("kernel", "steps", way) if way != "overlapped" else force("kernel", way)
    t = inputs((rows,), 264, 136, 16, torch.float16, device=device)
    t |= {name: t[name].half() for name in ("lora_A", "lora_B")}
    check(t, 0.7, dropout, torch.tensor(3, device=device) if dropout else None)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("parts", "length"), [(1, 5), (7, 64), (8, 1537), (19, 2048)])
def test_sums_of_parts(parts, length, count, device):
    """Different numbers and lengths of parts in one launch, each summed completely and in its
    dtype.
    """
    dtypes = (torch.float16, torch.float32, torch.float16)[:count]
    sums = [
        (torch.randn(parts + i, length + 4 * i, device=device), dtype, 0.5 - i)
        for i, dtype in enumerate(dtypes)
    ]
    for got, (each, dtype, scale) in zip(rank.reduce_all(sums), sums, strict=True):
        want = (scale * each.double().sum(0)).to(dtype)
        assert got.dtype == dtype
        # One rounding of the result, or the float32 sum of up to 21 numbers of size 1.
        rtol, atol = (2**-10, 1e-6) if dtype == torch.float16 else (0.0, 21 * 2**-22)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("way", ["decode", "reversed", "library", CONFIGS[0]])
def test_strides(way, device, force):
    force("kernel", "steps", way)
    t = inputs((6, 11), 64, 80, 8, torch.float16, device=device)
    for name in ("x", "weight", "lora_A", "lora_B"):
        for strided in (
            lambda v: v.transpose(-1, -2).contiguous().transpose(-1, -2),
            lambda v: torch.stack([v, v], -1)[..., 0],
            lambda v: torch.cat([v, v], -1)[..., : v.shape[-1]],
        ):
            changed = {k: None if v is None else v.detach() for k, v in t.items()}
            changed[name] = strided(changed[name])
            check(changed, 0.5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_transposed_weight_takes_the_fused_way(config, device, force):
    """GPT-2's Conv1D stores W as [K, N]."""
    taken = force("kernel", "steps", config)
    t = inputs((70,), 64, 80, 8, torch.float16, device=device)
    t["weight"] = t["weight"].detach().T.contiguous().T
    check(t, 0.5)
    if operator._is_hopper(t["x"].device) and config in gemm.offered(8, start=False):
        assert taken.count(config) == 2  # y and dx


def test_expanded_gradient_and_bias(device, force):
    force("kernel", "steps", "reversed")
    t = inputs((70,), 32, 48, 4, torch.float32, device=device)
    leaves = [t[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    bias = torch.randn(1, device=device).expand(32)
    y = torch.ops.lora.linear(t["x"], t["weight"], bias, t["lora_A"], t["lora_B"], 0.5)
    got = torch.autograd.grad(y.sum(), leaves)  # of stride 0
    plain = t["x"] @ t["weight"].T + bias + 0.5 * t["x"] @ t["lora_A"].T @ t["lora_B"].T
    # Float32 sums of 48 products, and for gradients of 70 · 32, in a different order.
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, torch.autograd.grad(plain.sum(), leaves), rtol=1e-4, atol=1e-4)


def test_saved_z_of_any_strides(device, force):
    force("kernel", "steps", "reversed")
    t = inputs((80,), 40, 48, 6, torch.float16, device=device)
    args = [t[name] for name in ("x", "weight", "lora_A", "lora_B")]
    absent = (None, None, None)
    _, z = torch.ops.lora.linear_forward(*args[:2], None, *args[2:], 0.5, 0.0, None, *absent)
    dy = torch.randn(80, 40).to(device, torch.float16)
    extras = (0.5, 0.0, None, *absent, [True, False, False, True, True, False])
    want = torch.ops.lora.linear_backward(dy, *args, z, *extras)
    for strided in (z.T.contiguous().T, torch.cat([z, z], 1)[:, :6]):
        got = torch.ops.lora.linear_backward(dy, *args, strided, *extras)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_result_may_be_written_in_place(device):
    t = inputs((2, 5), 8, 16, 4, torch.float16, device=device)
    x, A = t["x"].requires_grad_(), t["lora_A"].requires_grad_()
    y = torch.ops.lora.linear(x, t["weight"], None, A, t["lora_B"], 0.5)
    y.add_(1)
    y.sum().backward()
    assert torch.isfinite(A.grad).all()


@pytest.mark.parametrize("empty", [{"rows": 0}, {"n": 0}, {"k": 0}, {"r": 0}])
def test_empty_sizes(empty, device):
    sizes = {"rows": 3, "n": 5, "k": 7, "r": 2} | empty
    t = inputs((sizes["rows"],), sizes["n"], max(sizes["k"], 1), sizes["r"], torch.float32)
    t = {name: None if v is None else v.to(device) for name, v in t.items()}
    if sizes["k"] == 0:
        t |= {name: t[name][..., :0] for name in ("x", "weight", "lora_A")}
    leaves = [t[k].detach().requires_grad_() for k in ("x", "weight", "bias", "lora_A", "lora_B")]
    y = torch.ops.lora.linear(*leaves, 0.5)
    x, weight, bias, lora_A, lora_B = leaves
    want = torch.nn.functional.linear(x, weight, bias) + 0.5 * x @ lora_A.T @ lora_B.T
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy)
    )


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (37, 45), (16, 256), (3, 1030), (0, 4)])
def test_dropout_is_the_reference_mask(shape, p, device):
    for dtype in (torch.float64, torch.float32, torch.float16):
        x = torch.randn(*shape).to(device, dtype)
        for seed in (0, 7, 2**63 - 1, -(2**62)):
            word = torch.tensor(seed, device=device)
            assert torch.equal(philox.dropout(x, p, word), drop_ref(x, p, word))


def test_dropout_of_some_columns_is_the_reference_mask(device):
    x, seed = torch.randn(3, 270).to(device), torch.tensor(-(2**62), device=device)
    for begin in (4, 4 * (2**28 + 1)):
        assert torch.equal(philox.dropout(x, 0.3, seed, begin), drop_ref(x, 0.3, seed, begin))


def test_backward_is_deterministic(device, force):
    force("kernel", "steps", "reversed")
    t = inputs((200,), 264, 136, 16, torch.float16, device=device)
    leaves = [t[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    runs = []
    for _ in range(2):
        y = torch.ops.lora.linear(t["x"], t["weight"], None, t["lora_A"], t["lora_B"], 1.0)
        runs.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


CPU = torch.device("cpu")


@pytest.fixture
def times(monkeypatch) -> dict[str, float | Exception]:
    """The time of each implementation by its return value, or the error it raises."""
    table: dict[str, float | Exception] = {}

    def milliseconds(way, device, launches) -> float:
        taken = table[way()]
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(choice, "CHOSEN", {})
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(choice, "_can_measure", lambda device: True)
    monkeypatch.setattr(choice, "_milliseconds", milliseconds)
    return table


def test_the_fastest_way_is_measured_once_and_remembered(monkeypatch, times):
    times |= {"slow": 3.0, "fast": 1.0, "middling": 2.0}
    ran = []
    ways = {name: (lambda name=name: ran.append(name) or name) for name in times}
    assert choice.fastest(("key",), ways, CPU) == "fast"
    assert ran == ["slow", "fast", "middling", "fast"]
    assert choice.fastest(("key",), ways, CPU) == "fast"
    assert len(ran) == 5
    monkeypatch.setattr(choice, "_can_measure", lambda device: False)
    assert choice.fastest(("another key",), ways, CPU) == "slow"
    assert list(choice.CHOSEN) == [("key", *times)]
    # With other implementations to choose from, the choice differs.
    monkeypatch.setattr(choice, "_can_measure", lambda device: True)
    del ways["fast"]
    assert choice.fastest(("key",), ways, CPU) == "middling"
    ways["fast"] = lambda: "fast"
    assert choice.fastest(("key",), {name: ways[name] for name in times}, CPU) == "fast"


def test_a_way_that_fails_is_left_out_and_told_once(times):
    too_large = OutOfResources(300_000, 232_448, "shared memory")
    times |= {"large": too_large, "broken": RuntimeError("ptxas failed"), "good": 1.0}
    ways = {name: (lambda name=name: name) for name in times}
    with pytest.warns(RuntimeWarning, match="'broken'.*ptxas failed") as caught:
        assert choice.fastest(("key",), ways, CPU) == "good"
        assert choice.fastest(("another key",), ways, CPU) == "good"
    assert len(caught) == 1  # the one that is too large warns of nothing
    del ways["good"]
    with pytest.raises(OutOfResources):
        choice.fastest(("none is left",), ways, CPU)


@pytest.mark.parametrize("M", [1, 2, 16, 17, 31, 32, 33, 63, 64])
def test_rows_that_share_a_choice_share_the_kernels(M):
    """In decoding: a block of rows is a power of two, and a choice holds for one block."""
    key, block = operator._key(torch.empty(M, 16), torch.empty(16, 16), 4)[2], next_power_of_2(M)
    assert 2**key == block
    assert operator._key(torch.empty(block, 16), torch.empty(16, 16), 4)[2] == key


def test_the_dropout_threshold_is_one_type_for_every_probability():
    """Triton compiles a kernel again for an integer beyond 32 bits."""
    for p in (1e-9, 0.1, 0.499, 0.5, 0.75, 1.0):
        threshold, _ = philox.mask_arguments(p)
        assert -(2**31) <= threshold < 2**31
        assert threshold % 2**32 == min(int(p * 2**32), 2**32 - 1)
