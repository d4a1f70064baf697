"""Parameter groups for `torch.optim`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._utils.checks import check_positive
from ..model.install.sharded.fsdp import reshard

# Parts of the names of B's parameters; PEFT's embeddings have one of their own.
_OF_B = frozenset(("lora_B", "lora_bias", "lora_embedding_B"))


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, **options: Any
) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al., arXiv 2402.12354): B has `ratio` times the learning rate of the rest.

    There are two parameter groups: B with the learning rate `ratio` · `lr`, and all other trainable
    parameters (A, R, those of `modules_to_save`) with `lr`. A group without parameters is omitted.
    Frozen parameters are in no group; a shared parameter is in one. A parameter belongs to B if
    `lora_B`, or `lora_bias` for the bias of B, is a part of its name, in our layers and in PEFT's.

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
