"""What must not differ between the instruction sets to the last bit."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import cpu_capabilities, set_cpu_capability

ops = torch.ops.lora
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dst_basis(dtype):
    return [ops.dst_basis(n, r, dtype=dtype) for n, r in ((1, 1), (301, 17), (64, 64))]


def frobenius_stats(dtype):
    shapes = (301, 217), (1, 1), (3, 5000), (5000, 3)
    weights = [torch.randn(*shape).to(dtype) for shape in shapes]
    return [ops.frobenius_stats(weights), ops.frobenius_stats([w.T for w in weights])]


def dropout_mask(dtype):
    """The rows of a unit matrix that a mask leaves, scaled."""
    x, eye = torch.ones(70, 65, dtype=dtype), torch.eye(65, dtype=dtype)
    zero, B = torch.zeros(1, 65, dtype=dtype), torch.zeros(1, 65, dtype=dtype)
    seed = torch.tensor(5)
    _, z = ops.linear_forward(x, zero, None, eye, B, 1.0, 0.3, seed, None, None, None)
    return [z]


@pytest.mark.skipif(len(cpu_capabilities()) < 2, reason="there is one set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("results", [dst_basis, frobenius_stats, dropout_mask])
def test_same_bits_at_every_instruction_set(results, dtype):
    found = []
    try:
        for name in cpu_capabilities():
            set_cpu_capability(name)
            torch.manual_seed(0)
            found.append(results(dtype))
    finally:
        set_cpu_capability(cpu_capabilities()[-1])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
