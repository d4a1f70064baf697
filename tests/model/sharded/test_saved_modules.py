"""What adapters train in full (`modules_to_save`, biases, rows of tokens) on models that FSDP2
shards: one process is the oracle.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    adapter_names,
    add_lora,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.model.config import TokenRows
from lora_kernels.model.install.sharded.fsdp import reshard
from lora_kernels.model.lora import adapter_state, apply_state

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded, logits, shared_folder, trained
from ...support.tiny_models import gpt2, llama

pytestmark = needs_ranks

Story = list[Any]
SAVED = LoRAConfig(r=4, modules_to_save=["embed_tokens", "lm_head"])
CASES = {
    "head and embedding": (llama, SAVED),
    "tied, of which one": (
        functools.partial(llama, tied=True),
        replace(SAVED, modules_to_save=["lm_head"]),
    ),
    "tied, both": (functools.partial(llama, tied=True), SAVED),
    "tied, adapted": (
        functools.partial(llama, tied=True),
        LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    ),
    "a norm in a block": (llama, LoRAConfig(r=4, modules_to_save=["post_attention_layernorm"])),
    "all biases": (gpt2, LoRAConfig(r=4, bias="all")),
    "biases of layers": (gpt2, LoRAConfig(r=4, bias="lora_only")),
    "float16": (functools.partial(llama, dtype=torch.float16), SAVED),
}
if not EXHAUSTIVE:
    CASES = {case: CASES[case] for case in ("tied, both", "all biases")}
ORDERS = ("adapt, shard", "shard, adapt")


def sharded(model: nn.Module) -> nn.Module:
    if hasattr(model, "model"):
        return fully_sharded(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def losses(model: nn.Module, steps: int = 2) -> list[float]:
    reshard(model)  # so that the optimizer gets the sharded parameters of FSDP2's root
    return trained(model, steps)


def told(model: nn.Module, make, config: LoRAConfig, folder: str) -> Story:
    """Losses and outputs of an adapted model that trains, is saved, loaded, merged and unloaded;
    `make` makes another base.
    """
    names = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    story: Story = [losses(model), logits(model)]
    with disable_adapters(model):
        story.append(logits(model))
    story += [logits(model), losses(model, 1)]
    for format in ("peft", "native"):
        save_adapter(model, f"{folder}/{format}", format=format)
    story.append(logits(model))
    for format, finish in (("peft", unload_lora), ("native", merge_lora)):
        other = make()
        load_adapter(other, f"{folder}/{format}", progress=False)
        assert sorted(n for n, p in other.named_parameters() if p.requires_grad) == names
        story += [logits(other), logits(finish(other)), trainable(other)]
    if config.residual == "implicit":
        hotswap_adapter(model, f"{folder}/peft")
        story.append(logits(model))
    story += [logits(unload_lora(model)), trainable(model)]
    add_lora(model, config, progress=False)
    return [*story, losses(model)]


def trainable(model: nn.Module) -> float:
    return float(sum(p.requires_grad for p in model.parameters()))


def differences(story: Story, other: Story) -> list[float]:
    pairs = zip(story, other, strict=True)
    return [float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()) for a, b in pairs]


@pytest.mark.parametrize("case", CASES)
def test_as_on_one_process(case):
    make, config = CASES[case]
    torch.manual_seed(1)
    one = make()
    add_lora(one, config, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        wanted = told(one, make, config, folder)

    def work(rank: int) -> list[Story]:
        stories = []
        for order in ORDERS:
            torch.manual_seed(1)
            model = make() if order == "adapt, shard" else sharded(make())
            add_lora(model, config, progress=False)
            model = sharded(model) if order == "adapt, shard" else model
            stories.append(told(model, lambda: sharded(make()), config, str(shared_folder())))
        return stories

    first, second = on_ranks(2, work)
    for mine, theirs, order in zip(first, second, ORDERS, strict=True):
        assert max(differences(mine, theirs)) == 0, order
        found = differences(mine, wanted)
        assert max(found) < (0.05 if case == "float16" else 1e-4), (order, found)


def test_adapters_with_different_tensors():
    """One trains the head, another one the embedding; each has its own."""
    implicit = LoRAConfig(r=2, residual="implicit")

    def story(model: nn.Module) -> Story:
        found: Story = []
        for name in ("lm_head", "embed_tokens"):
            config = replace(implicit, modules_to_save=[name])
            add_lora(model, config, adapter_name=f"with {name}", progress=False)
            found += [losses(model), logits(model)]
        for name in ("lm_head", "embed_tokens", "lm_head"):
            set_adapter(model, f"with {name}")
            found += [logits(model), losses(model, 1)]
        return [*found, logits(unload_lora(model))]

    torch.manual_seed(1)
    one = story(llama())

    def work(rank: int) -> Story:
        torch.manual_seed(1)
        return story(fully_sharded(llama()))

    for found in on_ranks(2, work):
        assert max(differences(found, one)) < 1e-4


@pytest.mark.filterwarnings("ignore:the adapter's rows of")
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens(tied):
    """Those of PEFT's `trainable_token_indices`, which lie on both ranks."""
    one = llama(tied=tied)
    add_lora(one, LoRAConfig(r=2), progress=False)
    state = adapter_state(one)
    indices = (1, 3, 47, 48, 95)
    state.rows = {"model.embed_tokens.weight": TokenRows(indices, torch.randn(len(indices), 32))}
    base = llama(tied=tied)
    apply_state(base, state, progress=False)
    wanted = logits(base)

    def work(rank: int) -> tuple[torch.Tensor, ...]:
        model = fully_sharded(llama(tied=tied))
        apply_state(model, state, progress=False)
        found = logits(model)
        saved = adapter_state(model).rows
        for name, rows in state.rows.items():
            assert saved[name].indices == rows.indices
            assert torch.equal(saved[name].values, rows.values)
        with disable_adapters(model):
            bare = logits(model)
        return found, bare

    for found, bare in on_ranks(2, work):
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(bare, logits(llama(tied=tied)), rtol=1e-4, atol=1e-5)


def test_several_dtypes_in_one_group():
    """bfloat16 weights beside float32 factors: an error before anything is changed."""

    def work(rank: int) -> str:
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(llama(dtype=torch.bfloat16))
        before = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
        with pytest.raises(ValueError) as caught:
            add_lora(model, SAVED, progress=False)
        after = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
        assert all(
            a[0] == b[0] and a[1] is b[1] and a[2] == b[2]
            for a, b in zip(before, after, strict=True)
        )
        assert not adapter_names(model)
        apart = fully_sharded(llama(dtype=torch.bfloat16))  # the head is in the root's group
        add_lora(apart, SAVED, progress=False)
        first, last = losses(apart)
        assert last < first
        return str(caught.value)

    for text in on_ranks(2, work):
        assert "embed_tokens.weight in torch.bfloat16 and the factors of" in text
        assert "apply fully_shard to one of these modules on its own" in text


def test_what_cannot_be_merged_or_repeated():
    """A bias for a layer without one, and blocks that share their parameters: an error at first."""

    def work(rank: int) -> list[str]:
        texts = []
        model = fully_sharded(llama())
        add_lora(model, LoRAConfig(r=2), progress=False)
        state = adapter_state(model)
        for layer in state.layers.values():
            layer.lora_bias = torch.ones(len(layer.lora_B))
        other = fully_sharded(llama())
        apply_state(other, state, progress=False)
        before = logits(other)
        with pytest.raises(ValueError) as caught:
            merge_lora(other)
        texts.append(str(caught.value))
        assert torch.equal(logits(other), before)
        state.replication = ((0, 2), (0, 1))
        with pytest.raises(ValueError) as caught:
            apply_state(fully_sharded(llama()), state, progress=False)
        return [*texts, str(caught.value)]

    for texts in on_ranks(2, work):
        assert "cannot get one while it is sharded: merge on one process" in texts[0]
        assert "load the adapter before it is sharded" in texts[1]
