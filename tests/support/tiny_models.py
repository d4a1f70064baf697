"""Random models of a few thousand parameters, of the families that people fine-tune."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 96


def llama(tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Two blocks, grouped-query attention, no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Two blocks of Conv1D, biases everywhere, a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).to(dtype).eval()
    with torch.no_grad():  # they start at zero, where a lost bias is not seen
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def token_ids(rows: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """[rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """In the mode that the model is in."""
    ids = (token_ids() if ids is None else ids).to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False).logits


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2, seed: int = 2) -> list[float]:
    """The losses of a few steps of AdamW on random tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        ids = token_ids(seed=seed + step).to(parameters[0].device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
