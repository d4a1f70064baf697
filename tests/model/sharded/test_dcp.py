"""Checkpoints of `torch.distributed.checkpoint`: saved by some processes, loaded by others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, disable_adapters, unload_lora
from lora_kernels.layers.adapter import Adapter

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded, logits, shared_folder, trained
from ...support.tiny_models import llama, mixtral
from .test_meta import loaded, on_meta

STARTS = {
    "loram": {},
    "implicit": {"residual": "implicit"},
    "pissa": {"init_lora_weights": "pissa"},
    "lora": {"init_lora_weights": "lora"},
    "lora_xs": {"init_lora_weights": "lora_xs"},
}
# What is saved, and into what it is loaded: "" is the same start.
PAIRS = [
    ("loram", ""), ("loram", "waiting"), ("loram", "lora"), ("pissa", ""), ("lora", "loram"),
    ("pissa", "waiting"), ("implicit", ""), ("lora_xs", "waiting"),
]  # fmt: skip


def config(name: str) -> LoRAConfig:
    return LoRAConfig(r=4, **STARTS[name])


def model_of(name: str, sharded_first: bool, seed: int = 0) -> nn.Module:
    model = llama(seed=seed)
    for sharding in (True, False) if sharded_first else (False, True):
        if sharding:
            fully_sharded(model)
        else:
            add_lora(model, config(name), progress=False)
    return model


def waiting(name: str) -> nn.Module:
    model = on_meta()
    add_lora(model, config(name), progress=False)
    model = loaded(fully_sharded(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    with disable_adapters(model):
        base = logits(model)
    return logits(model), base


def save(model: nn.Module, folder) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def load(model: nn.Module, folder) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of every start: the folder, and the outputs with and without the adapter."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def work(rank: int):
        found = {}
        for index, name in enumerate(STARTS):
            model = model_of(name, sharded_first=index % 2 == 0)
            trained(model, 1)
            save(model, folder / name)
            found[name] = outputs(model)
        return found

    return folder, on_ranks(2, work)[0]


@needs_ranks
@pytest.mark.parametrize("world", [1, 2, 4] if EXHAUSTIVE else [1, 4])
def test_round_trips(checkpoints, world):
    folder, wanted = checkpoints
    some = PAIRS if EXHAUSTIVE else PAIRS[:3]

    def work(rank: int):
        found = {}
        for index, (name, into) in enumerate(some):
            if into == "waiting":
                model = waiting(name)
            else:
                model = model_of(into or name, index % 2 == 1, seed=9)
            load(model, folder / name)
            found[name, into] = (*outputs(model), logits(unload_lora(model)))
        return found

    base = logits(llama())
    for ours in on_ranks(world, work):
        for (name, _), (with_adapter, without, unloaded) in ours.items():
            assert torch.equal(with_adapter, wanted[name][0])
            assert torch.equal(without, wanted[name][1])
            torch.testing.assert_close(unloaded, base, rtol=0, atol=1e-6)


@needs_ranks
@pytest.mark.parametrize(
    ("name", "into", "text"),
    [
        ("pissa", "lora", r"has stored its start \(start_A, start_B\), of which this one has none"),
        ("lora_xs", "lora", r"has an R \(lora_R\), this one has none"),
        ("implicit", "loram", "the saved layer has residual='implicit', this one 'absorb'"),
    ],
)
def test_what_does_not_fit(checkpoints, name, into, text):
    """torch passes over what only the checkpoint has."""
    folder, _ = checkpoints

    def work(rank: int):
        with pytest.raises(ValueError, match=text):
            load(model_of(into, sharded_first=True), folder / name)

    on_ranks(1, work)


@needs_ranks
def test_an_in_place_base_checkpoint_and_then_the_start():
    """A checkpoint of the base, loaded into a model whose adapters wait."""
    from lora_kernels import start_adapters

    def work(rank: int):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        folder = shared_folder()
        save(fully_sharded(llama()), folder)
        model = waiting("loram")
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder, planner=planner)
        model.load_state_dict(state["model"])  # the adapters' own keys say that they wait
        start_adapters(model, progress=False)
        dist.barrier()
        return logits(model)

    want = llama()
    add_lora(want, config("loram"), progress=False)
    for found in on_ranks(2, work):
        assert torch.equal(found, logits(want))


def linear(**options) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear.from_linear(nn.Linear(12, 10), r=2, **options)


class TestExtraState:
    @pytest.mark.parametrize("name", STARTS)
    def test_size(self, name):
        options = STARTS[name]
        adapter = linear(**options).active()
        state = adapter.get_extra_state()
        assert state.shape == (2,) and state.dtype == torch.float64
        assert bool(state[0].isnan()) == (name not in ("loram", "pissa"))
        has_beta = name in ("loram", "implicit")
        assert bool(state[1].isfinite()) == has_beta and (adapter.beta is not None) == has_beta

    def test_experts(self):
        model = mixtral()
        target = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
        for start in ("loram", "lora"):
            add_lora(model, LoRAConfig(r=2, init_lora_weights=start, **target), progress=False)
            sizes = {m.get_extra_state().shape for m in model.modules() if isinstance(m, Adapter)}
            assert sizes == {(2,), (5,)}
            unload_lora(model)

    @pytest.mark.parametrize("name", STARTS)
    def test_former_sizes_still_load(self, name):
        """Until version 0.1 numbers that there were not were left out."""
        layer, other = linear(**STARTS[name]), linear(**STARTS[name])
        state = layer.state_dict()
        key = next(key for key in state if key.endswith("_extra_state"))
        numbers = state[key]
        kept = int(numbers.isfinite().nonzero().max()) + 1 if bool(numbers.isfinite().any()) else 0
        state[key] = numbers[:kept]
        other.load_state_dict(state)
        assert torch.equal(other.base_weight(), layer.base_weight())
        assert other.absorbed == layer.absorbed
        torch.testing.assert_close(other.active().get_extra_state(), numbers, equal_nan=True)

    @pytest.mark.parametrize("name", ["loram", "pissa"])
    @pytest.mark.parametrize("into", ["loram", "pissa", "lora"])
    def test_into_another_start(self, name, into):
        layer, other = linear(**STARTS[name]), linear(**STARTS[into])
        with torch.no_grad():
            layer.lora_B.add_(0.1)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(3, 12)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.base_weight(), layer.base_weight())
        assert other.state_dict().keys() == layer.state_dict().keys()

    @pytest.mark.parametrize(("name", "factor"), [("kasa", "lora_diag"), ("lora_xs", "lora_R")])
    def test_what_is_between_is_not_lost(self, name, factor):
        """`torch.distributed.checkpoint` passes over what only the file has."""
        layer, other = linear(init_lora_weights=name), linear(init_lora_weights="pissa")
        again = linear(init_lora_weights=name)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(getattr(again, factor), getattr(layer, factor))
        state = {key: tensor for key, tensor in layer.state_dict().items() if factor not in key}
        with pytest.raises(ValueError, match=rf"\({factor}\), this one has none"):
            other.load_state_dict(state, strict=False)
