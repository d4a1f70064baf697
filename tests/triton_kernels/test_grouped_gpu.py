"""What only a GPU can show of `lora::grouped_linear`: no waiting, graphs, large sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from .grouped_cases import LEARNED, Case, call, check, inputs
from .test_gpu import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = [{}, {"tokens": 300, "tail": 40, "start": True}, {"transposed": True, "tokens": 500}]


def both(t: Case, dy: torch.Tensor, dropout: float, seed: torch.Tensor) -> list[torch.Tensor]:
    """y and all gradients."""
    leaves = [t[name] for name in LEARNED]
    y = call(t, 0.7, dropout, seed)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def case(dropout: float, **kind: object) -> tuple[Case, torch.Tensor, torch.Tensor]:
    t = inputs((300, 0, 130, 7, 1500), 256, 384, 16, torch.bfloat16, device="cuda", **kind)
    for name in LEARNED:
        t[name].requires_grad_()
    size = len(t["x"] if t["rows"] is None else t["rows"])
    dy = torch.randn(size, 256, device="cuda", dtype=torch.bfloat16)
    return t, dy, torch.tensor(5, device="cuda")


@pytest.mark.parametrize("r", [16, 61])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_many_rows(kind, r, device):
    """Of several tiles and chunks."""
    dropout = 0.1 if kind.get("transposed") else 0.0
    t = inputs((300, 0, 130, 7, 1500), 256, 384, r, torch.bfloat16, device="cuda", **kind)
    check(t, 0.7, dropout, torch.tensor(5, device="cuda") if dropout else None)


WRONG = """
import torch, lora_kernels
x, W = (torch.zeros(*shape, device="cuda").bfloat16() for shape in ((4, 16), (2, 16, 16)))
A, B = torch.zeros(2, 8, 16, device="cuda"), torch.zeros(2, 16, 8, device="cuda")
ends = torch.tensor({ends}, device="cuda", dtype=torch.int32)
rows = torch.tensor({rows}, device="cuda")
torch.ops.lora.grouped_linear(x, W, None, ends, rows, A, B, 1.0)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("ends", "rows", "message"),
    [
        ([3, 2], [0, 1, 2], "ends must not decrease"),
        ([3, 4], [0, 1, 2], "ends must not decrease, nor exceed the number of rows"),
        ([1, 3], [0, 4, 2], "rows must be row numbers of x"),
        ([1, 3], [0, -1, 2], "rows must be row numbers of x"),
    ],
)
def test_wrong_indices_end_the_program(ends, rows, message):
    """In a process of its own: nothing else can use a CUDA context after that."""
    program = WRONG.format(ends=ends, rows=rows)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_waits_for_nothing(kind, dropout, device):
    t, dy, seed = case(dropout, **kind)
    want = both(t, dy, dropout, seed)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = both(t, dy, dropout, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_graph_takes_another_routing(kind, device):
    """A replay uses the rows, and the experts' shares of them, of that moment."""
    t, dy, seed = case(0.0, **kind)
    kept: dict[str, list[torch.Tensor]] = {}
    graph = captured(lambda: kept.update(got=both(t, dy, 0.0, seed)))
    for counts in ((0, 1000, 0, 0, 900), (1, 2, 3, 1000, 5), (0, 0, 0, 0, 0)):
        t["ends"].copy_(torch.tensor(counts).cumsum(0))
        if t["rows"] is not None:
            t["rows"].random_(len(t["x"]))
        graph.replay()
        want = both(t, dy, 0.0, seed)
        assert all(torch.equal(a, b) for a, b in zip(kept["got"], want, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_past_two_to_the_31_elements(transposed, device):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    E, n, k, r = 66, 8192, 4096, 16  # 2^31 + 0.07 M elements, 4.1 GiB
    shape = (E, k, n) if transposed else (E, n, k)
    W = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    W = W.transpose(1, 2) if transposed else W
    W[-1] = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / 64
    ends = torch.zeros(E, device="cuda", dtype=torch.int32)
    ends[-1] = 200
    x = torch.randn(200, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    A = torch.randn(E, r, k, device="cuda").div_(64).requires_grad_()
    B = torch.randn(E, n, r, device="cuda").requires_grad_()
    y = torch.ops.lora.grouped_linear(x, W, None, ends, None, A, B, 1.0)
    want = x.double() @ W[-1].double().T + x.double() @ A[-1].double().T @ B[-1].double().T
    # Three roundings to bfloat16 (A, z, y), of a result of size 4.
    torch.testing.assert_close(y.double(), want, rtol=2**-6, atol=2**-4)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), torch.ones_like(y))
    dz = B[-1].double().sum(0)
    dense = W[-1].double().sum(0) + dz @ A[-1].double()
    torch.testing.assert_close(dx.double(), dense.expand_as(dx), rtol=2**-6, atol=0.5)
    assert not dA[:-1].any() and not dB[:-1].any() and dA[-1].any() and dB[-1].any()
