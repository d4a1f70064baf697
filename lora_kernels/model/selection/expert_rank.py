"""`with_expert_rank`: gives each expert r divided by the number of experts that a token uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ...layers.options import lora_scaling
from ..config import LoRAConfig
from .layers import select_layers

# The options with which configurations of transformers give the number of experts per token.
_TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
    *("moe_top_k", "router_top_k", "num_selected_experts", "top_k"),
)


def with_expert_rank(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration with rank r // k, but at least 1, for the experts that `target_parameters`
    names, where k is the number of experts that a token uses.

    Then a token passes through as many adapter parameters in k experts as in one dense layer of
    rank r ("LoRA Without Regret", Thinking Machines Lab, 2025). The experts get the `lora_alpha`
    that gives them the same s as the other layers, because some serving engines read one s.
    Patterns that the configuration already has take precedence.

    Raises:
        ValueError: no experts are named, or the model's configuration does not give k.

    """
    experts = {n: b for n, b in select_layers(model, config).layers.items() if b.num_experts}
    if not experts:
        raise ValueError("the configuration adapts no experts: name them in target_parameters")
    ranks: dict[str, int] = {}
    for name, base in experts.items():
        ending = ".".join(name.split(".")[-2:])
        ranks[ending] = max(1, config.r // _top_k(model, base.place[0], name))
    patterns = {**config.rank_pattern, **_new(ranks, config.rank_pattern)}
    ranked = replace(config, rank_pattern=patterns)
    s = lora_scaling(config.layer_alpha(""), config.r, config.scaling_rule)
    alphas: dict[str, float] = {}
    for name in experts:
        # s is proportional to lora_alpha. A given pattern may take precedence.
        per_alpha = lora_scaling(1.0, ranked.layer_rank(name), config.scaling_rule)
        alphas[".".join(name.split(".")[-2:])] = s / per_alpha
    patterns_of_alpha = {**config.alpha_pattern, **_new(alphas, config.alpha_pattern)}
    return replace(ranked, alpha_pattern=patterns_of_alpha)


def _new(found: dict[str, Any], given: Any) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in given}


def _top_k(model: nn.Module, experts: nn.Module, name: str) -> int:
    for config in _configs(model, experts):
        for option in _TOP_K:
            value = getattr(config, option, None)
            if isinstance(value, (list, tuple)) and value:  # one for each block
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
    raise ValueError(
        f"the configuration of {type(model).__name__} does not say how many experts a token uses "
        f"({', '.join(_TOP_K[:3])} ...): give {name.rpartition('.')[2]!r} a rank in rank_pattern"
    )


def _configs(model: nn.Module, experts: nn.Module) -> Iterator[Any]:
    for owner in (experts, model):
        config: Any = getattr(owner, "config", None)
        if config is not None:
            yield config
            yield config.get_text_config() if hasattr(config, "get_text_config") else config
