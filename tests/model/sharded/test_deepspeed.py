"""Training under DeepSpeed's ZeRO-3, adapted before or after it has partitioned the model, against
one process.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    disable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_kernels.init.sharded.whole import whole

from ...support import tiny_models
from ...support.exhaustive import EXHAUSTIVE
from ...support.packages import needs_transformers
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import BATCH, distance, logits, shared_folder
from ...support.tiny_experts import tiny_experts
from ...support.zero3 import with_deepspeed

pytestmark = [needs_ranks, needs_transformers]
deepspeed = with_deepspeed()

STEPS = 5
PARTITIONED = {"stage3_param_persistence_threshold": 0}  # else all of a tiny model stays gathered
ZEROS: list[dict[str, Any]] = [{}, PARTITIONED, {"offload_param": {"device": "cpu"}}]
llama = functools.partial(tiny_models.llama, num_hidden_layers=1)
ROWS = {1: 4, 2: 4, 3: 3}  # of the batch, by the number of ranks; 4 on one process too
Made = Callable[[], nn.Module]
CASES: dict[str, tuple[Made, LoRAConfig]] = {
    "absorb": (llama, LoRAConfig(r=4)),
    "implicit": (llama, LoRAConfig(r=4, residual="implicit")),
    "pissa": (llama, LoRAConfig(r=4, init_lora_weights="pissa")),
    "saved": (llama, LoRAConfig(r=4, modules_to_save=["lm_head"], bias="all")),
    "experts": (lambda: tiny_experts("Mixtral"), LoRAConfig(r=4)),
    "conv1d": (functools.partial(tiny_models.gpt2, n_layer=1), LoRAConfig(r=4)),
}


def configuration(**zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # 1 by default
        "zero_optimization": {"stage": 3, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def initialized(model: nn.Module, **zero: Any) -> Any:
    """DeepSpeed's engine."""
    options = {"optimizer": optimizer_of(model), "config": configuration(**zero)}
    return deepspeed.initialize(model=model, **options)[0]


def partitioned(make: Made, **zero: Any) -> nn.Module:
    """The model from its folder, as transformers partitions it under a DeepSpeed configuration."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    folder = shared_folder()
    if dist.get_rank() == 0:
        make().save_pretrained(folder)
    dist.barrier()
    kept = HfDeepSpeedConfig(configuration(**zero))
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    del kept
    unset_hf_deepspeed_config()
    assert all(p.numel() == 0 for p in model.parameters()), "nothing was partitioned"
    return model


def trained(model: Any, rows: int = 4) -> list[float]:
    """The losses of 5 steps on the batch, each rank of DeepSpeed's engine with its part of it."""
    engine = model if isinstance(model, deepspeed.DeepSpeedEngine) else None
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if engine else (1, 0)
    own = BATCH[:rows][rank::ranks]
    optimizer = None if engine else optimizer_of(model)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=own, labels=own).loss
        if engine:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if engine:
            dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def wholes(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


@functools.cache
def alone(name: str, rows: int) -> dict[str, Any]:
    """What one process has at each stage."""
    make, config = CASES[name]
    model = make()
    add_lora(model, config, progress=False)
    found: dict[str, Any] = {"start": wholes(model), "losses": trained(model, rows)}
    found["end"], found["trained"] = wholes(model), logits(model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, format="native")
        other = make()
        load_adapter(other, folder, progress=False)
    found["more"] = trained(other, rows)
    unload_lora(other)
    found["unloaded"] = wholes(other)
    merge_lora(model)
    found["merged"] = wholes(model)
    return found


def under_deepspeed(order: str, name: str, rows: int, zero: dict[str, Any]) -> dict[str, Any]:
    """The same under ZeRO-3; the model is adapted before or after it is partitioned."""
    make, config = CASES[name]

    def base() -> nn.Module:
        return make() if order == "adapt, partition" else partitioned(make, **zero)

    model = base()
    add_lora(model, config, progress=False)
    found: dict[str, Any] = {"start": wholes(model)}
    engine = initialized(model, **zero)
    found["losses"] = trained(engine, rows)
    found["end"], found["trained"] = wholes(model), logits(model)
    folder = shared_folder()
    saved = save_adapter(engine, folder, format="native")
    assert saved == save_adapter(model, folder, format="native")
    if not config.modules_to_save:
        with disable_adapters(model):
            found["disabled"] = logits(model)
    other = base()
    load_adapter(other, folder, progress=False)
    second = initialized(other, **zero)
    found["loaded"] = logits(other)
    found["more"] = trained(second, rows)
    if not config.modules_to_save:
        unload_lora(second)
        found["unloaded"] = wholes(other)
        found["base"] = logits(other)
    logits(model)  # after which DeepSpeed keeps some parameters gathered
    merge_lora(model)
    found["merged"], found["merged logits"] = wholes(model), logits(model)
    found["merged logits of the engine"] = logits(engine)
    left = [type(module).__name__ for module in model.modules()]
    assert not [kind for kind in left if "LoRA" in kind or "Adapte" in kind]
    return found


@functools.cache
def prepared() -> None:
    """Imports what a first call of `add_lora` imports, in the process that is forked."""
    add_lora(llama(), LoRAConfig(r=2), progress=False)


def on_workers(world: int, work: Callable[[], Any], seconds: float = 100) -> list[Any]:
    prepared()

    def started(rank: int) -> Any:
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
        deepspeed.init_distributed("gloo")
        return work()

    return on_ranks(world, started, seconds)


ORDERS = ("adapt, partition", "partition, adapt")
RUNS = [
    ("adapt, partition", "absorb", 2, PARTITIONED),
    ("partition, adapt", "absorb", 3, PARTITIONED),
    ("partition, adapt", "saved", 2, {}),
]
if EXHAUSTIVE:
    RUNS = [(order, name, 2, zero) for order in ORDERS for name in CASES for zero in ZEROS]


@pytest.mark.parametrize(("order", "name", "world", "zero"), RUNS)
def test_as_on_one_process(order: str, name: str, world: int, zero: dict[str, Any]) -> None:
    rows = ROWS[world]
    first, *others = on_workers(world, lambda: under_deepspeed(order, name, rows, zero))
    expected = alone(name, rows)
    factors = [n for n in first["start"] if "lora_" in n]
    assert all(torch.equal(first["start"][n], expected["start"][n]) for n in factors)
    assert distance(first["start"], expected["start"]) < (1e-6 if name == "pissa" else 1e-12)
    for losses in ("losses", "more"):
        assert first[losses] == pytest.approx(expected[losses], abs=1e-5)
    for stage in first.keys() & {"end", "merged", "unloaded"}:
        assert distance(first[stage], expected[stage]) < 1e-5, stage
    base = logits(CASES[name][0]())
    for stage in ("trained", "loaded", "merged logits", "merged logits of the engine"):
        assert torch.allclose(first[stage], expected["trained"], atol=1e-5), stage
    for stage in ("disabled", "base"):
        assert stage not in first or torch.allclose(first[stage], base, atol=1e-5), stage
    for other in others:
        assert other["losses"] == first["losses"]
        assert all(
            distance(other[stage], first[stage]) == 0 for stage in ("start", "end", "merged")
        )


def test_no_adapter_is_added_after_initialize() -> None:
    """DeepSpeed's engine would not know its parameters."""

    def work() -> None:
        model = llama()
        add_lora(model, LoRAConfig(r=4, residual="implicit"), progress=False)
        folder = shared_folder()
        engine = initialized(model)
        save_adapter(engine, folder)
        more = LoRAConfig(r=4, residual="implicit")
        calls = (
            lambda: add_lora(model, more, adapter_name="more", progress=False),
            lambda: load_adapter(model, folder, adapter_name="more", progress=False),
        )
        for call in calls:
            with pytest.raises(
                ValueError, match=r"deepspeed\.initialize has taken over.*before it"
            ):
                call()
        with pytest.raises(TypeError, match="before it is wrapped in DeepSpeedEngine"):
            add_lora(engine, more, adapter_name="more", progress=False)
        engine.destroy()  # the hooks are gone, the partitions are not
        unload_lora(model)
        add_lora(model, LoRAConfig(r=2), progress=False)
        again = initialized(model)
        assert trained(again) == pytest.approx(_again(), abs=1e-5)

    on_workers(2, work)


def test_no_adapter_is_made_while_deepspeed_casts_new_tensors() -> None:
    def work() -> None:
        config = configuration()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = nn.Sequential(nn.Linear(8, 8))
            with pytest.raises(ValueError, match="leave it first"):
                add_lora(model, LoRAConfig(r=2), progress=False)
        add_lora(model, LoRAConfig(r=2), progress=False)

    on_workers(2, work)


@functools.cache
def _again() -> list[float]:
    model = llama()
    add_lora(model, LoRAConfig(r=2), progress=False)
    return trained(model)
