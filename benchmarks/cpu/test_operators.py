"""Micro-benchmarks of each operator.

`python -m pytest benchmarks/cpu/test_operators.py --benchmark-only`
"""

from __future__ import annotations

import pytest
import torch

import lora_kernels  # noqa: F401, registers the operators

SIZE = 4096
TOKENS = 512
LAYERS = 8
ROUNDS = {"rounds": 10, "warmup_rounds": 2}

ranks = pytest.mark.parametrize("r", [16, 128])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ops = torch.ops.lora


def weight(dtype: torch.dtype, size: int = SIZE) -> torch.Tensor:
    """A random weight of a pretrained weight's magnitude."""
    return torch.randn(size, size).div_(size**0.5).to(dtype)


def operands(dtype: torch.dtype, r: int) -> tuple[torch.Tensor, ...]:
    """x, W, A, B; A and B are in fp32."""
    x = torch.randn(TOKENS, SIZE, dtype=dtype)
    return x, weight(dtype), torch.randn(r, SIZE) / SIZE**0.5, torch.randn(SIZE, r) / r**0.5


@ranks
@pytest.mark.benchmark(group="dst_basis 4096")
def test_dst_basis(benchmark, r):
    benchmark.pedantic(ops.dst_basis, (SIZE, r), **ROUNDS)


@dtypes
@pytest.mark.benchmark(group="frobenius_stats 4096×4096")
def test_frobenius_stats(benchmark, dtype):
    benchmark.pedantic(ops.frobenius_stats, ([weight(dtype)],), **ROUNDS)


@ranks
@dtypes
@pytest.mark.benchmark(group="subtract_dst_ 4096×4096")
def test_subtract_dst(benchmark, dtype, r):
    arguments = (weight(dtype), torch.tensor(1e-6, dtype=torch.float64), r)
    benchmark.pedantic(ops.subtract_dst_, arguments, **ROUNDS)


@ranks
@dtypes
@pytest.mark.benchmark(group="loram_init 4096×4096")
def test_loram_init(benchmark, dtype, r):
    pristine = weight(dtype)
    work = torch.empty_like(pristine)
    benchmark.pedantic(ops.loram_init, setup=lambda: ((work.copy_(pristine), r, 1.0), {}), **ROUNDS)


@dtypes
@pytest.mark.benchmark(group=f"loram_init_foreach, {LAYERS} × 1024×1024")
def test_loram_init_foreach(benchmark, dtype):
    pristine = [weight(dtype, 1024) for _ in range(LAYERS)]
    benchmark.pedantic(
        ops.loram_init_foreach,
        setup=lambda: (([w.clone() for w in pristine], 16, 1.0), {}),
        **ROUNDS,
    )


@ranks
@dtypes
@pytest.mark.benchmark(group="linear 4096×4096, 512 tokens, forward")
def test_linear(benchmark, dtype, r):
    x, w, a, b = operands(dtype, r)
    with torch.no_grad():
        benchmark.pedantic(ops.linear, (x, w, None, a, b, 1.0), **ROUNDS)


@ranks
@dtypes
@pytest.mark.benchmark(group="linear 4096×4096, 512 tokens, forward + backward")
def test_linear_backward(benchmark, dtype, r):
    x, w, a, b = operands(dtype, r)
    wanted = [t.requires_grad_() for t in (x, a, b)]
    dy = torch.randn_like(x)
    benchmark.pedantic(
        lambda: torch.autograd.grad(ops.linear(x, w, None, a, b, 1.0), wanted, dy), **ROUNDS
    )
