"""Adapters on layers that transformers' tensor parallelism has sharded, beside one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, add_lora, merge_lora, unload_lora
from lora_kernels.init import KaSA
from lora_kernels.layers.linear import AdaptedFloatLayer

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import needs_ranks, on_ranks

pytestmark = needs_ranks
tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: E402

from lora_kernels.model.install.sharded.tensor_parallel import (  # noqa: E402
    distribute_factors,
    factor_placements,
)

R, S = Replicate(), Shard
EXACT = 1e-12


def test_the_factors_placements():
    packed = _StridedShard(0, split_factor=2)
    assert factor_placements([S(0)]) == ((R,), (S(0),))
    assert factor_placements([S(1)]) == ((S(1),), (R,))
    assert factor_placements([S(1)], transposed=True) == ((R,), (S(0),))
    assert factor_placements([R, S(-1)]) == ((R, S(1)), (R, R))
    assert factor_placements([packed]) == ((R,), (packed,))
    assert factor_placements([S(0), S(2)], dims=3) == ((S(0), S(2)), (S(0), R))
    assert factor_placements([S(1)], dims=3) == ((R,), (S(1),))
    with pytest.raises(ValueError, match="columns are packed"):
        factor_placements([_StridedShard(1, split_factor=2)])
    with pytest.raises(ValueError, match="partial sums"):
        factor_placements([Partial()])


class Gated(nn.Module):
    """An MLP whose first layer is packed, and a router-like layer that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole = nn.Linear(8, 8)
        self.query = nn.Linear(8, 12)
        self.both = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(12, 8)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.whole(x)
        gate, up = self.both(x).chunk(2, -1)
        return self.out(torch.tanh(self.query(x)) * gate + up)


PLAN = {"query": "colwise", "both": "packed_colwise", "out": "rowwise", "whole": "replicate"}


def parallel(mesh, without: str = "") -> Gated:
    """`Gated` as transformers shards it; `whole` only has its forward replaced."""
    model, plan = Gated(), {name: style for name, style in PLAN.items() if name != without}
    weights = {f"{name}.weight": style for name, style in PLAN.items() if name != "whole"}
    biases = {f"{name}.bias": PLAN[name] for name in ("query", "out")}
    return tensor_parallel.apply_tensor_parallelism(model, mesh, plan | weights | biases)


def run(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad)
    grads = {n: full(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    return [y.detach(), x.grad, *(grads[name] for name in sorted(grads))]


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def adapt(model: nn.Module, names: Sequence[str] = tuple(PLAN), **options: Any) -> nn.Module:
    add_lora(model, LoRAConfig(r=3, lora_alpha=6, target_modules=list(names), **options))
    for layer in model.modules():
        if isinstance(layer, AdaptedFloatLayer):  # past the first step, alike on all processes
            for name, parameter in layer.active().named_parameters():
                torch.manual_seed(len(name))
                step = 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
                with torch.no_grad():
                    parameter += like(step.to(parameter.dtype), parameter)
    return model


def like(whole: Tensor, parameter: Any) -> Any:
    if not isinstance(parameter, DTensor):
        return whole
    mesh, places = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, places, src_data_rank=None)


def in_styles(rank: int, world: int, options: dict[str, Any]) -> dict[str, float]:
    mesh, found = init_device_mesh("cpu", (world,)), {}
    torch.manual_seed(1)
    x, grad = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    plain, model = adapt(Gated(), **options), adapt(parallel(mesh), **options)
    wrapped = {name: "tp_forward" in repr(vars(m).get("forward")) for name, m in layers(model)}
    assert wrapped == dict.fromkeys(PLAN, True)
    found["train"] = difference(run(model, x, grad), run(plain, x, grad))
    assert isinstance(model.query.lora_B, DTensor) and model.both.lora_B.placements[0].dim == 0
    plain.eval(), model.eval()
    for enabled in (True, False):
        for _, layer in (*layers(plain), *layers(model)):
            layer.adapter_enabled = enabled
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                found[f"{mode.__name__} {enabled}"] = difference([model(x)], [plain(x)])
    unload_lora(plain), unload_lora(model)
    assert all(type(layer) is nn.Linear for _, layer in layers(model))
    with torch.no_grad():
        found["unloaded"] = difference([model(x)], [plain(x)])
    wrapped = {name: "tp_forward" in repr(vars(m).get("forward")) for name, m in layers(model)}
    assert wrapped == dict.fromkeys(PLAN, True)
    return found


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, getattr(model, name)) for name in PLAN]


OPTIONS = [
    {},
    {"residual": "implicit", "lora_dropout": 0.3},
    # A diagonal between A and B, and a start that is not their product.
    {"init_lora_weights": KaSA(seed=1), "residual": "implicit"},
]
if EXHAUSTIVE:
    OPTIONS += [{"init_lora_weights": name, "residual": "implicit"} for name in ("pissa", "mica")]


@pytest.mark.parametrize("world", [2, 4] if EXHAUSTIVE else [2])
def test_in_the_styles_of_transformers(world):
    for options in OPTIONS:
        for found in on_ranks(world, partial(in_styles, world=world, options=options)):
            assert {name: error for name, error in found.items() if not error < EXACT} == {}


def over_tensor_parallelism(rank: int) -> dict[str, float]:
    """FSDP2 on the first mesh dimension, tensor parallelism on the second one."""
    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    torch.manual_seed(1)
    x, grad = torch.randn(4, 3, 8).double(), torch.randn(4, 3, 8).double()
    part = slice(2 * (rank // 2), 2 * (rank // 2) + 2)
    names = [name for name in PLAN if name != "both"]
    want = run(adapt(Gated(), names), x, grad)
    for order in ("adapter, FSDP2", "FSDP2, adapter"):
        model = parallel(mesh["tp"])
        if order == "adapter, FSDP2":
            model = fully_shard(adapt(model, names), mesh=mesh["dp"])
        else:
            model = adapt(fully_shard(model, mesh=mesh["dp"]), names)
        got = run(model, x[part], 2 * grad[part])  # FSDP2 takes the mean
        found[order] = difference(got, [want[0][part], 2 * want[1][part], *want[2:]])
    message = "^both: the weight is packed by tensor parallelism and sharded by FSDP2"
    with pytest.raises(ValueError, match=message):
        adapt(fully_shard(parallel(mesh["tp"]), mesh=mesh["dp"]), ["both"])
    return found


def test_fsdp2_over_tensor_parallelism():
    for found in on_ranks(4, over_tensor_parallelism):
        assert {name: error for name, error in found.items() if not error < EXACT} == {}


def partly(rank: int, world: int) -> dict[str, float]:
    """`whole` is not in the plan. Clipping and foreach take all factors, and find one process's;
    with two dimensions, FSDP2 has the first one, and all processes the whole batch.
    """
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8).double()
    names = [name for name in PLAN if name != "both"]
    plain, model = adapt(Gated(), names, lora_dropout=0.2), parallel(mesh["tp"], without="whole")
    if world > 2:
        fully_shard(model, mesh=mesh["dp"])
    adapt(model, names, lora_dropout=0.2)
    bias = torch.randn(8).double()
    if world == 2:  # as PEFT's lora_bias=True
        plain.whole.active().lora_bias = nn.Parameter(bias.clone())
        model.whole.active().lora_bias = nn.Parameter(distribute_tensor(bias, mesh["tp"], [R]))
    assert len({p.device_mesh for p in model.parameters() if p.requires_grad}) == 1
    for own in (plain, model):
        trained = [p for p in own.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=True)
        torch.manual_seed(5)
        for _ in range(2):
            own(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.1)
            optimizer.step()
            optimizer.zero_grad()
    found = {}
    for name, change in (("trained", lambda _: None), ("merged", merge_lora)):
        change(plain.eval()), change(model.eval())
        with torch.no_grad():
            found[name] = difference([model(x)], [plain(x)])
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_layers_outside_the_plan_have_factors_of_the_same_mesh(world):
    for found in on_ranks(world, partial(partly, world=world)):
        assert {name: error for name, error in found.items() if not error < 1e-9} == {}


def distributed(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    model = adapt(Gated())
    adapter = model.query.active()
    whole = adapter.lora_B.detach().clone()
    distribute_factors(adapter, mesh, [S(0)])
    local = adapter.lora_B.to_local()
    assert torch.equal(local, whole[6 * rank : 6 * rank + 6])
    assert local.untyped_storage().nbytes() == local.numel() * local.element_size()
    assert adapter.lora_A.placements == (R,) and adapter.lora_B.is_leaf
    assert adapter.lora_A.requires_grad and adapter.lora_B.requires_grad
    kept = adapter.lora_B
    distribute_factors(adapter, mesh, [S(0)])
    assert adapter.lora_B is kept
    found = []
    tokens = nn.Embedding(8, 4)
    tokens.weight = nn.Parameter(distribute_tensor(tokens.weight.detach(), mesh, [S(0)]))
    embedded = nn.Sequential(tokens)
    style = tensor_parallel.ReplicatedWithGradAllReduce()
    summed = style.install_forward(nn.Linear(4, 4), mesh)
    for call in (
        lambda: add_lora(embedded, LoRAConfig(r=2, target_modules=["0"])),
        lambda: add_lora(nn.Sequential(summed), LoRAConfig(r=2, target_modules=["0"])),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    assert "tp_forward" in repr(summed.forward)
    assert type(embedded[0]) is nn.Embedding
    return found


def test_distributes_without_keeping_the_whole():
    for found in on_ranks(2, distributed):
        assert ["embedding" in found[0], "replicated_with_grad_allreduce" in found[1]] == [True] * 2
