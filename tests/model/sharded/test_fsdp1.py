"""Adapters in a model that `FullyShardedDataParallel` (FSDP1) wraps, against one process."""

from __future__ import annotations

import functools
import tempfile
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lora_kernels import (
    LoRAConfig,
    add_lora,
    disable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_kernels._utils.names import without_wrappers
from lora_kernels.model.lora import adapter_state

from ...support.exhaustive import EXHAUSTIVE
from ...support.packages import needs_transformers
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import distance, logits, shared_folder, trained
from ...support.tiny_experts import tiny_experts
from ...support.tiny_models import gpt2, llama

pytestmark = [needs_ranks, needs_transformers]

CASES: dict[str, tuple[Any, LoRAConfig]] = {
    "absorb": (llama, LoRAConfig(r=4)),
    "implicit": (llama, LoRAConfig(r=3, residual="implicit")),
    "pissa": (llama, LoRAConfig(r=4, init_lora_weights="pissa")),
    "conv1d": (gpt2, LoRAConfig(r=4, bias="lora_only")),
    "experts": (lambda: tiny_experts("Mixtral"), LoRAConfig(r=4)),
    "saved": (llama, LoRAConfig(r=4, modules_to_save=["lm_head"])),
}
UNITS = ("blocks", "one")  # each block and the rest, or the whole model


def wrapped(model: Any, units: str) -> FullyShardedDataParallel:
    blocks = (module for module in model.modules() if hasattr(module, "self_attn"))
    kinds = {type(block) for block in blocks} or {type(model.transformer.h[0])}
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(kinds) if units == "blocks" else None,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def wholes(model: nn.Module) -> dict[str, Tensor]:
    is_wrapped = isinstance(model, FullyShardedDataParallel)
    summon = FullyShardedDataParallel.summon_full_params
    with summon(model, writeback=False) if is_wrapped else nullcontext():
        named = model.named_parameters()
        return {without_wrappers(name): p.detach().clone() for name, p in named}


def factors(model: nn.Module) -> dict[str, Tensor]:
    state = adapter_state(model)
    found = dict(state.extra)
    for name, layer in state.layers.items():
        found |= {f"{name}.A": layer.lora_A, f"{name}.B": layer.lora_B}
    return found


def everything(name: str, units: str) -> dict[str, Any]:
    """What the model, wrapped unless `units` is empty, has at each stage."""
    make, config = CASES[name]
    model = make()
    add_lora(model, config, progress=False)
    whole = wrapped(model, units) if units else model
    found: dict[str, Any] = {"start": factors(whole)}
    found["losses"] = trained(whole)
    found["factors"], found["trained"] = factors(whole), logits(whole)
    with tempfile.TemporaryDirectory() as alone:
        folder = shared_folder() if units else alone
        found["saved"] = save_adapter(whole, folder).rank
        other = make()
        load_adapter(other, folder, progress=False)
        found["loaded"] = logits(other)
    if not config.modules_to_save and config.bias == "none":
        with disable_adapters(whole):
            found["disabled"] = logits(whole)
        second = wrapped(other, units) if units else other
        unload_lora(second)
        found["unloaded"], found["base"] = wholes(second), logits(second)
    merge_lora(whole)
    found["merged"], found["merged logits"] = wholes(whole), logits(whole)
    left = [type(module).__name__ for module in whole.modules()]
    assert not [kind for kind in left if "LoRA" in kind or "Adapte" in kind]
    return found


@functools.cache
def alone(name: str) -> dict[str, Any]:
    return everything(name, "")


RUNS = [("absorb", "blocks"), ("implicit", "one"), ("saved", "blocks")]
if EXHAUSTIVE:
    RUNS = [(name, units) for name in CASES for units in UNITS]


@pytest.mark.parametrize(("name", "units"), RUNS)
def test_as_on_one_process(name: str, units: str) -> None:
    expected = alone(name)
    first, *others = on_ranks(2, lambda rank: everything(name, units))
    assert distance(first["start"], expected["start"]) == 0
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    # The gradient of a key's bias is zero but for rounding, which AdamW makes a step of.
    tolerance = 1e-4 if CASES[name][1].bias != "none" else 1e-5
    assert distance(first["factors"], expected["factors"]) < tolerance
    assert distance(first["factors"], first["start"]) > 1e-3, "nothing was trained"
    for stage in first.keys() & {"merged", "unloaded"}:
        assert distance(first[stage], expected[stage]) < tolerance, stage
    for stage in ("trained", "loaded", "merged logits"):
        assert torch.allclose(first[stage], expected["trained"], atol=tolerance), stage
    base = logits(CASES[name][0]())
    for stage in ("disabled", "base"):
        assert stage not in first or torch.allclose(first[stage], base, atol=1e-5), stage
    for other in others:
        assert other["saved"] == first["saved"]
        assert distance(other["factors"], first["factors"]) == 0
        assert distance(other["merged"], first["merged"]) == 0


def test_before_the_first_forward_and_within_the_summoned_model() -> None:
    """FSDP1 takes the unit that is used first for the root: the root has to be that one."""

    def work(rank: int) -> None:
        model = llama()
        add_lora(model, LoRAConfig(r=4), progress=False)
        before = factors(model)
        whole = wrapped(model, "blocks")
        assert distance(factors(whole), before) == 0
        assert len(trained(whole, 1)) == 1
        with FullyShardedDataParallel.summon_full_params(whole):
            inside = factors(model)
        assert distance(factors(whole), inside) == 0

    on_ranks(2, work)


def test_what_fsdp1_does_not_allow_is_said_in_one_line() -> None:
    def work(rank: int) -> None:
        model = llama()
        whole = wrapped(llama(), "one")
        with pytest.raises(TypeError, match="before it is wrapped in FullyShardedDataParallel"):
            add_lora(whole, progress=False)
        with pytest.raises(ValueError, match=r"flat parameter of FSDP.*before it is wrapped"):
            add_lora(whole.module, progress=False)
        config = LoRAConfig(r=4, residual="implicit", modules_to_save=["lm_head"])
        add_lora(model, config, progress=False)
        whole = wrapped(model, "one")
        more = LoRAConfig(r=4, residual="implicit")
        with pytest.raises(ValueError, match="add all adapters before the model is wrapped"):
            add_lora(model, more, adapter_name="more", progress=False)
        with pytest.raises(ValueError, match="pass that wrapper"):
            save_adapter(model, "unused")
        with pytest.raises(ValueError, match="FullyShardedDataParallel holds its copy"):
            unload_lora(whole)
        with pytest.raises(ValueError, match="FullyShardedDataParallel holds its copy"):
            disable_adapters(whole)
        trained(whole, 1)  # and nothing has changed

    on_ranks(2, work)
