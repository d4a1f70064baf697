"""Parameter groups for `torch.optim`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._utils.checks import check_positive


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, **options: Any
) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al., arXiv 2402.12354): B learns `ratio` times as fast as the rest.

    Two groups: everything that trains but B (A, R, whatever else of the model does) at `lr`, and B
    at `ratio` · `lr`; a group that would be empty is left out. Frozen parameters are in none, a
    shared one is in one. B is what has `lora_B` among the parts of its name: `LoRALinear`'s, and
    PEFT's.

    Args:
        model: a module whose layers are adapted already.
        lr: of the first group.
        ratio: the paper's λ, about 16.
        options: of both groups, `weight_decay=0.01` for one.

    Raises:
        ValueError: if `lr` or `ratio` is not positive and finite, or nothing trains.
        TypeError: if one of them is no number, or `params` is among the options.

    """
    if "params" in options:
        raise TypeError("params is not an option: the groups are made of the model's parameters")
    check_positive(lr, "lr")
    check_positive(ratio, "ratio")
    rest: list[nn.Parameter] = []
    factors_B: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (factors_B if "lora_B" in name.split(".") else rest).append(parameter)
    if not rest and not factors_B:
        raise ValueError("the model has no parameter that trains: adapt its layers first")
    groups = [{"params": rest, "lr": lr}, {"params": factors_B, "lr": ratio * lr}]
    return [{**options, **group} for group in groups if group["params"]]
