"""Experts whose 3-D parameters are sharded: by FSDP2 along any size, and by transformers' expert
and tensor parallelism. One process is the oracle.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import (
    LoRAConfig,
    add_lora,
    set_adapter,
    unload_lora,
)
from lora_kernels.model.experts.parallel import LocalPart
from lora_kernels.model.experts.wrapped import has_parallel_forward

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import (
    BATCH,
    distance,
    fully_sharded,
    life,
    life_alone,
    logits,
    trained,
    whole_tensors,
)
from ...support.tiny_experts import FAMILIES, expert_parameters, tiny_experts

parallelism = pytest.importorskip("transformers.distributed.expert_parallel")

pytestmark = needs_ranks

START = {
    "absorb": {},
    "implicit": {"residual": "implicit"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa implicit": {"init_lora_weights": "pissa", "residual": "implicit"},
    "lora_xs": {"init_lora_weights": "lora_xs"},
}
# How `fully_shard` cuts the experts, or the sizes of transformers' DistributedConfig.
FSDP = ("blocks", "experts", "rows", "columns")
TP, EP, TP_EP = {"tp_size": 2}, {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}
Layout = Any


def config(start: str, **options: Any) -> LoRAConfig:
    return LoRAConfig(r=4, **{"target_modules": "all-linear"} | START[start] | options)


def tiny(family: str, experts: int) -> Any:
    key = next(key for key in FAMILIES[family] if key.endswith("_experts"))
    return tiny_experts(family, **{key: experts})


def sharded(model: Any, layout: Layout) -> Any:
    if isinstance(layout, dict):
        return distributed(model, layout)
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    if layout == "experts":
        for block in model.model.layers:
            fully_shard(block.mlp.experts)
    dim = {"rows": 1, "columns": 2}.get(layout)
    place = None if dim is None else lambda p: Shard(dim) if p.dim() == 3 else None
    return fully_sharded(model, shard_placement_fn=place)


def distributed(model: Any, sizes: dict[str, int]) -> Any:
    """What `from_pretrained(distributed_config=)` does to a model before it loads the weights."""
    from transformers.distributed import DistributedConfig

    names = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank()}
    os.environ |= {k: str(v) for k, v in {**names, "WORLD_SIZE": dist.get_world_size()}.items()}
    found, _, mesh = type(model).prepare_distribute_model(DistributedConfig(**sizes))
    return type(model).maybe_distribute_model(model, found, mesh)


@functools.cache
def alone(family: str, experts: int, start: str) -> dict:
    """One process's start, files, losses and factors after training."""
    model = tiny(family, experts)
    torch.manual_seed(0)
    add_lora(model, config(start, target_parameters=expert_parameters(model)), progress=False)
    return life_alone(model)


def everything(family: str, experts: int, start: str, layout: Layout, before: bool) -> dict:
    """All that is compared, of one sharded model."""
    model = tiny(family, experts)
    how = config(start, target_parameters=expert_parameters(model))
    torch.manual_seed(dist.get_rank())
    if before:
        add_lora(model, how, progress=False)
        base = logits(tiny(family, experts))
    sharded(model, layout)
    if not before:
        base = logits(model)
        add_lora(model, how, progress=False)
    parts = layout.get("fsdp_size", 1) if isinstance(layout, dict) else None
    if isinstance(layout, dict):
        parts *= layout.get("dp_replicate_size", 1)
    return life(model, base, lambda: sharded(tiny(family, experts), layout), parts)


CASES: list[tuple[str, int, int, str, Layout, bool]] = [
    ("GptOss", 3, 2, "absorb", "blocks", False),  # 2 experts and 1; transposed, with biases
    ("Mixtral", 4, 2, "implicit", "columns", True),
    ("Mixtral", 4, 2, "absorb", TP, False),
    ("GptOss", 4, 2, "pissa implicit", EP, False),
]
if EXHAUSTIVE:
    FEW = ("absorb", "pissa implicit")
    CASES += [
        *(("GptOss", 6, 4, start, how, how == "rows") for start in FEW for how in FSDP),
        *(("GptOss", 6, 4, start, "blocks", True) for start in START if start != "lora_xs"),
        ("GptOss", 6, 4, "pissa", "rows", False),
        *(("Mixtral", 4, 2, start, sizes, False) for start in START for sizes in (TP, EP, TP_EP)),
        *(("DeepseekV3", 4, 2, "absorb", sizes, False) for sizes in (TP, EP, TP_EP)),
        *(("NemotronH", 4, 2, start, TP, False) for start in FEW),
        *(("GptOss", 8, 4, start, {"fsdp_size": 4, "ep_size": 2}, False) for start in FEW),
        ("Qwen3Moe", 8, 4, "absorb", {"dp_replicate_size": 2, **EP}, False),
        *(
            ("Mixtral", 8, 4, start, {"tp_size": 2, "fsdp_size": 2, "ep_size": size}, False)
            for start in FEW
            for size in (1, 2, 4)
        ),
    ]


@pytest.mark.parametrize(("family", "experts", "world", "start", "layout", "before"), CASES)
def test_as_on_one_process(family, experts, world, start, layout, before):
    work = functools.partial(everything, family, experts, start, layout, before)
    results = on_ranks(world, lambda rank: work())
    first, expected = results[0], alone(family, experts, start)
    exact = start != "lora_xs"  # R is drawn, and the ranks' seeds differ from that of one process
    if exact:
        assert distance(first["start"], expected["start"]) == 0
        assert first["files"] == expected["files"]
    losses = zip(first["losses"], expected["losses"], strict=True)
    assert max(abs(a - b) for a, b in losses) < (1e-5 if exact else 1e-3)
    # AdamW's first steps have the size of the learning rate, 1e-2, however small a gradient is.
    assert not exact or distance(first["end"], expected["end"]) < 1e-4
    for other in results[1:]:
        assert other["losses"] == first["losses"]
        assert distance(other["end"], first["end"]) == 0
        assert other["saved"] == first["saved"]
    for what in ("at start", "disabled", "loaded", "merged", "unloaded"):
        assert first[what] < (1e-5 if exact or what != "at start" else 1e-3), what
    assert first["left"] == []


class _Collectives(TorchDispatchMode):
    """Counts what is sent. `CommDebugMode` follows modules, and fails in some backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if DTensor in types:
            return NotImplemented
        name = str(function)
        sends = function.namespace in ("c10d", "_c10d_functional")
        if sends and not any(part in name for part in ("wait_tensor", "_wrap_tensor")):
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def _counted(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    with _Collectives() as forward:
        loss = model(input_ids=BATCH, labels=BATCH).loss
    with _Collectives() as backward:
        loss.backward()
    return forward.counts, backward.counts


def _counts(rank: int) -> list[Any]:
    found = []
    for sizes, more in ((TP, 2), (EP, 0), (TP_EP, 0)):
        model = sharded(tiny("Mixtral", 4), sizes)
        model.requires_grad_(False)
        trains = [model.model.embed_tokens, model.model.layers[0].mlp.gate]
        for module in trains:  # as the base has to: the gradients reach all experts
            module.requires_grad_(True)
        before = _counted(model)
        names = expert_parameters(model)
        how = config("absorb", target_modules=[], target_parameters=names)
        add_lora(model, how, progress=False)
        for module in trains:
            module.requires_grad_(True)
        found.append((before, _counted(model), more))
    return found


def test_no_collective_is_added_but_for_gradients_of_what_all_processes_share():
    """Under tensor parallelism the A of the first projection and the B of the second one."""
    for found in on_ranks(2, _counts):
        for (forward, backward), (own_forward, own_backward), more in found:
            assert own_forward == forward
            assert sum(own_backward.values()) == sum(backward.values()) + more


def _several(rank: int) -> list[dict]:
    found = []
    for sizes in (TP, EP):
        model = sharded(tiny("Mixtral", 4), sizes)
        base, names = logits(model), expert_parameters(model)
        how = config("implicit", target_modules=[], target_parameters=names[:1], lora_dropout=0.5)
        add_lora(model, how, progress=False)  # one parameter of the two
        experts = model.model.layers[0].mlp.experts
        forwards = [has_parallel_forward(experts)]
        model.train()
        trained(model, 2, parts=1)
        model.eval()
        one, end = logits(model), whole_tensors(model)
        second = config("pissa implicit", target_modules=[], target_parameters=names)
        add_lora(model, second, adapter_name="second", progress=False)
        own = {"second": float((logits(model) - base).abs().max())}
        set_adapter(model, "default")
        own["first"] = float((logits(model) - one).abs().max())
        own["trained"] = float((one - base).abs().max())
        unload_lora(model)
        own["unloaded"] = float((logits(model) - base).abs().max())
        forwards.append(has_parallel_forward(experts))
        found.append(
            {"own": own, "end": end, "forwards": forwards, "class": type(experts).__name__}
        )
    return found


def test_several_adapters_and_dropout():
    first, other = on_ranks(2, _several)
    for one, two in zip(first, other, strict=True):
        assert one["own"]["trained"] > 1e-3
        assert max(one["own"][what] for what in ("second", "first", "unloaded")) < 1e-6
        assert one["forwards"] == [True, True]
        assert one["class"].endswith("MixtralExperts")
        assert "LoRA" not in one["class"]
        assert distance(one["end"], two["end"]) == 0


def test_masks_of_different_inputs_differ():
    everything_, half = [slice(0, 8)], [slice(4, 8)]
    parts = [(everything_, half, everything_), (half, everything_, everything_)]
    parts.append((everything_, everything_, half))
    first, other_experts, other_columns = (LocalPart(runs).seed for runs in parts)
    assert first == 0  # one input on all processes
    assert len({first, other_experts, other_columns}) == 3


def _refused(rank: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    texts = []

    def refuse(model: Any, text: str) -> None:
        names = expert_parameters(model)
        before = {name: type(module) for name, module in model.named_modules()}
        how = config("absorb", target_modules=[], target_parameters=names)
        with pytest.raises(ValueError, match=text) as error:
            add_lora(model, how, progress=False)
        assert before == {name: type(module) for name, module in model.named_modules()}
        texts.append(str(error.value))

    model = tiny("Mixtral", 4)
    experts, mesh = model.model.layers[0].mlp.experts, init_device_mesh("cpu", (2,))
    for name, weight in list(experts._parameters.items()):
        cut = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts._parameters[name] = nn.Parameter(cut)
    refuse(model, "is a DTensor in the forward of its module: shard experts with")
    model = tiny("Mixtral", 4)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    refuse(model, "expert parallelism.*, but its weights do not tell which are here")
    model = sharded(tiny("Mixtral", 4), EP)
    model.config._experts_implementation = "deepgemm_megamoe"
    refuse(model, "run in a kernel that has no place for adapters")
    model = sharded(tiny("Mixtral", 4), EP)
    if rank == 1:
        model.model.layers[0].mlp.experts.down_proj.detach().to_local()[0, 0] = torch.nan
    refuse(model, r"experts.down_proj\[2\]: .*NaN or Inf")
    return texts


def test_what_cannot_be_served_is_refused_on_all_processes():
    first, other = on_ranks(2, _refused)
    assert first == other
    assert all("\n" not in text for text in first)


def test_a_hook_of_accelerate_around_the_forward_stays():
    hooks = pytest.importorskip("accelerate.hooks")

    def work(rank: int) -> tuple[float, list[float], str]:
        model = sharded(tiny("Mixtral", 4), TP)
        base, experts = logits(model), model.model.layers[0].mlp.experts
        hooks.add_hook_to_module(experts, hooks.AlignDevicesHook(execution_device="cpu"))
        how = config("absorb", target_parameters=expert_parameters(model))
        add_lora(model, how, progress=False)
        losses = trained(model, parts=1)
        unload_lora(model)
        hooks.remove_hook_from_module(experts)
        return float((logits(model) - base).abs().max()), losses, type(experts).__name__

    for off, losses, name in on_ranks(2, work):
        assert off < 1e-5
        expected = alone("Mixtral", 4, "absorb")["losses"]
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
        assert name == "MixtralExperts"
