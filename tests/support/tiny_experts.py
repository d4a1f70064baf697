"""Random transformers models with experts: hidden size 32, experts of 24, one or two blocks.

The three sizes of a parameter (experts, out, in) differ, so that tests notice exchanged dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

EXPERTS = 4
_BLOCKS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# By the name of the configuration's class, without "Config".
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": EXPERTS},
    "Qwen3Moe": {
        **{"moe_intermediate_size": 24, "num_experts": EXPERTS, "num_experts_per_tok": 2},
        **{"intermediate_size": 40, "head_dim": 8},
    },
    "Qwen2Moe": {
        **{"moe_intermediate_size": 24, "num_experts": EXPERTS, "num_experts_per_tok": 2},
        **{"intermediate_size": 40, "shared_expert_intermediate_size": 20},
    },
    "GptOss": {
        **{"intermediate_size": 24, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        "head_dim": 8,
    },
    "Olmoe": {"intermediate_size": 24, "num_experts": EXPERTS, "num_experts_per_tok": 2},
    "GraniteMoe": {
        **{"intermediate_size": 24, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    },
    "DeepseekV3": {
        **{"moe_intermediate_size": 24, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2},
        **{"intermediate_size": 40, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
        **{"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        **{"v_head_dim": 8, "num_key_value_heads": 4},
    },
    "NemotronH": {
        **{"moe_intermediate_size": 24, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2},
        **{"layers_block_type": ["moe", "attention"], "n_group": 1, "topk_group": 1},
        **{"head_dim": 8, "moe_shared_expert_intermediate_size": 20, "intermediate_size": 40},
    },
    "Qwen3VLMoe": {
        **{"moe_intermediate_size": 24, "num_experts": EXPERTS, "num_experts_per_tok": 2},
        **{"intermediate_size": 40, "head_dim": 8},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
}
_VISION = {
    **{"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
    **{"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}


def tiny_experts(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> Any:
    """A model of the family in evaluation mode; all of its weights are random."""
    import transformers

    torch.manual_seed(seed)
    options = _BLOCKS | FAMILIES[family] | config
    task = "ForCausalLM"
    if family == "Qwen3VLMoe":
        options, task = (
            {"text_config": options, "vision_config": _VISION},
            "ForConditionalGeneration",
        )
    configuration = getattr(transformers, f"{family}Config")(**options)
    model: nn.Module = getattr(transformers, family + task)(configuration).to(dtype).eval()
    with torch.no_grad():  # some families start with zeros or ones
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    return model


def expert_parameters(model: nn.Module) -> list[str]:
    """The names of the experts' 3-D parameters."""
    names = [n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n]
    return [n for n in names if "_lora." not in n]
