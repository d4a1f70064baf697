"""Tiny models with PEFT's adapters, and what `lora_kernels.peft` does with them."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from .tiny_models import gpt2, llama

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


def linear_layers(peft_model: nn.Module) -> dict:
    """PEFT's LoRA layers by their names in the base model."""
    from lora_kernels.peft.layers import lora_layers

    return lora_layers(peft_model)


def initialize(*args, **kwargs):
    from lora_kernels.peft import initialize

    return initialize(*args, progress=False, **kwargs)


def accelerate(model: nn.Module):
    from lora_kernels.peft import accelerate

    return accelerate(model)


def float64(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def base_weight(layer) -> np.ndarray:
    """W [out, in], in float64."""
    weight = float64(layer.get_base_layer().weight)
    return weight.T if layer.fan_in_fan_out else weight


def update_of(layer, adapter: str = "default") -> np.ndarray:
    """s·(BA − B₀A₀) [out, in], in float64."""
    A, B = (float64(getattr(layer, f"lora_{part}")[adapter].weight) for part in "AB")
    update = B @ A
    if hasattr(layer, "lora_start_A") and adapter in layer.lora_start_A:
        A0, B0 = (float64(getattr(layer, f"lora_start_{part}")[adapter]) for part in "AB")
        update = update - B0 @ A0
    return layer.scaling[adapter] * update
