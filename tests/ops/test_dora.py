"""`lora::dora_linear` against the paper's formula (arXiv 2402.09353, eq. 5 and section 4.3) in
float64, and against PEFT's layer.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.library import opcheck

from lora_kernels.ops import cpu_capabilities, cpu_capability, set_cpu_capability
from lora_kernels.ops.linear.dora import dora_scale_backward_ref, dora_scale_ref
from lora_kernels.ops.philox import dropout as drop

from ..support.exhaustive import EXHAUSTIVE, thinned
from ..support.oracle import assert_close, to_numpy
from .compiled import needs_compiled
from .test_linear import formula, inputs, largest_ratio

op = torch.ops.lora.dora_linear
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GIVEN = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")
LEARNED = (*GIVEN, "lora_R")


def dora_inputs(lead, n, k, r, dtype, **options):
    t = inputs(lead, n, k, r, dtype, **options)
    t["magnitude"] = torch.rand(n).to(t["lora_A"]) * 3
    return t


def call(t, scaling, dropout=0.0, seed=None):
    extras = (t["start_A"], t["start_B"], t["lora_R"])
    return op(*(t[k] for k in GIVEN), scaling, dropout, seed, *extras)


def exact_norms(t, scaling):
    """‖W + s (B R A − B₀ A₀)‖ of every row, the factors not rounded."""
    f = {k: to_numpy(v) for k, v in t.items() if v is not None}
    update = f["lora_B"] @ f.get("lora_R", np.eye(len(f["lora_A"]))) @ f["lora_A"]
    if "start_A" in f:
        update = update - f["start_B"] @ f["start_A"]
    return np.linalg.norm(f["weight"] + scaling * update, axis=1)


def dora_formula(f, g, mask, s, sign, norms, m):
    """y and all gradients. g is dy, and `m` the magnitude."""
    rest = {k: v for k, v in f.items() if k != "bias"}
    y0 = formula(rest, g, mask, s, sign)["y"]
    values = formula(rest, g * (m / norms), mask, s, sign)
    values["y"] = y0 * (m / norms) + f.get("bias", 0.0)
    values["bias"] = g.sum(0)
    values["magnitude"] = (g * y0).sum(0) / norms
    return values


def oracle(t, dy, scaling, dropout=0.0, seed=None):
    """(result, size): the formula in float64, its factors rounded to the dtype but for the norms;
    and the root of the sum of its squared terms.
    """
    rounded = {k: v.to(t["x"].dtype) for k, v in t.items() if v is not None and k != "magnitude"}
    f = {k: to_numpy(v) for k, v in rounded.items()}
    f["x"] = f["x"].reshape(-1, f["x"].shape[-1])
    g, m = to_numpy(dy).reshape(-1, len(f["weight"])), to_numpy(t["magnitude"])
    mask = np.ones_like(f["x"])
    if dropout:
        mask = to_numpy(drop(torch.from_numpy(mask), dropout, seed.cpu()))
    norms = exact_norms(t, scaling)
    want = dora_formula(f, g, mask, scaling, -1, norms, m)
    squares = {k: v**2 for k, v in f.items()}
    size = dora_formula(squares, g**2, mask**2, scaling**2, 1, norms**2, m**2)
    return want, {k: np.sqrt(v) for k, v in size.items()}


def check(t, scaling, dropout=0.0, seed=None):
    dtype = t["x"].dtype
    leaves = {k: t[k].requires_grad_() for k in LEARNED if t[k] is not None}
    y = call(t, scaling, dropout, seed)
    assert y.dtype == dtype and y.shape == (*t["x"].shape[:-1], t["weight"].shape[0])
    dy = torch.randn(y.shape).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
    want, size = oracle(t, dy, scaling, dropout, seed)
    (m, n), (r, k) = want["y"].shape, t["lora_A"].shape
    for name, got in {"y": y, **dict(zip(leaves, grads, strict=True))}.items():
        # Two roundings more than lora::linear (y0 and dy0), of at most 8.
        ratio = 1.2 * largest_ratio(dtype, m, n, k, r, got.numel(), t["lora_R"] is not None)
        got = to_numpy(got).reshape(want[name].shape)
        assert_close(got, want[name], size[name], ratio, dtype)


BOTH = (False, True)
SIZES = (((2, 35), 33, 70, 5), ((), 9, 12, 3))


@pytest.mark.parametrize(
    ("size", "core", "start", "dropout", "dtype"),
    thinned(itertools.product(SIZES, BOTH, BOTH, (0.0, 0.25), DTYPES)),
)
def test_matches_float64(size, core, start, dropout, dtype, device):
    lead, n, k, r = size
    torch.manual_seed(n + r)
    options = {"bias": not core, "start": start, "core": core, "device": device}
    t = dora_inputs(lead, n, k, r, dtype, **options)
    check(t, 0.7, dropout, torch.tensor(99, device=device) if dropout else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_of_a_wider_dtype(dtype, device):
    t = dora_inputs((4,), 12, 10, 3, dtype, device=device)
    for key in ("lora_A", "lora_B", "magnitude"):
        t[key] = t[key].double()
    check(t, 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [False, True])
def test_is_the_layer_without_dora_at_a_start(start, dtype, device):
    """Bit for bit, if the magnitude is what row_norms says of the same factors."""
    t = dora_inputs((5,), 20, 30, 4, dtype, bias=False, start=start, device=device)
    if start:
        t["lora_A"], t["lora_B"] = t["start_A"].clone(), t["start_B"].clone()
        t["magnitude"] = torch.ops.lora.row_norms(
            t["weight"], t["lora_A"], torch.zeros_like(t["lora_B"]), 0.7
        )
    else:
        norms = torch.ops.lora.row_norms(t["weight"], t["lora_A"], t["lora_B"], 0.7)
        t["magnitude"] = norms
    plain = (*(t[k] for k in GIVEN[:5]), 0.7, 0.0, None, t["start_A"], t["start_B"], None)
    assert torch.equal(call(t, 0.7), torch.ops.lora.linear(*plain))


def test_a_gain_under_autocast_is_that_of_the_given_weight(device):
    t = dora_inputs((9,), 12, 10, 3, torch.float32, bias=False, device=device)
    t["magnitude"] = torch.ops.lora.row_norms(t["weight"], t["lora_A"], t["lora_B"], 1.0)
    learned = [t[k].requires_grad_() for k in ("lora_A", "lora_B", "magnitude")]
    with torch.autocast(device, torch.bfloat16):
        y = call(t, 1.0)
        want = torch.ops.lora.linear(*(t[k] for k in GIVEN[:5]), 1.0)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    grads = torch.autograd.grad(y, learned, torch.ones_like(y))
    assert all(grad.dtype == torch.float32 for grad in grads)
    dy = torch.randn(9, 12).to(device)
    want = torch.autograd.grad(call(t, 1.0), learned, dy)
    y = call(t, 1.0)
    with torch.autocast(device, torch.bfloat16):  # a float32 forward keeps a float32 backward
        got = torch.autograd.grad(y, learned, dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_norm_zero(dtype, device):
    """Their output is the bias, and B and x get the gradients of the layer without a magnitude."""
    t = dora_inputs((6,), 8, 10, 2, dtype, device=device)
    for key in ("weight", "lora_B"):
        t[key][2:4] = 0
    t["magnitude"][2] = 0
    leaves = {k: t[k].requires_grad_() for k in LEARNED if t[k] is not None}
    y = call(t, 0.7)
    assert torch.equal(y[:, 2:4], t["bias"][2:4].expand(6, 2))
    dy = torch.randn(6, 8).to(y)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["magnitude"][2:4] == 0).all() and (grads["magnitude"][4:] != 0).all()
    plain = torch.ops.lora.linear(*(t[k] for k in GIVEN[:5]), 0.7)
    (want,) = torch.autograd.grad(plain, t["lora_B"], dy)
    assert torch.equal(grads["lora_B"][2:4], want[2:4]) and (want[2:4] != 0).any()


@pytest.mark.parametrize("wanted", [("magnitude",), ("lora_B",), ("bias",), ("x",), ("weight",)])
def test_only_the_wanted_gradients(wanted, device):
    t = dora_inputs((6,), 5, 4, 2, torch.float32, device=device)
    for key in wanted:
        t[key].requires_grad_()
    call(t, 1.0).sum().backward()
    assert {k for k in LEARNED if t[k] is not None and t[k].grad is not None} == set(wanted)


def test_layouts(device):
    t = dora_inputs((8,), 12, 10, 3, torch.float32, core=True, device=device)
    want = call(t, 1.0)
    for key in (*GIVEN, "lora_R"):
        strided, padded = dict(t), torch.full([2 * s for s in t[key].shape], float("nan"))
        strided[key] = padded.to(device)[(slice(None, None, 2),) * t[key].dim()]
        strided[key].copy_(t[key])
        torch.testing.assert_close(call(strided, 1.0), want)
    leaves = [t[k].requires_grad_() for k in ("x", "magnitude", "bias")]
    y = call(t, 1.0)
    ones = torch.autograd.grad(y, leaves, torch.ones(1, 1, device=device).expand_as(y))
    torch.testing.assert_close(ones, torch.autograd.grad(call(t, 1.0).sum(), leaves))


@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_empty_batch(lead, device):
    t = dora_inputs(lead, 6, 5, 2, torch.float32, device=device)
    leaves = [t[k].requires_grad_() for k in GIVEN]
    y = call(t, 1.0)
    assert y.shape == (*lead, 6)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(("n", "k", "r"), [(0, 5, 2), (6, 0, 2), (6, 5, 0)])
def test_empty_matrices(n, k, r, device):
    t = dora_inputs((4,), n, 5, r, torch.float32, device=device)
    for key in ("x", "weight", "lora_A"):
        t[key] = t[key][:, :k]
    leaves = [t[key].requires_grad_() for key in GIVEN]
    y = call(t, 1.0)
    assert y.shape == (4, n) and y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
    assert all(grad.isfinite().all() for grad in grads)


def test_saves_one_output_besides_x_and_z(device):
    t = dora_inputs((50,), 40, 30, 4, torch.float32, device=device)
    for key in ("x", "lora_A", "magnitude"):
        t[key].requires_grad_()
    saved = []
    known = {t[k].data_ptr() for k in LEARNED if t[k] is not None}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        call(t, 1.0)
    extra = sorted(tuple(s.shape) for s in saved if s.data_ptr() not in known)
    assert extra == [(40,), (40,), (50, 4), (50, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_passes_agree_with_their_references(rows, dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y0, dy = (torch.randn(rows, 37).to(dtype).to(device) for _ in range(2))
    gain, bias = torch.rand(37).to(wide).to(device), torch.randn(37).to(dtype).to(device)
    for shift in (bias, None):
        got, want = torch.ops.lora._dora_scale(y0, gain, shift), dora_scale_ref(y0, gain, shift)
        torch.testing.assert_close(got, want)
    for args in ((dy, y0, gain, True, True), (dy, None, gain, False, True), (dy, y0, gain, 0, 0)):
        got = torch.ops.lora._dora_scale_backward(*args)
        torch.testing.assert_close(got, dora_scale_backward_ref(*args))


@needs_compiled("_dora_scale_backward")
def test_threads_do_not_change_a_bit():
    y0, dy, gain = torch.randn(200, 37), torch.randn(200, 37), torch.rand(37)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.lora._dora_scale_backward(dy, y0, gain, True, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck(device):
    t = dora_inputs((4,), 6, 5, 2, torch.float32, start=True, core=True, device=device)
    for key in ("x", "lora_A", "lora_B", "magnitude"):
        t[key].requires_grad_()
    seed = torch.tensor(3, device=device)
    extras = (0.5, 0.2, seed, t["start_A"], t["start_B"], t["lora_R"])
    opcheck(op, (*(t[k] for k in GIVEN), *extras))
    y0, gain = torch.randn(4, 6).to(device), torch.rand(6).to(device)
    opcheck(torch.ops.lora._dora_scale, (y0, gain, t["bias"].detach()))
    opcheck(torch.ops.lora._dora_scale_backward, (y0, y0, gain, True, False))


def test_differentiates_once(device):
    t = dora_inputs((3,), 6, 5, 2, torch.float64, device=device)
    A = t["lora_A"].requires_grad_()
    (grad,) = torch.autograd.grad(call(t, 1.0).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    t = dora_inputs((4,), 6, 5, 2, torch.float32, start=True, core=True, device=device)
    leaves = [t[k].requires_grad_() for k in ("x", "lora_A", "lora_B", "lora_R", "magnitude")]
    options = {"fullgraph": True, "backend": "inductor" if EXHAUSTIVE else "aot_eager"}
    run = torch.compile(lambda: call(t, 0.5).square().sum(), dynamic=dynamic, **options)
    got = torch.autograd.grad(run(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(call(t, 0.5).square().sum(), leaves))


def test_meta_and_inference_mode(device):
    assert call(dora_inputs((4,), 6, 5, 2, torch.half, device="meta"), 1.0).shape == (4, 6)
    with torch.inference_mode():
        t = dora_inputs((4,), 6, 5, 2, torch.float32, device=device)
        assert call(t, 1.0).is_inference()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"magnitude": torch.ones(5)}, ValueError, r"magnitude must be \[6\]"),
        ({"magnitude": torch.ones(6, 1)}, ValueError, "magnitude"),
        ({"magnitude": torch.ones(6, dtype=torch.int8)}, TypeError, "magnitude must be a real"),
        ({"magnitude": torch.ones(6, device="meta")}, ValueError, "magnitude is on meta"),
        ({"x": torch.ones(4, 6)}, ValueError, r"x must be \[..., 5\]"),
        ({"lora_A": torch.ones(2, 4)}, ValueError, "lora_A"),
        ({"start_A": torch.ones(2, 5)}, ValueError, "both"),
    ],
)
def test_bad_input(change, error, match):
    t = dora_inputs((4,), 6, 5, 2, torch.float32) | change
    with pytest.raises(error, match=match):
        call(t, 1.0)


@pytest.mark.parametrize("capability", cpu_capabilities()[1:])
def test_every_instruction_set_agrees_with_peft(capability):
    """PEFT's layer, whose output has the paper's gradients when it does not drop."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24))
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, use_dora=True)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.nn.init.normal_(B)
    torch.nn.init.uniform_(magnitude)
    x, dy = torch.randn(7, 40, requires_grad=True), torch.randn(7, 24)
    want = layer(x)
    leaves = (x, A, B, magnitude)
    before = cpu_capability()
    set_cpu_capability(capability)
    try:
        base = layer.get_base_layer()
        got = op(x, base.weight, base.bias, A, B, magnitude, 1.5)
        grads = torch.autograd.grad(got, leaves, dy)
    finally:
        set_cpu_capability(before)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, torch.autograd.grad(want, leaves, dy), rtol=1e-4, atol=1e-5)
