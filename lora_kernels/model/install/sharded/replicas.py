"""What FSDP2's public names allow: layouts, and parameters that stay replicated on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Place = tuple[nn.Module, str]  # a module and the name of its parameter


class Layout(NamedTuple):
    """The mesh and the placements of a DTensor."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]


def held_parameters(model: nn.Module) -> dict[Place, nn.Parameter]:
    """The parameters that the modules hold at the moment."""
    return {
        (module, name): parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def keep_requires_grad(
    before: Mapping[Place, nn.Parameter], after: Mapping[Place, nn.Parameter]
) -> None:
    """Gives the sharded parameters the `requires_grad` of those that were held before."""
    for place, parameter in after.items():
        old = before[place]
        if old is not parameter and not (old.requires_grad and _is_on_smaller_mesh(old, parameter)):
            parameter.requires_grad_(old.requires_grad)


def _is_on_smaller_mesh(old: Tensor, sharded: Tensor) -> bool:
    """Whether a parameter was resharded to fewer ranks after a forward (`reshard_after_forward` is
    an integer): torch 2.11 sets its requires_grad to True, whatever the sharded parameter has.
    """
    mesh = getattr(old, "device_mesh", None)
    sharded_mesh: Any = getattr(sharded, "device_mesh", None)
    return mesh is not None and mesh.ndim >= sharded_mesh.ndim


def layouts_by_unsharding(modules: Sequence[nn.Module]) -> dict[Place, Layout | None]:
    """The layouts in the forward of the parameters that FSDP2's modules manage; None for plain
    tensors.

    It gathers the parameters of one module after another: all ranks must call this function.
    """
    layouts: dict[Place, Layout | None] = {}
    for module in modules:
        sharded = held_parameters(module)
        module.unshard()  # type: ignore[operator]
        for place, parameter in held_parameters(module).items():
            if parameter is not sharded[place]:
                mesh = getattr(parameter, "device_mesh", None)
                placements = getattr(parameter, "placements", ())
                layouts[place] = None if mesh is None else Layout(mesh, tuple(placements))
        module.reshard()  # type: ignore[operator]
    return layouts


_handles: Any = WeakTensorKeyDictionary()  # of the hooks that average gradients


def average_gradients(members: Mapping[Place, Place]) -> None:
    """Averages the gradients of replicated parameters over the ranks of a sharded weight's mesh,
    without those of the parameter's own (tensor-parallel) mesh.

    Accumulated gradients are averaged in each backward; the result is the same as with one average
    at the end.

    Args:
        members: {(module, name) of a parameter: (module, name) of a sharded weight}.

    Raises:
        ValueError: a weight is not a DTensor, or a parameter is a DTensor on the whole mesh of it.

    """
    hooks = {place: _Average(_get(place), _get(of), of[1]) for place, of in members.items()}
    for place, hook in hooks.items():
        parameter = _get(place)
        if parameter.device.type not in (hook.device_type, "meta"):
            parameter.data = parameter.data.to(hook.device_type)
        _handles[parameter] = parameter.register_post_accumulate_grad_hook(hook)


def stop_averaging(parameters: Iterable[nn.Parameter]) -> None:
    """Removes the hooks of `average_gradients`."""
    for parameter in parameters:
        handle = _handles.pop(parameter, None)
        if handle is not None:
            handle.remove()


def _get(place: Place) -> nn.Parameter:
    module, name = place
    parameter: nn.Parameter = getattr(module, name)
    return parameter


class _Average:
    """A hook that replaces a parameter's gradient by the average over groups of ranks."""

    def __init__(self, parameter: Tensor, weight: Tensor, name: str) -> None:
        if not hasattr(weight, "device_mesh"):
            raise ValueError(
                f"a parameter {name!r} is not sharded by FSDP2 within this model: pass the model "
                "to which fully_shard was applied, without ignoring the weights of adapted layers"
            )
        self._groups = _data_parallel_groups(parameter, weight)  # type: ignore[arg-type]
        self.device_type = weight.device_mesh.device_type

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        import torch.distributed as dist

        gradient: Any = parameter.grad
        local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        total = local.contiguous()
        for group in self._groups:
            dist.all_reduce(total, group=group)
            total.div_(group.size())
        if total is not local:
            local.copy_(total)


def _data_parallel_groups(parameter: Tensor, weight: DTensor) -> list[ProcessGroup]:
    """The groups of the dimensions of a weight's mesh that a parameter's own mesh does not have."""
    mesh = weight.device_mesh
    own = getattr(parameter, "device_mesh", None)
    if own is None:
        return [mesh.get_group(dim) for dim in range(mesh.ndim)]
    names = mesh.mesh_dim_names or ()
    others = [name for name in names if name not in (own.mesh_dim_names or ())]
    if not others:
        raise ValueError(
            f"a parameter on the mesh {own} has no data-parallel dimension of the weight's mesh "
            f"{mesh} left to average its gradient over: make it a DTensor on the "
            "tensor-parallel mesh alone"
        )
    return [mesh.get_group(name) for name in others]
