"""A tiny model, tokenizer and texts, so that every script runs anywhere and in seconds.

For your own task, replace them with a real model and real texts:

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    texts = [...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXTS = [f"{a}+{b}={a + b}" for a in range(10) for b in range(10 - a)]  # 55 sums of one digit
SPECIAL = ["<pad>", "<eos>", "<unk>"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character of the sums."""
    tokens = {token: i for i, token in enumerate([*SPECIAL, *"0123456789+="])}
    inner = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model() -> PreTrainedModel:
    """A random Llama with two blocks, always the same."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **tokens)).eval()


def tiny_mixture() -> PreTrainedModel:
    """A random Mixtral with two blocks of four experts; each token uses two of them."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = MixtralConfig(**SIZES, **tokens, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config).eval()


def save_tiny_model(folder: str | Path) -> str:
    """Writes the model and the tokenizer for `from_pretrained`. Returns the folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def batches(texts: Sequence[str] = TEXTS, rows: int = 11) -> list[dict[str, Tensor]]:
    """The sums as a model's arguments; all have the same length and need no padding."""
    ids = torch.tensor(tiny_tokenizer()(list(texts))["input_ids"])
    return [{"input_ids": part, "labels": part} for part in ids.split(rows)]


@torch.no_grad()
def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """The largest difference between the logits of two models, in evaluation mode."""
    ids = batches()[0]["input_ids"]
    return float((model.eval()(ids).logits - other.eval()(ids).logits).abs().max())
