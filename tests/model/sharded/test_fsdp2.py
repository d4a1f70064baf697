"""`add_lora` and what follows it, before and after FSDP2 shards a model, against one process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    init,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import RankFailed, needs_ranks, on_ranks
from ...support.sharded import (
    distance,
    fully_sharded,
    life,
    life_alone,
    logits,
    shared_folder,
    trained,
    whole_tensors,
)
from ...support.tiny_models import gpt2, llama

pytestmark = needs_ranks

CONFIGS = {
    "absorb": LoRAConfig(r=4),
    "implicit": LoRAConfig(r=4, residual="implicit"),
    "uneven": LoRAConfig(r=3, init_lora_weights=init.InitAB(seed=1)),
    "pissa": LoRAConfig(r=4, init_lora_weights="pissa"),
    "lora_xs": LoRAConfig(r=4, init_lora_weights="lora_xs"),
    # A diagonal between A and B, and a start that is not their product, nor as the base.
    "kasa": LoRAConfig(r=4, init_lora_weights=init.KaSA(seed=1)),
    "mica": LoRAConfig(r=4, init_lora_weights="mica"),
}
ORDERS = ("adapt, shard", "shard, adapt", "evaluate, adapt")


def meshes(layout: str):
    """The mesh of FSDP2, or None for one dimension of all processes."""
    from torch.distributed.device_mesh import init_device_mesh

    if layout != "hsdp":
        return None
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def built(order: str, config: LoRAConfig, layout: str = "fsdp") -> nn.Module:
    model = llama()
    if order == "adapt, shard":
        add_lora(model, config, progress=False)
        return fully_sharded(model, meshes(layout))
    fully_sharded(model, meshes(layout))
    if order == "evaluate, adapt":
        model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    report = add_lora(model, config, progress=False)
    assert "parts by rows" in str(report)
    return model


def everything(rank: int, order: str, config: LoRAConfig, layout: str) -> dict:
    """All that is compared, of one model on shards."""
    base = logits(llama())
    model = built(order, config, layout)
    return life(model, base, lambda: fully_sharded(llama(), meshes(layout)))


@functools.cache
def alone(name: str) -> dict:
    """The same of one process."""
    model = llama()
    add_lora(model, CONFIGS[name], progress=False)
    return life_alone(model)


CASES = [
    ("absorb", "adapt, shard", "fsdp"),
    ("implicit", "evaluate, adapt", "fsdp"),
    ("uneven", "shard, adapt", "fsdp"),
    ("kasa", "shard, adapt", "fsdp"),
    ("absorb", "shard, adapt", "hsdp"),
]
if EXHAUSTIVE:
    CASES = [(n, o, layout) for n in CONFIGS for o in ORDERS for layout in ("fsdp", "hsdp")]


@pytest.mark.parametrize(("name", "order", "layout"), CASES)
def test_as_on_one_process(name, order, layout):
    world = 4 if layout == "hsdp" or name == "uneven" else 2
    results = on_ranks(world, lambda rank: everything(rank, order, CONFIGS[name], layout))
    first, expected = results[0], alone(name)
    assert distance(first["start"], expected["start"]) == 0
    assert first["files"] == expected["files"]
    assert max(abs(a - b) for a, b in zip(first["losses"], expected["losses"], strict=True)) < 1e-5
    assert distance(first["end"], expected["end"]) < 1e-5
    for other in results[1:]:
        assert other["losses"] == first["losses"]
        assert distance(other["end"], first["end"]) == 0
        assert other["saved"] == first["saved"]
    assert (first["at start"] < 1e-5) == (name != "kasa")
    for what in ("disabled", "loaded", "merged", "unloaded"):
        assert first[what] < 1e-5, what
    assert first["left"] == []
    assert "FSDPLlamaDecoderLayer" in first["classes"]
    one = llama()
    load_adapter(one, first["later"], progress=False)  # on one process
    loaded = whole_tensors(one)
    assert all(torch.equal(loaded[n], t) for n, t in first["end"].items() if n.endswith("weight"))


def test_one_collective_starts_a_model():
    """Two numbers a layer, and nothing of W, A or B is sent."""

    def work(rank: int) -> tuple[int, list[int]]:
        from torch.distributed.tensor.debug import CommDebugMode

        model = fully_sharded(llama())
        sent: list[int] = []
        name = "all_gather_into_tensor"  # before torch 2.13
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else name
        gather = getattr(dist, name)

        def counted(found: Tensor, own: Tensor, **options):
            sent.append(own.numel())
            return gather(found, own, **options)

        setattr(dist, name, counted)
        with CommDebugMode() as count:
            report = add_lora(model, LoRAConfig(r=4), progress=False)
        return count.get_total_counts(), sent, len(report.adapted)

    for total, sent, layers in on_ranks(2, work):
        assert sent == [2 * layers]
        assert total == 1


def _nan(weight: Tensor) -> None:
    weight.detach().to_local()[-1, -1] = torch.nan


def _infinite(weight: Tensor) -> None:
    weight.detach().to_local()[0, 0] = -torch.inf


FAULTS = {
    "nan": (_nan, LoRAConfig(r=4), "NaN or Inf"),
    "inf": (_infinite, LoRAConfig(r=4, init_lora_weights=init.InitAB(seed=0)), "NaN or Inf"),
    "pissa": (_nan, LoRAConfig(r=4, init_lora_weights="pissa"), "NaN or Inf"),
    "rank": (None, LoRAConfig(r=4, rank_pattern={"1.mlp.up_proj": 33}), "r = 33 is larger"),
    "loftq": (None, LoRAConfig(r=4, init_lora_weights="loftq"), "is sharded.*before it is sharded"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_those_of_all_ranks(fault):
    """The fault is in one process's part; every process names the layer, and nothing changes."""
    spoil, config, text = FAULTS[fault]
    name = "model.layers.0.self_attn.q_proj" if fault == "loftq" else "model.layers.1.mlp.up_proj"

    def work(rank: int) -> tuple[str, bool]:
        model = fully_sharded(llama())
        if spoil is not None and rank == 1:
            spoil(model.get_submodule(name).weight)
        before = [(n, p.to_local().clone(), type(p)) for n, p in model.named_parameters()]
        with pytest.raises(ValueError, match=text) as raised:
            add_lora(model, config, progress=False)
        after = list(model.named_parameters())
        same = [n for n, _, _ in before] == [n for n, _ in after] and all(
            torch.equal(old, new.to_local()) or not old.isfinite().all()
            for (_, old, _), (_, new) in zip(before, after, strict=True)
        )
        same &= not any("LoRA" in type(module).__name__ for module in model.modules())
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
        return str(raised.value), same

    messages = on_ranks(2, work, 30)
    assert messages[0] == messages[1]
    assert messages[0][1]
    assert name in messages[0][0]


def test_all_zero_weight():
    def work(rank: int) -> str:
        model = llama()
        nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
        with pytest.raises(ValueError, match=r"1\.mlp\.up_proj.* is zero") as raised:
            add_lora(fully_sharded(model), LoRAConfig(r=4), progress=False)
        return str(raised.value)

    assert len(set(on_ranks(2, work, 30))) == 1


@pytest.mark.parametrize("order", ORDERS[:2])
def test_random_starts_without_a_seed(order):
    """Every rank has another generator; they subtract one BA all the same."""

    def work(rank: int) -> tuple[float, float]:
        torch.manual_seed(rank)
        start = llama()
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        model = built(order, LoRAConfig(r=4, init_lora_weights="init_ab"))
        assert not torch.equal(before, torch.get_rng_state())
        torch.manual_seed(rank)
        own = float((logits(model) - logits(start)).abs().max())
        factors = [p for n, p in model.named_parameters() if "lora_A" in n]
        return own, float(sum(p.full_tensor().double().sum() for p in factors))

    (first, a), (second, b) = on_ranks(2, work)
    assert max(first, second) < 1e-5
    assert a == b


class Drawn(init.Initializer):
    """Of a user: drawn from torch's global generator, which nothing says of it."""

    changes_base = True

    def make_start(self, request: init.StartRequest) -> init.Start:
        (rows, cols), r = request.shape, request.r
        return init.Start(torch.randn(r, cols) / cols**0.5, torch.randn(rows, r) / r**0.5)


class Called(init.Initializer):
    """Of a user, who overrides `__call__` and does not say that it reads the weight."""

    changes_base = True

    def __call__(self, weight: Tensor, r: int, scaling: float = 1.0, gradient=None) -> init.Start:
        return init.Start(weight[:r].float(), torch.full((len(weight), r), 0.1))


class Decomposed(Called):
    def __call__(self, weight: Tensor, r: int, scaling: float = 1.0, gradient=None) -> init.Start:
        left, _, right = torch.linalg.svd(weight.float(), full_matrices=False)
        return init.Start(right[:r], left[:, :r])


@pytest.mark.parametrize("order", ORDERS[:2])
def test_drawn_starts_of_a_user(order):
    def work(rank: int) -> float:
        expected = logits(llama())
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        model = llama()
        torch.set_rng_state(before)
        config = LoRAConfig(r=4, init_lora_weights=Drawn())
        if order == ORDERS[0]:
            add_lora(model, config, progress=False)
        model = fully_sharded(model)
        if order != ORDERS[0]:
            add_lora(model, config, progress=False)
        return float((logits(model) - expected).abs().max())

    assert max(on_ranks(2, work)) < 1e-5


def test_starts_of_a_user_that_read_what_they_do_not_declare():
    """Sharded weights have no values for such starts; the error says what to declare."""

    def work(rank: int) -> list[float]:
        found = []
        for start in (Called(), Decomposed()):
            config = LoRAConfig(r=4, init_lora_weights=start)
            model, expected = fully_sharded(llama()), logits(llama())
            with pytest.raises(ValueError, match=f"reads_weight, {type(start).__name__} does not"):
                add_lora(model, config, progress=False)
            found.append(float((logits(model) - expected).abs().max()))
        return found

    assert max(map(max, on_ranks(2, work))) < 1e-6


@pytest.mark.parametrize("start", [init.LoRAM(), init.PiSSA(), init.LoRA()])
def test_initializers_take_whole_weights(start):
    def work(rank: int) -> None:
        weight = fully_sharded(llama()).model.layers[0].mlp.up_proj.weight
        for call in (
            lambda: start(weight, 4),
            lambda: start.starts([weight], 4),
            lambda: start.absorb_(weight, 4, 1.0),
        ):
            with pytest.raises(TypeError, match="the weight is sharded: add_lora"):
                call()

    on_ranks(1, work)


def test_one_rank_writes_after_a_forward():
    """Of a model whose only FSDP2 module is its root, a forward leaves no parameter sharded."""

    def work(rank: int) -> bool:
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(llama())
        add_lora(model, LoRAConfig(r=4), progress=False)
        logits(model)
        assert not any(hasattr(p, "full_tensor") for p in model.parameters())
        own = Path(tempfile.mkdtemp()) / "own"  # another folder on each rank
        save_adapter(model, own, format="native")
        return own.exists()

    assert on_ranks(2, work) == [True, False]


def test_stages_of_a_pipeline_are_not_lost():
    """Each process has other layers, and the first one alone would write."""

    def work(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "shard"))
        model = llama()
        del model.model.layers[rank]
        model.model.layers = nn.ModuleDict({str(1 - rank): model.model.layers[0]})
        fully_shard(model, mesh=mesh["shard"])
        add_lora(model, LoRAConfig(r=4), progress=False)
        with pytest.raises(ValueError, match="different layers, as the stages of a pipeline"):
            save_adapter(model, tempfile.mkdtemp())

    on_ranks(2, work)


def test_plain_models_of_one_rank():
    """A rank may adapt a model on its own, in a program of several: it waits for no other."""

    def work(rank: int) -> int:
        if rank == 0:
            model = llama()
            add_lora(model, LoRAConfig(r=4), progress=False)
            save_adapter(model, tempfile.mkdtemp())
            merge_lora(model)
        return rank

    assert on_ranks(2, work, 20) == [0, 1]


def test_a_layer_that_is_sharded_itself():
    """`fully_shard` on the very layers, whose classes are FSDP2's: Conv1D, biases, a tied head."""

    def work(rank: int) -> tuple:
        from torch.distributed.fsdp import fully_shard

        base = gpt2()
        expected = logits(base)
        model = gpt2()
        for block in model.transformer.h:
            fully_shard(block.attn.c_attn)
            fully_shard(block)
        fully_shard(model)
        add_lora(model, LoRAConfig(r=4), progress=False)
        kind = type(model.transformer.h[0].attn.c_attn).__name__
        start = float((logits(model) - expected).abs().max())
        losses = trained(model)
        unload_lora(model)
        end = float((logits(model) - expected).abs().max())
        return kind, type(model.transformer.h[0].attn.c_attn).__name__, start, end, losses

    one = gpt2()
    add_lora(one, LoRAConfig(r=4), progress=False)
    losses = trained(one)
    for adapted, given_back, start, end, found in on_ranks(2, work):
        assert (adapted, given_back) == ("FSDPLoRAConv1D", "FSDPConv1D")
        assert max(start, end) < 1e-5
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < 1e-5


def test_an_error_while_writing_is_raised_on_all_ranks():
    def work(rank: int) -> None:
        model = built("shard, adapt", LoRAConfig(r=4))
        file = shared_folder() / "file"
        if rank == 0:
            file.write_text("")
        dist.barrier()
        save_adapter(model, file)

    results = on_ranks(2, work, 30, check=False)
    assert all(isinstance(result, RankFailed) for result in results)
    assert results[0].text == results[1].text
    assert "file" in results[0].text
