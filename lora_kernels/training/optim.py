"""Optimization for LoRA: parameter groups, rules that rewrite gradients, KaSA's penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import check_finite, check_positive
from ..init.fused import diagonal_blocks
from ..layers.adapter import Adapter
from ..model.install.layers import adapted_layers
from ..model.install.sharded.fsdp import reshard
from .rules.attach import RuleHandle, lora_fa, lora_pro, precondition_gradients_, riemannian
from .rules.lora_fa import LoRAFA
from .rules.lora_pro import LoRAPro
from .rules.riemannian import Riemannian

__all__ = [
    "LoRAFA",
    "LoRAPro",
    "Riemannian",
    "RuleHandle",
    "kasa_penalty",
    "lora_fa",
    "lora_plus_groups",
    "lora_pro",
    "precondition_gradients_",
    "riemannian",
]

# Parts of the names of B's parameters; PEFT's embeddings use a different name.
_OF_B = frozenset(("lora_B", "lora_bias", "lora_embedding_B"))


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, **options: Any
) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al., arXiv 2402.12354): B trains at `ratio` times the rate of the rest.

    There are two parameter groups: B with the learning rate `ratio` · `lr`, and all other trainable
    parameters (A, R, DoRA's magnitudes, those of `modules_to_save`) with `lr`. (PEFT's function
    gives magnitudes the learning rate of B.) A group without parameters is omitted. Frozen
    parameters are in no group, and a shared parameter is in only one. A parameter belongs to B if
    `lora_B` is a part of its name, or `lora_bias` for the bias of B, in our layers and in PEFT's.

    Args:
        model: a module whose layers are adapted already.
        lr: the learning rate of all parameters except B.
        ratio: the paper's λ, about 16.
        options: further options of both groups, for example `weight_decay=0.01`.

    Raises:
        ValueError: `lr` or `ratio` is not positive and finite, or no parameter is trainable.
        TypeError: `lr` or `ratio` is not a number, or `params` is among the options.

    """
    if "params" in options:
        raise TypeError("params is not an option: the groups are made of the model's parameters")
    check_positive(lr, "lr")
    check_positive(ratio, "ratio")
    reshard(model)  # after a forward, FSDP2's modules may hold gathered parameters
    rest: list[nn.Parameter] = []
    factors_B: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            belongs_to_B = not _OF_B.isdisjoint(name.split("."))
            (factors_B if belongs_to_B else rest).append(parameter)
    if not rest and not factors_B:
        raise ValueError("the model has no parameter that trains: adapt its layers first")
    groups = [{"params": rest, "lr": lr}, {"params": factors_B, "lr": ratio * lr}]
    return [{**options, **group} for group in groups if group["params"]]


def kasa_penalty(model: nn.Module, beta: float = 1e-4, gamma: float = 1e-3) -> Tensor:
    """β Σ‖λ‖² + γ Σ(‖BᵀB − I‖_F + ‖AAᵀ − I‖_F) over the model's active adapters that have a λ: a
    scalar to add to the loss, in float32 or wider, with gradients.

    Wang et al., arXiv 2412.06071, equations 9 to 11; PEFT's `_get_kasa_loss`. The authors' code
    uses ‖AᵀA − I‖ and ‖BBᵀ − I‖ instead, and divides by the number of layers. The defaults are
    those of PEFT and of the authors' code.

    Raises:
        ValueError: no active adapter has a λ, or `beta` or `gamma` is negative or not finite.

    """
    for name, value in (("beta", beta), ("gamma", gamma)):
        check_finite(value, name)
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    layers = adapted_layers(model).values()
    active = [own.active() for own in layers if own.active_adapter in own.adapter_names]
    penalties = [_kasa_penalty(own, beta, gamma) for own in active if own.lora_diag is not None]
    if not penalties:
        raise ValueError(
            "no active adapter of this model has a λ: adapt it with init_lora_weights='kasa'"
        )
    total = penalties[0]
    for penalty in penalties[1:]:
        total = total + penalty.to(total.device)
    return total


def _kasa_penalty(adapter: Adapter, beta: float, gamma: float) -> Tensor:
    """The penalty of one adapter, or the sum over its experts."""
    factors = adapter.lora_A, adapter.lora_B, adapter.lora_diag
    work = torch.promote_types(adapter.lora_A.dtype, torch.float32)
    lora_A, lora_B, lora_diag = (own.to(work) for own in factors if own is not None)
    identity = torch.eye(lora_A.shape[-2], dtype=work, device=lora_A.device)
    grams = [lora_B.mT @ lora_B - identity, lora_A @ lora_A.mT - identity]
    if adapter.options.parts:  # each part has its own A and B
        grams = [diagonal_blocks(gram, len(adapter.options.parts)) for gram in grams]
    orthogonality = sum(torch.linalg.matrix_norm(gram).sum() for gram in grams)
    return beta * lora_diag.square().sum() + gamma * orthogonality
