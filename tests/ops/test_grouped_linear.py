from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.library import opcheck

from lora_kernels.ops import cpu_capabilities, cpu_capability, set_cpu_capability
from lora_kernels.ops.grouped_linear import (
    grouped_linear_backward_ref,
    grouped_linear_forward_ref,
)
from lora_kernels.ops.philox import dropout as drop

from ..support.exhaustive import EXHAUSTIVE
from ..support.oracle import ROUNDING, assert_close, to_numpy
from .compiled import needs_compiled

op = torch.ops.lora.grouped_linear
forward, backward = torch.ops.lora.grouped_linear_forward, torch.ops.lora.grouped_linear_backward
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPERANDS = ("x", "weight", "bias", "ends", "rows", "lora_A", "lora_B")
LEARNED = ("x", "bias", "lora_A", "lora_B")
SCALING = 0.7

# Numbers of rows of the experts, and of rows after the last expert's.
GROUPS = {
    "one expert": ([9], 0),
    "few": ([3, 0, 11], 2),
    "fewer rows than experts": ([0, 1, 0, 0, 1, 0, 0, 0], 0),
    "all in one": ([0, 40, 0], 0),
    "none in any": ([0, 0, 0], 5),
    "no rows": ([0, 0, 0], 0),
    "several blocks": ([530, 7, 261], 3),
}


def inputs(
    counts,
    n,
    k,
    r,
    dtype,
    *,
    rest=0,
    gather=True,
    bias=True,
    start=False,
    transposed=False,
    device="cpu",
):
    """`rest` rows belong to no expert. With `gather`, rows of x repeat and one is unused."""
    e, size = len(counts), sum(counts) + rest
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    make = lambda *shape: torch.randn(*shape).to(device)  # noqa: E731
    tokens = size // 2 + 1 if gather else size
    weight = make(e, k, n).transpose(1, 2) if transposed else make(e, n, k)
    rows = torch.randint(max(1, tokens - 1), (size,)).to(device) if gather else None
    return {
        "x": make(tokens, k).to(dtype),
        "weight": (weight / k**0.5).to(dtype),
        "bias": make(e, n).to(dtype) if bias else None,
        "ends": torch.tensor(counts).cumsum(0).int().to(device),
        "rows": rows,
        "lora_A": (make(e, r, k) / k**0.5).to(factor),
        "lora_B": make(e, n, r).to(factor),
        "start_A": (make(e, r, k) / k**0.5).to(factor) if start else None,
        "start_B": make(e, n, r).to(factor) if start else None,
    }


def call(t, scaling=SCALING, dropout=0.0, seed=None):
    return op(*(t[k] for k in OPERANDS), scaling, dropout, seed, t["start_A"], t["start_B"])


def expert_formula(f, e, x, g, mask, s, sign):
    """y, its gradients by x, bias, A and B for the rows x of expert e, from the formula."""
    W, A, B = f["weight"][e], f["lora_A"][e], f["lora_B"][e]
    y = x @ W.T + s * (x * mask) @ A.T @ B.T
    dx = g @ W + s * mask * (g @ B @ A)
    if "bias" in f:
        y = y + f["bias"][e]
    if "start_A" in f:
        y = y + sign * s * x @ f["start_A"][e].T @ f["start_B"][e].T
        dx = dx + sign * s * g @ f["start_B"][e] @ f["start_A"][e]
    return y, dx, g.sum(0), s * (g @ B).T @ (x * mask), s * g.T @ ((x * mask) @ A.T)


def formula(f, ends, rows, g, mask, s, sign):
    size = len(rows)
    values = {"y": np.zeros((size, f["weight"].shape[1])), "x": np.zeros_like(f["x"])}
    values["bias"] = np.zeros(f["weight"].shape[:2])
    values |= {k: np.zeros_like(f[k]) for k in ("lora_A", "lora_B")}
    for e, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        part = slice(begin, end)
        y, dx, dbias, dA, dB = expert_formula(
            f, e, f["x"][rows[part]], g[part], mask[part], s, sign
        )
        values["y"][part], values["bias"][e] = y, dbias
        values["lora_A"][e], values["lora_B"][e] = dA, dB
        np.add.at(values["x"], rows[part], dx)
    return values


def oracle(t, dy, scaling, dropout=0.0, seed=None):
    """(result, size): the formula in float64, with factors rounded to the dtype; and the root of
    the sum of its squared terms, the size of the result had none of them canceled.
    """
    tensors = {k: v for k, v in t.items() if v is not None and k not in ("ends", "rows")}
    f = {k: to_numpy(v.to(t["x"].dtype)) for k, v in tensors.items()}
    g, ends = to_numpy(dy), t["ends"].tolist()
    rows = np.arange(len(g)) if t["rows"] is None else t["rows"].cpu().numpy()
    mask = np.ones((len(g), f["x"].shape[1]))
    if dropout:
        mask = to_numpy(drop(torch.from_numpy(mask), dropout, seed.cpu()))
    squares = {k: v**2 for k, v in f.items()}
    size = formula(squares, ends, rows, g**2, mask**2, scaling**2, 1)
    want = formula(f, ends, rows, g, mask, scaling, -1)
    return want, {k: np.sqrt(v) for k, v in size.items()}


def largest_ratio(dtype, m, n, k, r, entries) -> float:
    """Bound on ‖error‖ / ‖size‖ as in test_linear: 7 roundings to the dtype in sequence, and one
    more of a sum of repeated rows; m + n + k + r sums, where m counts all rows.
    """
    accumulated = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    rms = math.sqrt((8 * ROUNDING[dtype] ** 2 + (m + n + k + r) * accumulated**2) / 3)
    return rms * (1 + 8 / math.sqrt(max(1, min(entries, max(1, r) * min(max(m, 1), n, k)))))


def check(t, dropout=0.0, seed=None) -> None:
    dtype = t["x"].dtype
    leaves = {k: t[k].requires_grad_() for k in LEARNED if t[k] is not None}
    y = call(t, SCALING, dropout, seed)
    size = t["x"].shape[0] if t["rows"] is None else t["rows"].shape[0]
    assert y.dtype == dtype and y.shape == (size, t["weight"].shape[1])
    dy = torch.randn(y.shape, dtype=dtype).to(y.device)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
    want, scale = oracle(t, dy, SCALING, dropout, seed)
    (m, n), (_, r, k) = want["y"].shape, t["lora_A"].shape
    for name, got in {"y": y, **dict(zip(leaves, grads, strict=True))}.items():
        ratio = largest_ratio(dtype, m, n, k, r, got.numel())
        if got.numel():
            assert_close(to_numpy(got), want[name], scale[name], ratio, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("variant", range(4 if EXHAUSTIVE else 2))
def test_matches_float64(device, dtype, groups, gather, variant):
    counts, rest = GROUPS[groups]
    r = [4, 0, 40, 1][(variant + len(counts)) % 4]
    options = {"rest": rest, "gather": gather, "device": device, "start": variant % 2 == 1}
    options |= {"bias": variant != 1, "transposed": (variant % 2 == 1) != gather}
    t = inputs(counts, 33, 70, r, dtype, **options)
    dropout = 0.25 if variant == 1 or variant == 2 else 0.0
    check(t, dropout, torch.tensor(99, device=device) if dropout else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_columns_in_several_tasks(device, dtype, transposed, dropout):
    options = {"start": transposed, "transposed": transposed, "device": device}
    t = inputs([5, 0, 290], 270, 600, 16, dtype, **options)
    check(t, dropout, torch.tensor(5, device=device) if dropout else None)


@pytest.mark.parametrize("capability", cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_every_instruction_set(capability, dtype, layout):
    """More columns than one converted tile of the weight has."""
    before = cpu_capability()
    set_cpu_capability(capability)
    try:
        t = inputs([20, 0, 33], 300, 900, 4, dtype, transposed=layout == "columns")
        if layout == "strided":
            memory = torch.full((3, 600, 1800), float("nan"), dtype=dtype)
            memory[:, ::2, ::2] = t["weight"]
            t["weight"] = memory[:, ::2, ::2]
        check(t)
    finally:
        set_cpu_capability(before)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_reference_agrees_with_the_kernel(start, gather, dropout, device):
    t = inputs([4, 0, 7], 20, 30, 4, torch.float64, rest=3, gather=gather, start=start,
               device=device)  # fmt: skip
    seed = torch.tensor(3, device=device)
    extras = (SCALING, dropout, seed, t["start_A"], t["start_B"])
    got = forward(*(t[k] for k in OPERANDS), *extras)
    want = grouped_linear_forward_ref(*(t[k] for k in OPERANDS), *extras)
    torch.testing.assert_close(got, want)
    grad = torch.randn(14, 20, dtype=torch.float64).to(device)
    args = (grad, *(t[k] for k in OPERANDS if k != "bias"), got[1], *extras)
    alone = [[i == wanted for i in range(4)] for wanted in range(4)]
    for needs in ([True] * 4, [False] * 4, *alone):
        torch.testing.assert_close(
            backward(*args, needs), grouped_linear_backward_ref(*args, needs)
        )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_no_expert_are_not_read(dtype, dropout, device):
    """Neither NaN in x nor in the gradient of y reaches a result."""
    t = inputs([3, 0, 4], 12, 10, 2, dtype, rest=3, gather=False, device=device)
    t["x"][7:] = float("nan")
    leaves = [t[k].requires_grad_() for k in LEARNED]
    y = call(t, SCALING, dropout, torch.tensor(1, device=device))
    assert (y[7:] == 0).all() and y.isfinite().all()
    dy = torch.ones_like(y)
    dy[7:] = float("nan")
    grads = torch.autograd.grad(y, leaves, dy)
    assert all(g.isfinite().all() for g in grads)
    dx, dbias, dA, dB = grads
    assert (dx[7:] == 0).all()
    assert (dbias[1] == 0).all() and (dA[1] == 0).all() and (dB[1] == 0).all()


def test_start_cancels_the_adapter(device):
    t = inputs([20, 0, 44], 96, 128, 16, torch.float32, bias=False, device=device)
    t["start_A"], t["start_B"] = t["lora_A"], t["lora_B"]
    bare = dict(t, lora_A=t["lora_A"][:, :0], lora_B=t["lora_B"][:, :, :0])
    bare |= {"start_A": None, "start_B": None}
    base = call(bare)
    assert (call(t, 8.0) - base).norm() <= 1e-5 * base.norm()
    for tensors in (t, bare):
        tensors |= {key: tensors[key].bfloat16() for key in ("x", "weight")}
    assert (call(t, 8.0) != call(bare)).double().mean() < 0.02


def test_repeated_rows_are_rounded_once(device):
    """Gradients 1 and 2⁻⁸ 64 times: in bfloat16, one after the other, the sum would stay 1."""
    size = 65
    t = inputs([size], 1, 1, 0, torch.bfloat16, bias=False, gather=False, device=device)
    t["x"] = torch.ones(1, 1, dtype=torch.bfloat16, device=device).requires_grad_()
    t["weight"] = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device)
    t["rows"] = torch.zeros(size, dtype=torch.int64, device=device)
    dy = torch.full((size, 1), 2.0**-8, dtype=torch.bfloat16, device=device)
    dy[0] = 1
    (dx,) = torch.autograd.grad(call(t), t["x"], dy)
    assert dx.item() == 1.25


@pytest.mark.sanitize
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("start", [False, True])
def test_gradcheck(start, dropout, device):
    t = inputs([2, 0, 3], 5, 7, 2, torch.float64, rest=1, start=start, device=device)
    seed = torch.tensor(11, device=device)
    leaves = [t[k].requires_grad_() for k in LEARNED]
    run = lambda *a: call(t | dict(zip(LEARNED, a, strict=True)), 1.3, dropout, seed)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_saves_x_and_z_only(device):
    t = inputs([30, 20], 40, 30, 4, torch.float32, device=device)
    t["x"].requires_grad_()
    t["lora_A"].requires_grad_()
    saved = []
    known = {t[k].data_ptr() for k in OPERANDS if t[k] is not None}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        call(t)
    assert [tuple(s.shape) for s in saved if s.data_ptr() not in known] == [(50, 4)]


@pytest.mark.sanitize
def test_only_the_wanted_gradients(device):
    t = inputs([3, 2], 5, 4, 2, torch.float32, device=device)
    t["lora_B"].requires_grad_()
    call(t).sum().backward()  # a gradient of stride 0
    assert t["lora_B"].grad is not None and t["x"].grad is None


@pytest.mark.parametrize("key", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_layouts(key, device):
    t = inputs([3, 5], 12, 10, 3, torch.float32, device=device)
    want = call(t)
    value = t[key]
    swapped = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(call(t | {key: swapped}), want)
    padded = torch.full([2 * s for s in value.shape], float("nan"), device=device)
    view = padded[tuple(slice(None, None, 2) for _ in value.shape)]
    view.copy_(value)
    torch.testing.assert_close(call(t | {key: view}), want)


@pytest.mark.parametrize("gather", [False, True])
def test_no_experts_and_no_tokens(gather, device):
    t = inputs([], 6, 5, 2, torch.float32, rest=0, gather=False, device=device)
    t["ends"] = torch.zeros(0, dtype=torch.int32, device=device)
    if gather:
        t["rows"] = torch.zeros(0, dtype=torch.int64, device=device)
    for key in LEARNED:
        t[key].requires_grad_()
    y = call(t)
    y.sum().backward()
    assert y.shape == (0, 6) and t["lora_A"].grad.shape == (0, 2, 5)
    assert t["x"].grad.shape == (0, 5)


def test_tokens_without_a_row_have_no_gradient(device):
    t = inputs([0, 0], 6, 5, 2, torch.float32, device=device)
    t["x"] = torch.randn(4, 5).to(device).requires_grad_()
    call(t).sum().backward()
    assert (t["x"].grad == 0).all()


@needs_compiled("grouped_linear_forward")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[70, 0, 300, 9], [600], [2]])
def test_threads_do_not_change_a_bit(dtype, counts):
    t = inputs(counts, 140, 300, 8, dtype, start=True)
    leaves = [t[k].requires_grad_() for k in LEARNED]
    dy = torch.randn(sum(counts), 140).to(dtype)

    def results() -> tuple[torch.Tensor, ...]:
        y = call(t, SCALING, 0.2, torch.tensor(4))
        return y, *torch.autograd.grad(y, leaves, dy)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        many = results()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_autocast(device):
    t = inputs([4, 5], 12, 10, 3, torch.float32, device=device)
    leaves = [t[k].requires_grad_() for k in LEARNED]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = call(t)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    want = torch.autograd.grad(call(t), leaves, torch.ones(9, 12, device=device))
    y = call(t)
    with torch.autocast(device, torch.bfloat16):
        got = torch.autograd.grad(y, leaves, torch.ones(9, 12, device=device))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.2] if EXHAUSTIVE else [0.2])
def test_opcheck(dropout, device):
    t = inputs([2, 0, 3], 6, 5, 2, torch.float32, rest=1, start=True, device=device)
    seed = torch.tensor(3, device=device)
    extras = (0.5, dropout, seed, t["start_A"], t["start_B"])
    plain = [t[k] for k in OPERANDS]
    learned = [v.clone().requires_grad_() if k in LEARNED else v for k, v in t.items()][:7]
    opcheck(op, (*learned, *extras))
    opcheck(forward, (*plain, *extras))
    z, grad = torch.randn(6, 2).to(device), torch.randn(6, 6).to(device)
    args = (grad, *(t[k] for k in OPERANDS if k != "bias"), z, *extras, [True, False, True, True])
    opcheck(backward, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    t = inputs([2, 0, 3], 6, 5, 2, torch.float32, device=device)
    leaves = [t[k].requires_grad_() for k in LEARNED]
    # Compiling the rest to C++ takes 14 s and tests nothing of the operator.
    backend = "inductor" if EXHAUSTIVE else "aot_eager"
    run = torch.compile(
        lambda: call(t).square().sum(), fullgraph=True, dynamic=dynamic, backend=backend
    )
    got = torch.autograd.grad(run(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(call(t).square().sum(), leaves))


def test_meta_and_inference_mode(device):
    t = inputs([3, 2], 6, 5, 2, torch.float32)
    meta = {k: None if v is None else v.to("meta") for k, v in t.items()}
    assert call(meta).shape == (5, 6)
    with torch.inference_mode():
        t = inputs([3, 2], 6, 5, 2, torch.float32, device=device)
        assert call(t).is_inference()


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BAD = [
    (lambda: {"x": torch.ones(4, 6)}, ValueError, r"x must be \[T, 5\]"),
    (lambda: {"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "real float"),
    (lambda: {"x": torch.ones(4, 5).half()}, TypeError, "autocast"),
    (lambda: {"weight": torch.ones(6, 5)}, ValueError, "3-D"),
    (lambda: {"weight": torch.ones(2, 6, 5).requires_grad_()}, ValueError, "experts are frozen"),
    (lambda: {"bias": torch.ones(6)}, ValueError, "bias must be"),
    (lambda: {"ends": ints(3, 5, dtype=torch.int64)}, TypeError, "ends must be torch.int32"),
    (lambda: {"ends": ints(3)}, ValueError, "one number for each of 2 experts"),
    (lambda: {"ends": ints(3, 5)[:, None]}, ValueError, "ends must be 1-D"),
    (lambda: {"rows": ints(0, 0, 0, 0, 0)}, TypeError, "rows must be torch.int64"),
    (lambda: {"rows": torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, "on meta"),
    (lambda: {"lora_A": torch.ones(2, 5)}, ValueError, "lora_A must be 3-D"),
    (lambda: {"lora_B": torch.ones(2, 6, 3)}, ValueError, "lora_B must be"),
    (lambda: {"start_A": torch.ones(2, 2, 5)}, ValueError, "both"),
]
BAD_VALUES = [
    (lambda: {"ends": ints(3, 2)}, ValueError, "ends must not decrease, got 2 for expert 1 aft"),
    (lambda: {"ends": ints(-1, 5)}, ValueError, "ends must not decrease, got -1 for expert 0"),
    (lambda: {"ends": ints(3, 6)}, ValueError, "not exceed the number of rows, 5, got 6"),
    (lambda: {"rows": torch.tensor([0, 0, -1, 0, 0])}, IndexError, "got -1 at position 2"),
    (lambda: {"rows": torch.tensor([0, 0, 0, 3, 0])}, IndexError, "below 3, got 3 at position 3"),
]


@pytest.mark.parametrize("change,error,match", BAD + BAD_VALUES)
def test_bad_input(change, error, match, device):
    if device != "cpu" and error is IndexError:
        pytest.skip("the values of rows are not read on a GPU")
    with torch.device(device):
        t = inputs([3, 2], 6, 5, 2, torch.float32, device=device) | change()
    with pytest.raises(error, match=match):
        call(t)


@pytest.mark.parametrize("change,error,match", BAD_VALUES)
def test_the_reference_and_the_backward_refuse_the_same_values(change, error, match):
    t = inputs([3, 2], 6, 5, 2, torch.float32) | change()
    extras = (1.0, 0.0, None, None, None)
    with pytest.raises(error, match=match):
        grouped_linear_forward_ref(*(t[k] for k in OPERANDS), *extras)
    args = [t[k] for k in OPERANDS if k != "bias"]
    for run in (backward, grouped_linear_backward_ref):
        with pytest.raises(error, match=match):
            run(torch.ones(5, 6), *args, torch.ones(5, 2), *extras, [True] * 4)


@pytest.mark.parametrize(
    "scaling,dropout,seed", [(float("nan"), 0.0, None), (1.0, -0.1, None), (1.0, 0.1, None)]
)
def test_bad_numbers(scaling, dropout, seed, device):
    with pytest.raises(ValueError):
        call(inputs([4], 6, 5, 2, torch.float32, device=device), scaling, dropout, seed)
