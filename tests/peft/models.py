"""Tiny transformers with PEFT's adapters, and what the tests do with them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

VOCABULARY = 96


def llama(dtype: torch.dtype = torch.float32, intermediate_size: int = 112) -> nn.Module:
    """Two blocks with grouped queries, no bias, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two blocks of Conv1D with biases, the output head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model
                parameter.normal_(std=0.1)
    return model


MODELS = {"llama": llama, "gpt2": gpt2}


def adapted(model: nn.Module, autocast_adapter_dtype: bool = True, **options) -> nn.Module:
    """A copy with a PEFT adapter of rank 4 and s = 2 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    torch.manual_seed(2)
    return get_peft_model(
        copy.deepcopy(model),
        LoraConfig(**options),
        autocast_adapter_dtype=autocast_adapter_dtype,
    ).eval()


def tokens(batch: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    """Token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, **options) -> Tensor:
    """Of `tokens()`."""
    return model(tokens(), **options).logits


@torch.no_grad()
def move(model: nn.Module, size: float = 0.02, seed: int = 0) -> None:
    """Training, as far as these tests care: all trainable parameters change."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise.to(parameter.dtype))


def linear_layers(peft_model: nn.Module) -> dict:
    """PEFT's LoRA layers by their names in the base model."""
    from lora_kernels.peft.layers import lora_layers

    return lora_layers(peft_model)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the state_dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state_dicts hold the same."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@torch.no_grad()
def close(got: Tensor, want: Tensor, roundings: float = 64) -> bool:
    """To some roundings of float32 against the largest: sums of a hundred terms, and a few layers
    of them, in another order.
    """
    tolerance = roundings * torch.finfo(torch.float32).eps * float(want.abs().max())
    return float((got - want).abs().max()) <= tolerance
