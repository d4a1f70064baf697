"""What must be equal for all instruction sets: the bits of `dst_basis`, `frobenius_stats` and the
dropout mask. And no result may depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_kernels.ops import cpu_capabilities, cpu_capability, set_cpu_capability

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETS = cpu_capabilities()
if not SETS:
    pytest.skip("the compiled kernels were not built", allow_module_level=True)


@pytest.fixture
def with_set():
    """Runs a function with a set's kernels."""
    before = cpu_capability()

    def run(capability: str, function: Callable):
        set_cpu_capability(capability)
        return function()

    yield run
    set_cpu_capability(before)


def stats(dtype: torch.dtype) -> torch.Tensor:
    weights = []
    for shape in ((37, 53), (256, 300), (5, 1)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        weights += [W, W.T, W[:, ::2]]
    return torch.ops.lora.frobenius_stats(weights)


def dropped(dtype: torch.dtype) -> torch.Tensor:
    ones = torch.ones(70, 130, dtype=dtype)
    zero, eye = torch.zeros(130, 130, dtype=dtype), torch.eye(130)
    return torch.ops.lora.linear(ones, zero, None, eye, eye, 1.0, dropout=0.3, seed=torch.tensor(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", SETS)
def test_bits_are_those_of_the_baseline(capability, dtype, with_set):
    makers = {
        "frobenius_stats": lambda: stats(dtype),
        "dst_basis": lambda: torch.ops.lora.dst_basis(1000, 70, dtype=dtype),
        "dropout": lambda: dropped(dtype),
    }
    for name, make in makers.items():
        assert torch.equal(with_set(capability, make), with_set(SETS[0], make)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", SETS)
def test_threads_do_not_change_a_bit(capability, dtype, with_set):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(300, 200, generator=generator).to(dtype)
    x = torch.randn(65, 200, generator=generator).to(dtype)
    A, B = torch.randn(8, 200, generator=generator), torch.randn(300, 8, generator=generator)

    def results() -> list[torch.Tensor]:
        start = W.clone()
        return [
            *torch.ops.lora.randomized_svd(W, 16),
            *torch.ops.lora.thin_qr(W, 16),
            *torch.ops.lora.loram_init(start, 8, 1.0),
            start,
            # torch's own products give no such guarantee.
            *(
                [torch.ops.lora.linear(x, W, None, A, B, 1.0)]
                if capability in ("baseline", "avx2") and dtype != torch.float32
                else []
            ),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_set(capability, results)
        torch.set_num_threads(3)
        many = with_set(capability, results)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
