"""Weights of a real model, and gradients of its loss."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def real_linears(real_model) -> list[nn.Linear]:
    """Three shapes of SmolLM2-135M: [192, 576], [576, 576], [576, 1536]."""
    block = real_model.model.layers[12]
    return [block.self_attn.k_proj, block.self_attn.q_proj, block.mlp.down_proj]


@pytest.fixture(scope="session")
def real_gradients(real_model, real_linears) -> list[torch.Tensor]:
    """Of the mean loss of 64 tokens, for the weights of `real_linears`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(real_model.config.vocab_size, (2, 32), generator=generator)
    loss = real_model(ids, labels=ids, use_cache=False).loss
    return list(torch.autograd.grad(loss, [linear.weight for linear in real_linears]))


@pytest.fixture(scope="session")
def real_inputs(real_model, real_linears) -> list[torch.Tensor]:
    """What `real_linears` get as input [1024, in], for random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(real_model.config.vocab_size, (4, 256), generator=generator)
    found: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda module, args: found.update({module: args[0].reshape(-1, args[0].shape[-1])})
        )
        for linear in real_linears
    ]
    hooks.append(real_model.model.layers[13].register_forward_pre_hook(_stop))
    with torch.no_grad(), suppress(StopIteration):  # no later block is needed
        real_model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [found[linear] for linear in real_linears]


def _stop(*_: object) -> None:
    raise StopIteration
