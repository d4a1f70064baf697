"""What only a GPU can show: graphs, sizes beyond 2^31, launches, other streams and devices."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import LoRALinear
from lora_kernels.triton_kernels.linear import choice, gemm, operator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ops = torch.ops.lora


def captured(function) -> torch.cuda.CUDAGraph:
    """`function` captured in a CUDA graph, after the required warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def test_init_in_a_graph():
    pristine = [torch.randn(256, 512, device="cuda"), torch.randn(300, 100, device="cuda").half()]
    weights = [torch.empty_like(w) for w in pristine]
    out = {}

    def run() -> None:
        for weight, source in zip(weights, pristine, strict=True):
            weight.copy_(source)
        out["start"] = ops.loram_init_foreach(weights, 8, check=False)

    graph = captured(run)
    for factor in (1.0, 3.0):  # a replay uses the weights of that moment
        for source in pristine:
            source.mul_(factor)
        graph.replay()
        want = [w.clone() for w in pristine]
        lora_A, lora_B, beta = ops.loram_init_foreach(want, 8)
        torch.cuda.synchronize()
        for got, expected in zip(
            [*weights, *out["start"][0], *out["start"][1], out["start"][2]],
            [*want, *lora_A, *lora_B, beta],
            strict=True,
        ):
            assert torch.equal(got, expected)


def test_init_waits_for_nothing_without_the_check():
    weights = [torch.randn(512, 512, device="cuda") for _ in range(3)]
    ops.loram_init_foreach(weights, 8, check=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.loram_init_foreach(weights, 8, check=False)
        torch.randn(4, device="cuda").double()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_have_the_same_bits_whoever_arrives_last():
    """The last program adds up totals that thousands of others wrote just before."""
    one = torch.randn(8192, 8192, device="cuda")
    many = [torch.randn(512, 300 + 100 * k, device="cuda").half() for k in range(40)]
    for weights in ([one], many):
        want = ops.frobenius_stats(weights)
        exact = torch.stack([w.double().square().sum() for w in weights])
        torch.testing.assert_close(want[:, 1], exact, rtol=1e-13, atol=0)
        for _ in range(200):
            assert torch.equal(ops.frobenius_stats(weights), want)


def test_statistics_of_two_streams_and_a_graph_at_once():
    weights = [torch.randn(4096, 4096, device="cuda") for _ in range(3)]
    want = [ops.frobenius_stats([w]) for w in weights]
    out = {}
    graph = captured(lambda: out.update(stats=ops.frobenius_stats(weights[2:])))
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for weight, stream in zip(weights[:2], streams, strict=False):
            with torch.cuda.stream(stream):
                got.append(ops.frobenius_stats([weight]))
        with torch.cuda.stream(streams[2]):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(stats, want[k % 2]) for k, stats in enumerate(got))
    assert torch.equal(out["stats"], want[2])


@pytest.mark.parametrize("M", [1, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_in_a_graph(M, dtype):
    linear = torch.nn.Linear(512, 768, dtype=dtype, device="cuda").requires_grad_(False)
    layer = LoRALinear.from_linear(linear, r=16, lora_alpha=16)
    x = torch.randn(M, 512, device="cuda", dtype=dtype)
    with torch.no_grad():
        out = {}
        graph = captured(lambda: out.update(y=layer(x)))
        x.normal_()
        graph.replay()
        # Two implementations of y may differ by a few roundings of bfloat16, for sums of size 1.
        torch.testing.assert_close(out["y"], layer(x), rtol=2e-2, atol=2e-2)


def test_decode_is_at_most_two_kernels(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_TUNE", "0")
    monkeypatch.setattr(choice, "CHOSEN", {})
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    W = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16)
    A, B = torch.randn(16, 1024, device="cuda"), torch.randn(2048, 16, device="cuda")
    ops.linear(x, W, None, A, B, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.linear(x, W, None, A, B, 1.0)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 2, [e.name for e in kernels]


@pytest.mark.skipif(
    not (torch.cuda.is_available() and operator._is_hopper(torch.device("cuda", 0))),
    reason="needs Hopper or later",
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("M", [128, 8192])
def test_the_overlapped_product_waits_for_z(M, dropout):
    """It starts before z is written, when the memory of z still holds the previous round's z, of
    another A.
    """
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    W = (torch.randn(4096, 4096, device="cuda") / 64).to(torch.bfloat16)
    A, B = torch.randn(16, 4096, device="cuda") / 64, torch.randn(4096, 16, device="cuda")
    seed = torch.tensor(7, device="cuda")
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    for _ in range(20):
        A.normal_(std=1 / 64)
        arguments = (programs, x, W, False, A, B, 2.0, None, dropout, seed)
        y, z = gemm.overlapped(*arguments, True)
        want_y, want_z = gemm.overlapped(*arguments, False)  # one after the other
        assert torch.equal(z, want_z) and torch.equal(y, want_y)
        del y, z, want_y, want_z


def test_weights_past_two_to_the_31_elements():
    n, m, rank = 2**16 + 8, 2**15 + 8, 16  # 2^31 + 0.8 M elements, 4 GiB
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    weight = torch.zeros(n, m, dtype=torch.bfloat16, device="cuda")
    weight[-1, -1] = 3.0
    stats = ops.frobenius_stats([weight]).cpu()
    assert stats.tolist() == [[3.0, 9.0]]
    coefficient = torch.tensor(1e4, dtype=torch.float64, device="cuda")
    ops.subtract_dst_(weight, coefficient, rank)
    for rows in (slice(0, 64), slice(n - 64, n)):
        left = ops.dst_basis(n, rank, dtype=torch.float64, device="cuda")[rows]
        right = ops.dst_basis(m, rank, dtype=torch.float64, device="cuda")
        want = -1e4 * left @ right.T
        if rows.stop == n:
            want[-1, -1] += 3.0
        # One rounding to bfloat16 is half of this.
        torch.testing.assert_close(weight[rows].double(), want, rtol=2**-7, atol=1e-6)


def test_norms_past_two_to_the_31_elements():
    n, m = 2**16 + 8, 2**15 + 8
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    weight = torch.zeros(n, m, dtype=torch.bfloat16, device="cuda")
    weight[-1, -1], weight[-2, -1], weight[0, 0] = 3.0, 4.0, 2.0
    right, left = torch.randn(16, m, device="cuda"), torch.zeros(n, 16, device="cuda")
    for W in (weight, weight.view(m, n).T):  # [n, m], by rows and by columns
        norms = ops.row_norms(W, right, left, 1.0)
        torch.testing.assert_close(norms, torch.linalg.vector_norm(W, dim=1, dtype=torch.float32))


def test_dora_layer_in_a_graph():
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    W = torch.randn(768, 512, device="cuda", dtype=torch.bfloat16)
    A, B = torch.randn(16, 512, device="cuda"), torch.randn(768, 16, device="cuda")
    m, out = torch.rand(768, device="cuda"), {}
    graph = captured(lambda: out.update(y=ops.dora_linear(x, W, None, A, B, m, 0.5)))
    for tensor in (x, W, A, B, m):
        tensor.mul_(1.5)
    graph.replay()
    want = ops.dora_linear(x, W, None, A, B, m, 0.5)
    torch.testing.assert_close(out["y"], want, rtol=2e-2, atol=2e-2)


def test_on_another_stream():
    weight = torch.randn(1024, 1024, device="cuda")
    want = weight.clone()
    _, _, beta = ops.loram_init(want, 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _, _, got = ops.loram_init(weight, 16)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(weight, want) and torch.equal(got, beta)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    weight = torch.randn(256, 256)
    want = weight.clone().cuda(0)
    ops.loram_init(want, 8)
    got = weight.cuda(1)
    lora_A, _, _ = ops.loram_init(got, 8)
    assert lora_A.device == got.device and torch.equal(got.cpu(), want.cpu())


@pytest.mark.parametrize("r", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_of_a_training_step_is_the_same_bits_twice(r, dtype):
    x = torch.randn(1024, 512, device="cuda", dtype=dtype, requires_grad=True)
    W = torch.randn(768, 512, device="cuda", dtype=dtype)
    A = (torch.randn(r, 512, device="cuda") / 20).requires_grad_()
    B = (torch.randn(768, r, device="cuda") / 20).requires_grad_()
    runs = []
    for _ in range(3):  # the first call times the implementations
        y = ops.linear(x, W, None, A, B, 0.5)
        runs.append((y, *torch.autograd.grad(y, (x, A, B), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*runs[1:], strict=True))
