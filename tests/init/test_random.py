from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_kernels.init import LoRA

from ..devices import rng_state


def test_distribution_is_peft_s(device):
    """nn.init.kaiming_uniform_(A, a=√5), with the same generator: the same numbers."""
    weight = torch.empty(64, 256, device=device)
    torch.manual_seed(4)
    start = LoRA()(weight, 16)
    torch.manual_seed(4)
    want = torch.empty(16, 256, device=device)
    nn.init.kaiming_uniform_(want, a=math.sqrt(5))
    torch.testing.assert_close(start.lora_A, want, rtol=1e-6, atol=0)
    assert (start.lora_B == 0).all() and start.lora_B.shape == (64, 16)


def test_seed_leaves_the_global_generator_alone(device):
    weight = torch.empty(8, 12, device=device)
    state = rng_state(device)
    first, second = LoRA(seed=3)(weight, 4), LoRA(seed=3)(weight, 4)
    assert torch.equal(rng_state(device), state)
    assert torch.equal(first.lora_A, second.lora_A)
    assert not torch.equal(first.lora_A, LoRA(seed=4)(weight, 4).lora_A)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype(dtype, device):
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert LoRA()(torch.empty(4, 4, dtype=dtype, device=device), 2).lora_A.dtype == want
