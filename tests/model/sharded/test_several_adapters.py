"""Further adapters on a model that FSDP2 has sharded, and what else is done with them: one process
is the oracle.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    disable_adapters,
    hotswap_adapter,
    init,
    load_adapter,
    lora_plus_groups,
    magnitude,
    merge_lora,
    rescaling,
    save_adapter,
    set_adapter,
    svd,
)
from lora_kernels.model.install.sharded.fsdp import reshard

from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded, logits, shared_folder, trained
from ...support.tiny_models import llama

pytestmark = needs_ranks

FIRST = LoRAConfig(r=4, residual="implicit")
SECOND = LoRAConfig(r=2, init_lora_weights="pissa", residual="implicit")
Story = list[Any]


def told(model: nn.Module, folder: str) -> Story:
    """Losses and outputs of a model whose adapters come, train, change, are saved and loaded."""
    story: Story = []
    for name, config in (("a", FIRST), ("b", SECOND)):
        add_lora(model, config, adapter_name=name, progress=False)
        story += [logits(model), trained(model, 2)]
    set_adapter(model, "a")
    story += [logits(model), trained(model, 2)]
    with disable_adapters(model):
        story.append(logits(model))
    save_adapter(model, f"{folder}/a", adapter_name="a")
    save_adapter(model, f"{folder}/b", adapter_name="b", format="native")
    save_adapter(model, f"{folder}/c", adapter_name="a", compress_to=3)
    set_adapter(model, "b")
    story += [trained(model, 1), logits(model)]
    load_adapter(model, f"{folder}/c", adapter_name="c", progress=False)
    story += [logits(model), trained(model, 1)]
    load_adapter(model, f"{folder}/b", adapter_name="d", is_trainable=False, progress=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    story.append(logits(model))
    hotswap_adapter(model, f"{folder}/b", "b")
    hotswap_adapter(model, f"{folder}/a", "a")
    with pytest.raises(ValueError, match="its rank is 4, the new one has 2"):
        hotswap_adapter(model, f"{folder}/b", "a")
    for name in "ba":
        set_adapter(model, name)
        story += [logits(model), trained(model, 1)]
    story.append(logits(merge_lora(model, "a")))
    return story


def differences(story: Story, other: Story) -> list[float]:
    pairs = zip(story, other, strict=True)
    return [float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()) for a, b in pairs]


def test_as_on_one_process():
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        one = told(llama(), folder)

    def work(rank: int) -> Story:
        torch.manual_seed(1 + rank)
        return told(fully_sharded(llama()), str(shared_folder()))

    stories = on_ranks(2, work)
    assert max(differences(*stories)) == 0
    assert max(differences(stories[0], one)) < 1e-4, differences(stories[0], one)


def numbers(model: nn.Module) -> list[list[float]]:
    rows = magnitude.inspect_model(model, r=4, progress=False)
    return [
        [row.nu_weight, row.gain, row.start_ratio, row.nu_update or 0, row.beta] for row in rows
    ]


CONFIGS = {"absorb": LoRAConfig(r=4), "implicit": SECOND, "embedding": None}


def measured(shard) -> dict[str, list[list[float]]]:
    found = {"bare": numbers(shard(llama()))}
    for name, config in CONFIGS.items():
        model = shard(llama())
        config = config or LoRAConfig(r=4, target_modules=["embed_tokens", "up_proj"])
        add_lora(model, config, progress=False)
        trained(model, 1)
        found[name] = numbers(model)
    return found


def test_magnitudes_are_those_of_one_process():
    one = measured(lambda model: model)
    for found in on_ranks(2, lambda rank: measured(fully_sharded)):
        for name, rows in one.items():
            torch.testing.assert_close(
                torch.tensor(found[name]), torch.tensor(rows), rtol=1e-4, atol=1e-9
            )


def test_optimizers_get_the_sharded_parameters():
    """Also after a forward, when FSDP2's root holds gathered ones."""

    def work(rank: int) -> None:
        model = fully_sharded(llama())
        add_lora(model, LoRAConfig(r=4, target_modules=["lm_head", "up_proj"]), progress=False)
        sharded = [p for p in model.parameters() if p.requires_grad]
        for groups in (
            lambda: lora_plus_groups(model, 1e-3),
            lambda: rescaling.Setup("adamw", 4, 1e-3, 1e-3).groups(model),
        ):
            logits(model)
            found = [p for group in groups() for p in group["params"]]
            assert {*map(id, found)} == {*map(id, sharded)}

    on_ranks(2, work)


def test_what_takes_whole_tensors_says_so():
    """And not what torch says of mixed tensors, sharding strategies or data pointers."""

    def work(rank: int) -> list[str]:
        model = fully_sharded(llama())
        layer = model.model.layers[0].mlp.up_proj
        adapted = add_and_get(fully_sharded(llama()))
        calls = [
            functools.partial(LoRALinear.from_linear, layer, r=4),
            functools.partial(svd.truncated, layer.weight, 4),
            functools.partial(svd.minor, layer.weight, 4),
            adapted.to_linear,
            *(
                functools.partial(init.get_initializer(name), layer.weight, 4)
                for name in init.initializer_names()
            ),
        ]
        texts = []
        for call in calls:
            with pytest.raises((TypeError, ValueError)) as caught:
                call()
            texts.append(str(caught.value))
        return texts

    for texts in on_ranks(2, work):
        known = ("add_lora(model) adapts", "full_tensor()", "merge_lora(model) merges")
        assert all(any(part in text for part in known) for text in texts), texts


def add_and_get(model: nn.Module) -> LoRALinear:
    add_lora(model, FIRST, progress=False)
    reshard(model)
    layer: LoRALinear = model.model.layers[0].mlp.up_proj
    return layer


def test_an_absorbed_base_takes_no_second_adapter():
    def work(rank: int) -> Tensor:
        model = fully_sharded(llama())
        add_lora(model, LoRAConfig(r=4), progress=False)
        before = logits(model)
        with pytest.raises(ValueError, match="set residual='implicit' for all of them"):
            add_lora(model, FIRST, adapter_name="b", progress=False)
        folder = shared_folder()
        save_adapter(model, folder)
        with pytest.raises(ValueError, match="add the adapter with residual='implicit'"):
            hotswap_adapter(model, folder)
        assert torch.equal(logits(model), before)
        return before

    assert torch.equal(*on_ranks(2, work))
