"""A tiny Hugging Face model of each architecture, and the same model as a GGUF file.

The GGUF file is written without the package under test: names by the package gguf, rows of q and k
by their definition. llama.cpp's logits of it, which are transformers', show that it is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = 64
_EXPERTS = {"num_experts_per_tok": 2, "decoder_sparse_step": 1, "moe_intermediate_size": 32}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": _WINDOW}
_OPTIONS: dict[str, dict[str, Any]] = {
    "Cohere2ForCausalLM": {"head_dim": 16, "sliding_window": _WINDOW},
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "GemmaForCausalLM": {"head_dim": 16},
    "GraniteForCausalLM": {
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "Ministral3ForCausalLM": {"head_dim": 16},
    "MistralForCausalLM": {"head_dim": 32},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "NemotronForCausalLM": {"head_dim": 16},
    "Phi3ForCausalLM": {"original_max_position_embeddings": 128},
    "PhiForCausalLM": {
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.5,
        "intermediate_size": 256,
    },
    "Qwen2MoeForCausalLM": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        **_EXPERTS,
    },
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "head_dim": 32, "norm_topk_prob": True, **_EXPERTS},
    "SeedOssForCausalLM": {"head_dim": 16, "attention_out_bias": False},
    "Starcoder2ForCausalLM": {
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "sliding_window": None,
    },
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.15}
_GPT2 |= {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
# {class: llama.cpp's architecture}; those in PERMUTED have other rows of q and k there.
NAMES = {
    "ArceeForCausalLM": "arcee",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "command-r",
    "GPT2LMHeadModel": "gpt2",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GemmaForCausalLM": "gemma",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "Ministral3ForCausalLM": "mistral3",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "OlmoForCausalLM": "olmo",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "Starcoder2ForCausalLM": "starcoder2",
}
PERMUTED = {"ArceeForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "Ministral3ForCausalLM"}
PERMUTED |= {"MistralForCausalLM", "MixtralForCausalLM", "OlmoForCausalLM", "SmolLM3ForCausalLM"}


def make_model(kind: str, **options: Any) -> nn.Module:
    """Two blocks, with biases and norms that matter, in evaluation mode."""
    import transformers

    torch.manual_seed(1)
    cls = getattr(transformers, kind)
    sizes = _GPT2 if kind == "GPT2LMHeadModel" else _SIZES | _OPTIONS.get(kind, {})
    config = cls.config_class(**sizes | options)
    if kind == "Ministral3ForCausalLM":
        config.rope_parameters["original_max_position_embeddings"] = 128
    model = cls(config).float().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim == 3:
                parameter.normal_(std=0.15)
    return model


def save_config(model: nn.Module, folder: Path) -> Path:
    """`config.json` as `save_pretrained` writes it."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def linear_layers(model: nn.Module) -> list[str]:
    """The linear layers of the blocks that have a tensor of their own in a GGUF model."""
    from transformers.pytorch_utils import Conv1D

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name != "lm_head"
        and not name.endswith("shared_expert_gate")  # one row, which becomes a vector
    ]


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's rows: 2j and 2j + 1 of a head of d rows are rows j and j + d/2 of it."""
    size = weight.shape[0] // heads
    rows = [
        head * size + j // 2 + (j % 2) * (size // 2) for head in range(heads) for j in range(size)
    ]
    return weight[rows]


def write_base(model: nn.Module, path: Path) -> None:
    """The model as a GGUF file without a tokenizer."""
    import gguf

    kind, config = type(model).__name__, model.config
    writer = gguf.GGUFWriter(path, NAMES[kind])
    _write_sizes(gguf, writer, kind, config)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == NAMES[kind])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for name, part in _converted(kind, config, names, key, tensor):
            writer.add_tensor(name, part.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converted(kind: str, config: Any, names: Any, key: str, tensor: torch.Tensor):
    """(name, tensor) of what a tensor of the Hugging Face model becomes."""
    block = next((part for part in key.split(".") if part.isdecimal()), "")
    if key.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        return [
            (f"blk.{block}.ffn_gate_exps.weight", gate),
            (f"blk.{block}.ffn_up_exps.weight", up),
        ]
    if key.endswith("experts.down_proj"):
        return [(f"blk.{block}.ffn_down_exps.weight", tensor)]
    if kind in PERMUTED and "q_proj" in key:
        tensor = interleaved(tensor, config.num_attention_heads)
    if kind in PERMUTED and "k_proj" in key:
        tensor = interleaved(tensor, config.num_key_value_heads)
    if kind == "GPT2LMHeadModel" and tensor.ndim == 2 and ".h." in key:
        tensor = tensor.T
    if kind.startswith(("Gemma", "Nemotron")) and key.endswith("norm.weight"):
        tensor = tensor + 1
    return [(names.get_name(key, (".weight", ".bias")), tensor)]


def _write_sizes(gguf: Any, writer: Any, kind: str, config: Any) -> None:
    def option(*keys: str, default: Any = None) -> Any:
        return next((v for k in keys if (v := getattr(config, k, None)) is not None), default)

    heads = config.num_attention_heads
    size = option("head_dim", default=config.hidden_size // heads)
    rope = option("rope_parameters", default={})
    rope = rope.get("full_attention", rope)
    writer.add_vocab_size(VOCABULARY)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(option("intermediate_size", default=4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(option("num_key_value_heads", default=heads))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(int(size * (rope.get("partial_rotary_factor") or 1)))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(option("rms_norm_eps", default=1e-6))
    epsilons = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    writer.add_layer_norm_eps(option(*epsilons, default=1e-5))
    if kind.startswith(("Gemma2", "Gemma3", "Cohere2", "Olmo3")):
        writer.add_sliding_window(_WINDOW)
    if kind.startswith("Gemma2"):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind.startswith("Olmo3"):
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
    if kind.startswith("Phi3"):
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(128)
    if kind.startswith("Granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if kind.startswith("Cohere"):
        writer.add_logit_scale(config.logit_scale)
    if kind.startswith("Ministral3"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    experts = option("num_local_experts", "num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if "Moe" in kind:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind.startswith("Qwen2Moe"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
