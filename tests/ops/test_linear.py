from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops import cpu_capabilities, cpu_capability, set_cpu_capability
from lora_kernels.ops.linear import linear_backward_ref, linear_forward_ref
from lora_kernels.ops.philox import dropout as drop

from ..support.oracle import ROUNDING, assert_close, to_numpy

op = torch.ops.lora.linear
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GRADS = ("x", "weight", "bias", "lora_A", "lora_B")
LEARNED = (*GRADS, "lora_R")


def inputs(lead, n, k, r, dtype, *, bias=True, start=False, core=False, device="cpu"):
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    make = lambda *shape: torch.randn(*shape).to(device)  # noqa: E731
    tensors = {
        "x": make(*lead, k).to(dtype),
        "weight": (make(n, k) / k**0.5).to(dtype),
        "bias": make(n).to(dtype) if bias else None,
        "lora_A": (make(r, k) / k**0.5).to(factor),
        "lora_B": make(n, r).to(factor),
    }
    tensors["start_A"] = (make(r, k) / k**0.5).to(factor) if start else None
    tensors["start_B"] = make(n, r).to(factor) if start else None
    tensors["lora_R"] = (make(r, r) / r**0.5).to(factor) if core else None
    return tensors


def call(t, scaling, dropout=0.0, seed=None):
    extras = (t["start_A"], t["start_B"], t["lora_R"])
    return op(*(t[k] for k in GRADS), scaling, dropout, seed, *extras)


def formula(f, g, mask, s, sign):
    """Y and all six gradients; `sign` is the sign of the start's product."""
    x, W, A, B = f["x"], f["weight"], f["lora_A"], f["lora_B"]
    R = f.get("lora_R", np.eye(len(A)))
    dropped = x * mask
    values = {
        "y": x @ W.T + s * dropped @ A.T @ R.T @ B.T + f.get("bias", 0.0),
        "x": g @ W + s * mask * (g @ B @ R @ A),
        "weight": g.T @ x,
        "bias": g.sum(0),
        "lora_A": s * (g @ B @ R).T @ dropped,
        "lora_B": s * g.T @ (dropped @ A.T @ R.T),
        "lora_R": s * (g @ B).T @ (dropped @ A.T),
    }
    if "start_A" in f:
        values["y"] += sign * s * x @ f["start_A"].T @ f["start_B"].T
        values["x"] += sign * s * g @ f["start_B"] @ f["start_A"]
    return values


def oracle(t, dy, scaling, dropout=0.0, seed=None):
    """(result, size): the formula in float64, with factors rounded to the dtype; and the root of
    the sum of its squared terms, the size of the result had none of them canceled.
    """
    f = {k: to_numpy(v.to(t["x"].dtype)) for k, v in t.items() if v is not None}
    f["x"] = f["x"].reshape(-1, f["x"].shape[-1])
    g = to_numpy(dy).reshape(-1, f["weight"].shape[0])
    mask = np.ones_like(f["x"])
    if dropout:
        mask = to_numpy(drop(torch.from_numpy(mask), dropout, seed.cpu()))
    squares = {k: v**2 for k, v in f.items()}
    size = formula(squares, g**2, mask**2, scaling**2, 1)
    return formula(f, g, mask, scaling, -1), {k: np.sqrt(v) for k, v in size.items()}


def largest_ratio(dtype, m, n, k, r, entries, core=False) -> float:
    """Bound on ‖error‖ / ‖size‖ from independent roundings, each uniform in ± u times its value.

    At most 7 roundings to the dtype occur in sequence (dx: dz, s dz, dz A, its dropout, and the sum
    of three products twice, the first of them rounded itself), 8 with R (dz R), and m + n + k + r
    in the accumulators (the float64 oracle's included: a partial sum is half the whole in the mean
    square), r more with R. Each adds u² / 3 to (error / size)², if values are as large as their
    terms. Where few numbers, d, determine a result, they may be larger: the norm of d normal
    numbers varies by 1 / √(2d) of itself, the error of dz A (three such factors) by √1.5 / √d. The
    bound leaves 6.5 times that, 8 / √d.
    """
    accumulated = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    sums = m + n + k + (2 if core else 1) * r
    rms = math.sqrt(((8 if core else 7) * ROUNDING[dtype] ** 2 + sums * accumulated**2) / 3)
    return rms * (1 + 8 / math.sqrt(min(entries, r * min(m, n, k))))


def check(t, scaling, dropout=0.0, seed=None) -> None:
    dtype = t["x"].dtype
    leaves = {k: t[k].requires_grad_() for k in LEARNED if t[k] is not None}
    y = call(t, scaling, dropout, seed)
    assert y.dtype == dtype and y.shape == (*t["x"].shape[:-1], t["weight"].shape[0])
    dy = torch.randn(y.shape, dtype=dtype).to(y.device)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
    want, size = oracle(t, dy, scaling, dropout, seed)
    (m, n), (r, k) = want["y"].shape, t["lora_A"].shape
    for name, got in {"y": y, **dict(zip(leaves, grads, strict=True))}.items():
        ratio = largest_ratio(dtype, m, n, k, r, got.numel(), t["lora_R"] is not None)
        got = to_numpy(got).reshape(want[name].shape)
        assert_close(got, want[name], size[name], ratio, dtype)


@given(
    st.sampled_from([(5,), (1,), (2, 3), (), (2, 2, 2), (70,)]),
    st.integers(1, 130),
    st.integers(1, 130),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.25]),
)
def test_matches_float64(device, lead, n, k, r, dtype, bias, start, core, dropout):
    torch.manual_seed(n * k + r)
    options = {"bias": bias, "start": start, "core": core, "device": device}
    t = inputs(lead, n, k, min(r, n, k), dtype, **options)
    check(t, 0.7, dropout, torch.tensor(99, device=device) if dropout else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_large(dtype, dropout, start, core, device):
    t = inputs((3, 85), 512, 768, 16, dtype, start=start, core=core, device=device)
    check(t, 2.0, dropout, torch.tensor(5, device=device) if dropout else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", cpu_capabilities())
def test_every_instruction_set(capability, dtype):
    """With more rows than the widened products process at once, x transposed in memory and dy an
    expanded number.
    """
    before = cpu_capability()
    set_cpu_capability(capability)
    try:
        check(inputs((70,), 96, 130, 4, dtype), 0.7)
        t = inputs((1100,), 4200, 16, 4, dtype)
        t["x"] = t["x"].T.contiguous().T.requires_grad_()
        t["weight"].requires_grad_()
        y = call(t, 0.7)
        dy = torch.ones(1, 1, dtype=dtype).expand_as(y)
        grads = dict(
            zip(("x", "weight"), torch.autograd.grad(y, [t["x"], t["weight"]], dy), strict=True)
        )
    finally:
        set_cpu_capability(before)
    want, size = oracle(t, dy, 0.7)
    (m, n), (r, k) = want["y"].shape, t["lora_A"].shape
    for name, got in {"y": y, **grads}.items():
        ratio = largest_ratio(dtype, m, n, k, r, got.numel())
        assert_close(to_numpy(got), want[name], size[name], ratio, dtype)


def check_columns(t, at, tolerance) -> None:
    """Two parts of the columns, from 0 and from `at` on, with the results and gradients of all of
    them; the parts of y add up.
    """
    seed, whole = torch.tensor(2**40 + 9, device=t["x"].device), slice(None)
    results = []
    for columns in (whole, slice(at), slice(at, None)):
        part = dict(t)
        for name in ("x", "weight", "lora_A", "start_A"):
            part[name] = None if t[name] is None else t[name][..., columns].contiguous()
        leaves = [part[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
        extras = (0.7, 0.4, seed, part["start_A"], part["start_B"], part["lora_R"])
        y = op(*(part[k] for k in GRADS), *extras, columns.start or 0)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    both = [
        combine(a.detach().double(), b.detach().double())
        for combine, a, b in zip(
            (torch.add, _beside, _beside, torch.add), *results[1:], strict=True
        )
    ]
    for got, want in zip(both, results[0], strict=True):
        torch.testing.assert_close(got, want.detach().double(), rtol=tolerance, atol=tolerance)


def _beside(left, right):
    return torch.cat([left, right], -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("k", "at"), [(24, 4), (200, 132), (9, 8)])
def test_the_mask_of_some_columns(k, at, dtype, device):
    t = inputs((2, 5), 6, k, 3, dtype, bias=False, start=True, core=True, device=device)
    check_columns(t, at, 1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("offset", [-4, 2])
def test_bad_argument_col_offset(offset):
    t = inputs((4,), 6, 5, 2, torch.float32)
    with pytest.raises(ValueError, match=f"multiple of 4 and at least 0, got {offset}"):
        op(*(t[k] for k in GRADS), 1.0, col_offset=offset)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_reference_agrees_with_the_kernel(start, core, dropout, device):
    t = inputs((11,), 20, 30, 4, torch.float64, start=start, core=core, device=device)
    seed = torch.tensor(3, device=device)
    args = [t[k] for k in GRADS]
    extras = (0.5, dropout, seed, t["start_A"], t["start_B"], t["lora_R"])
    got = torch.ops.lora.linear_forward(*args, *extras, 8)
    want = linear_forward_ref(*args, *extras, 8)
    torch.testing.assert_close(got, want)
    x, weight, _, A, B = args
    grad = torch.randn(11, 20, dtype=torch.float64).to(device)
    backward = (grad, x, weight, A, B, got[1], *extras)
    alone = [[i == wanted for i in range(6)] for wanted in range(6)]
    for needs in ([True] * 6, [True, False, True, False, True, False], *alone):
        needs = [need and (core or k < 5) for k, need in enumerate(needs)]
        torch.testing.assert_close(
            torch.ops.lora.linear_backward(*backward, needs, 8),
            linear_backward_ref(*backward, needs, 8),
        )


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("lead", [(11,), (2, 3), ()])
def test_plain_is_the_forward_without_dropout(lead, start, core, device):
    t = inputs(lead, 20, 30, 4, torch.float64, start=start, core=core, device=device)
    extras = (t["start_A"], t["start_B"], t["lora_R"])
    args = [t[k] for k in GRADS]
    got = torch.ops.lora._linear_plain(*args, 0.5, *extras)
    torch.testing.assert_close(got, linear_forward_ref(*args, 0.5, 0.0, None, *extras))
    opcheck(torch.ops.lora._linear_plain, (*args, 0.5, *extras))


def test_a_seed_on_another_device_is_refused():
    t = inputs((2,), 3, 4, 1, torch.float32, device="meta")
    with pytest.raises(ValueError, match="seed is on cpu, x on meta"):
        call(t, 1.0, 0.5, torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(start, core, dropout, device):
    t = inputs((2, 3), 5, 7, 2, torch.float64, start=start, core=core, device=device)
    seed = torch.tensor(11, device=device)
    leaves = [t[k].requires_grad_() for k in (LEARNED if core else GRADS)]
    assert torch.autograd.gradcheck(
        lambda *a: op(*a[:5], 1.3, dropout, seed, t["start_A"], t["start_B"], *a[5:]), leaves
    )


def test_start_cancels_the_adapter(device):
    """With A = A₀ and B = B₀ the implicit layer computes the base to float32 rounding, however
    large s·B₀A₀ is beside W, and to the last bit of bfloat16 nearly everywhere.
    """
    t = inputs((64,), 96, 128, 16, torch.float32, bias=False, device=device)
    t["start_A"], t["start_B"] = t["lora_A"], t["lora_B"]
    base = t["x"] @ t["weight"].T
    assert (call(t, 8.0) - base).norm() <= 1e-5 * base.norm()
    for key in ("x", "weight"):
        t[key] = t[key].bfloat16()
    base = t["x"] @ t["weight"].T
    assert (call(t, 8.0) != base).double().mean() < 0.02


@pytest.mark.parametrize("core", [False, True])
def test_saves_x_and_z_only(core, device):
    t = inputs((50,), 40, 30, 4, torch.float32, core=core, device=device)
    t["x"].requires_grad_()
    t["lora_A"].requires_grad_()
    saved = []
    known = {t[k].data_ptr() for k in LEARNED if t[k] is not None}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        call(t, 1.0)
    extra = [tuple(s.shape) for s in saved if s.data_ptr() not in known]
    assert extra == [(50, 4)]


@pytest.mark.sanitize
def test_only_the_wanted_gradients(device):
    t = inputs((6,), 5, 4, 2, torch.float32, device=device)
    t["lora_B"].requires_grad_()
    call(t, 1.0).sum().backward()
    assert t["lora_B"].grad is not None and t["x"].grad is None
    t = inputs((6,), 5, 4, 2, torch.float32, core=True, device=device)
    t["lora_R"].requires_grad_()
    call(t, 1.0).sum().backward()
    assert t["lora_R"].grad is not None and t["lora_A"].grad is None


@pytest.mark.sanitize
def test_layouts(device):
    t = inputs((8,), 12, 10, 3, torch.float32, core=True, device=device)
    want = call(t, 1.0)
    for key in ("x", "weight", "lora_A", "lora_B", "lora_R"):
        strided = dict(t)
        strided[key] = t[key].T.contiguous().T
        torch.testing.assert_close(call(strided, 1.0), want)
        padded = torch.full([2 * s for s in t[key].shape], float("nan"), device=device)
        padded[::2, ::2] = t[key]
        strided[key] = padded[::2, ::2]
        torch.testing.assert_close(call(strided, 1.0), want)
    expanded = dict(t, x=t["x"][:1].expand(8, 10))
    torch.testing.assert_close(call(expanded, 1.0), want[:1].expand(8, 12))
    y = call(dict(t, x=t["x"].requires_grad_()), 1.0)
    y.sum().backward()  # an expanded gradient, stride 0


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_empty_batch(lead, dropout, device):
    t = inputs(lead, 6, 5, 2, torch.float32, device=device)
    seed = torch.tensor(1, device=device)
    reference = [t[k] for k in GRADS]
    y, z = linear_forward_ref(*reference, 1.0, dropout, seed, None, None, None)
    assert y.shape == (*lead, 6) and z.shape == (0, 2)
    t["x"].requires_grad_()
    t["lora_A"].requires_grad_()
    y = call(t, 1.0, dropout, seed)
    assert y.shape == (*lead, 6)
    y.sum().backward()
    assert (t["lora_A"].grad == 0).all() and t["x"].grad.shape == t["x"].shape
    t = inputs(lead, 6, 5, 2, torch.float32, core=True, device=device)
    t["lora_R"].requires_grad_()
    call(t, 1.0, dropout, seed).sum().backward()
    assert (t["lora_R"].grad == 0).all()


def test_autocast(device):
    t = inputs((9,), 12, 10, 3, torch.float32, core=True, device=device)
    t["lora_A"].requires_grad_()
    t["lora_R"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = call(t, 1.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert t["lora_A"].grad.dtype == t["lora_R"].grad.dtype == torch.float32
    with torch.autocast(device, enabled=False):
        assert call(t, 1.0).dtype == torch.float32


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_opcheck(dropout, core, device):
    t = inputs((4,), 6, 5, 2, torch.float32, start=True, core=core, device=device)
    for key in ("x", "lora_A", "lora_B", "lora_R"):
        if t[key] is not None:
            t[key].requires_grad_()
    seed = torch.tensor(3, device=device)
    args = [t[k] for k in GRADS]
    extras = (0.5, dropout, seed, t["start_A"], t["start_B"], t["lora_R"])
    opcheck(op, (*args, *extras))
    opcheck(op, (*args, *extras, 4))
    plain = [a if a is None else a.detach() for a in args]
    R = t["lora_R"].detach() if core else None
    extras = (0.5, dropout, seed, t["start_A"], t["start_B"], R)
    opcheck(torch.ops.lora.linear_forward, (*plain, *extras, 4))
    z, grad = torch.randn(4, 2).to(device), torch.randn(4, 6).to(device)
    x, weight, _, A, B = plain
    opcheck(
        torch.ops.lora.linear_backward,
        (grad, x, weight, A, B, z, *extras, [True, False, True, False, True, core], 4),
    )


def test_differentiates_once(device):
    t = inputs((3,), 6, 5, 2, torch.float64, device=device)
    A = t["lora_A"].requires_grad_()
    (grad,) = torch.autograd.grad(call(t, 1.0).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_compile(dynamic, core, device):
    t = inputs((4,), 6, 5, 2, torch.float32, core=core, device=device)
    keys = ("x", "lora_A", "lora_B", *(("lora_R",) if core else ()))
    leaves = [t[k].requires_grad_() for k in keys]
    run = torch.compile(lambda: call(t, 0.5).square().sum(), fullgraph=True, dynamic=dynamic)
    got = torch.autograd.grad(run(), leaves)
    want = torch.autograd.grad(call(t, 0.5).square().sum(), leaves)
    torch.testing.assert_close(got, want)


def test_meta_and_inference_mode(device):
    assert call(inputs((4,), 6, 5, 2, torch.half, device="meta"), 1.0).shape == (4, 6)
    with torch.inference_mode():
        assert call(inputs((4,), 6, 5, 2, torch.float32, device=device), 1.0).is_inference()


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda: {"x": torch.ones(4, 6)}, ValueError, r"x must be \[..., 5\]"),
        (lambda: {"x": torch.ones(())}, ValueError, "x must be"),
        (lambda: {"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "real float"),
        (lambda: {"x": torch.ones(4, 5).half()}, TypeError, "autocast"),
        (lambda: {"weight": torch.ones(5)}, ValueError, "2-D"),
        (lambda: {"bias": torch.ones(7)}, ValueError, "bias"),
        (lambda: {"bias": torch.ones(6).double()}, TypeError, "bias"),
        (lambda: {"lora_A": torch.ones(2, 4)}, ValueError, "lora_A"),
        (lambda: {"lora_A": torch.ones(2)}, ValueError, "lora_A"),
        (lambda: {"lora_B": torch.ones(6, 3)}, ValueError, "lora_B"),
        (lambda: {"lora_A": torch.ones(2, 5, device="meta")}, ValueError, "lora_A is on meta"),
        (lambda: {"weight": torch.ones(6, 5, device="meta")}, ValueError, "weight is on meta"),
        (lambda: {"lora_B": torch.ones(6, 2, dtype=torch.int8)}, TypeError, "lora_B"),
        (lambda: {"start_A": torch.ones(2, 5)}, ValueError, "both"),
        (lambda: {"start_A": torch.ones(3, 5), "start_B": torch.ones(6, 2)}, ValueError, "start_A"),
        (lambda: {"lora_R": torch.ones(2, 3)}, ValueError, r"lora_R must be \[2, 2\]"),
        (lambda: {"lora_R": torch.ones(2)}, ValueError, "lora_R"),
        (lambda: {"lora_R": torch.ones(2, 2, device="meta")}, ValueError, "lora_R is on meta"),
        (lambda: {"lora_R": torch.ones(2, 2, dtype=torch.int8)}, TypeError, "lora_R"),
    ],
)
def test_bad_input(change, error, match, device):
    with torch.device(device):
        t = inputs((4,), 6, 5, 2, torch.float32, device=device) | change()
    with pytest.raises(error, match=match):
        call(t, 1.0)


@pytest.mark.parametrize(
    "scaling,dropout,seed", [(float("nan"), 0.0, None), (1.0, -0.1, None), (1.0, 0.1, None)]
)
def test_bad_numbers(scaling, dropout, seed, device):
    with pytest.raises(ValueError):
        call(inputs((4,), 6, 5, 2, torch.float32, device=device), scaling, dropout, seed)


def test_backward_under_autocast_is_that_of_the_forward(device):
    """Autocast applies to calls within it: a float32 forward keeps a float32 backward."""
    t = inputs((20,), 32, 48, 4, torch.float32, device=device)
    leaves = [t[k].requires_grad_() for k in GRADS]
    dy = torch.randn(20, 32).to(device)
    want = torch.autograd.grad(call(t, 0.5), leaves, dy)
    y = call(t, 0.5)
    with torch.autocast(device, torch.bfloat16):
        got = torch.autograd.grad(y, leaves, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
