"""Random transformers models of a few thousand parameters.

`**config` overrides any option of the family's configuration, such as `hidden_size`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 96
_BLOCKS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _make(
    family: str, task: str, config: dict, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """A model of the family, in evaluation mode."""
    import transformers

    torch.manual_seed(seed)
    configuration = getattr(transformers, f"{family}Config")(**config)
    return getattr(transformers, family + task)(configuration).to(dtype).eval()


def llama(
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    task: str = "ForCausalLM",
    **config,
) -> nn.Module:
    """Two blocks with grouped-query attention and no biases."""
    options = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    options |= {"tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}
    return _make("Llama", task, _BLOCKS | options | config, dtype, seed)


def gpt2(dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> nn.Module:
    """Two blocks of Conv1D layers, with biases everywhere and the head tied to the embedding."""
    options = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    options |= {"bos_token_id": 1, "eos_token_id": 2}
    options |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = _make("GPT2", "LMHeadModel", options | config, dtype, seed)
    with torch.no_grad():  # biases are initialized to zero, where losing one would go unnoticed
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def bert(seed: int = 0, **config) -> nn.Module:
    """Two blocks and a classifier of three labels."""
    options = {"intermediate_size": 48, "num_labels": 3}
    return _make("Bert", "ForSequenceClassification", _BLOCKS | options | config, seed=seed)


def falcon(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two blocks whose linear layers are a subclass of nn.Linear."""
    return _make("Falcon", "ForCausalLM", _BLOCKS, dtype)


def mamba(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two mixer blocks."""
    options = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return _make("Mamba", "ForCausalLM", options, dtype)


def mixtral() -> nn.Module:
    """One block with four experts."""
    options = {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_attention_heads": 2}
    options |= {"intermediate_size": 48, "num_local_experts": 4}
    return _make("Mixtral", "ForCausalLM", _BLOCKS | options)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    assert len(vocabulary) <= VOCABULARY
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
