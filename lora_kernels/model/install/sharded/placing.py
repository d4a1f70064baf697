"""Places the factors of sharded layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from ....init.sharded.layout import is_dtensor
from ....layers.adapted import AdaptedLayer
from ....layers.kinds import EMBEDDING
from ....layers.linear import AdaptedFloatLayer, LoRAEmbedding
from ....layers.linear.parallel import PARALLEL_EMBEDDING
from ...experts.stack import AdaptedStack
from ...experts.wrapped import has_parallel_forward
from ...plan import LayerPlan
from .fsdp import fsdp_modules, join, unsharded_layouts
from .replicas import Layout, Place
from .tensor_parallel import distribute_factors


def place_factors(model: nn.Module, layers: Sequence[AdaptedLayer], adapter_name: str) -> None:
    """Places the new factors of layers with a sharded weight. Under tensor parallelism, the factors
    become DTensors that fit W; where FSDP2 manages W, they join its group. If all layers under
    tensor parallelism have one mesh, the factors of the other linear layers become replicated
    DTensors on it too: `clip_grad_norm_` and the optimizers' foreach and fused loops accept only
    tensors of one kind.

    Before this, all processes have the same whole factors, so that nothing is sent.
    """
    weights = [_weight_place(layer) for layer in layers]
    inside = {part for module in fsdp_modules(model) for part in module.modules()}
    if not inside and not any(is_dtensor(module._parameters.get(name)) for module, name in weights):
        return
    known = unsharded_layouts(model)
    layouts = [_layout(place, known) for place in weights]
    whole = _whole_layout(layers, layouts)
    members: dict[Place, Place] = {}
    for layer, place, own_layout in zip(layers, weights, layouts, strict=True):
        adapter = layer.adapter(adapter_name)
        layout = own_layout or (whole if _is_linear(layer) else None)
        if layout is not None:
            transposed = bool(getattr(layer, "transposed", False))
            distribute_factors(adapter, layout.mesh, layout.placements, transposed)
            if isinstance(layer, AdaptedStack):
                layer.follow(adapter_name, layout.mesh, layout.placements)
        if place[0] in inside:  # also where FSDP2 ignores W itself
            own = (name for name, parameter in adapter._parameters.items() if parameter is not None)
            members |= {(adapter, name): place for name in own}
    join(model, members)


def _layout(place: Place, known: Mapping[Place, Layout | None]) -> Layout | None:
    """The layout of a weight in the forward; None for a plain tensor."""
    weight: Any = place[0]._parameters.get(place[1])
    if place in known or weight is None or not is_dtensor(weight):
        return known.get(place)
    return Layout(weight.device_mesh, weight.placements)


def _whole_layout(
    layers: Sequence[AdaptedLayer], layouts: Sequence[Layout | None]
) -> Layout | None:
    """The layout of a replicated tensor on the one mesh of all linear layers under tensor
    parallelism; None if there is no such mesh.
    """
    pairs = zip(layers, layouts, strict=True)
    meshes = {layout.mesh for layer, layout in pairs if layout is not None and _is_linear(layer)}
    if len(meshes) != 1:
        return None
    from torch.distributed.tensor import Replicate

    mesh = meshes.pop()
    return Layout(mesh, (Replicate(),) * mesh.ndim)


def _is_linear(layer: AdaptedLayer) -> bool:
    return isinstance(layer, AdaptedFloatLayer) and not isinstance(layer, LoRAEmbedding)


def check_forwards(model: nn.Module, plans: Sequence[LayerPlan]) -> None:
    """Raises ValueError, with the layer's name, for experts and embeddings that would have to run
    with a part of their weights in a way that is not supported.
    """
    unknown = [plan for plan in plans if _needs_the_whole(plan)]
    layouts = unsharded_layouts(model) if unknown else {}
    for plan in unknown:
        place = plan.base.place
        if layouts.get(place) is None and place in layouts:  # FSDP2 gathers the whole weight
            continue
        if plan.base.num_experts is None:
            raise ValueError(f"{plan.name}: {PARALLEL_EMBEDDING}")
        raise ValueError(
            f"{plan.name} is a DTensor in the forward of its module: shard experts with "
            "fully_shard, or with transformers' DistributedConfig (tensor or expert "
            "parallelism), or leave them out of target_parameters"
        )


def _needs_the_whole(plan: LayerPlan) -> bool:
    """Whether the layer is sharded, and its adapters cannot run with a part of its weight."""
    base = plan.base
    if not (base.rewritable and is_dtensor(base.stored_weight)):
        return False
    if base.num_experts is not None:
        return not has_parallel_forward(base.place[0])
    return base.kind == EMBEDDING


def _weight_place(layer: AdaptedLayer) -> Place:
    """The module that has the layer's weight, and the weight's name there."""
    if isinstance(layer, AdaptedStack):
        return cast(nn.Module, layer.experts), layer.parameter
    return layer, "weight"
