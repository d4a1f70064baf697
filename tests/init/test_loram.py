from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_kernels.init import LoRAM
from lora_kernels.init.base import subtract_start_

from ..oracle import ROUNDING, dst_basis, loram_beta, to_numpy


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (48, 48)])
@pytest.mark.parametrize("r", [1, 2, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pure_call(shape, r, dtype, device):
    weight = torch.randn(*shape).to(device, dtype)
    before = weight.clone()
    start = LoRAM()(weight, r)
    assert torch.equal(weight, before)
    beta = loram_beta(to_numpy(weight), r)
    assert float(start.beta) == pytest.approx(beta, rel=1e-12)
    np.testing.assert_allclose(
        to_numpy(start.lora_B), beta * dst_basis(shape[0], r), atol=2**-23 * beta
    )
    np.testing.assert_allclose(
        to_numpy(start.lora_A), beta * dst_basis(shape[1], r).T, atol=2**-23 * beta
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_absorbing_is_the_pure_call_and_the_subtraction(dtype, device):
    weight = torch.randn(50, 30).to(device, dtype)
    absorbed, by_hand = weight.clone(), weight.clone()
    fused = LoRAM().absorb_(absorbed, 8, 0.5)
    start = LoRAM()(by_hand, 8)
    subtract_start_(by_hand, start, 0.5)
    assert torch.equal(fused.lora_A, start.lora_A) and torch.equal(fused.lora_B, start.lora_B)
    assert fused.beta == start.beta
    # β² is a square root there and the square of one here: the last bit of float64 may differ.
    assert (absorbed - by_hand).abs().max() <= 4 * ROUNDING[dtype] * absorbed.abs().max()
