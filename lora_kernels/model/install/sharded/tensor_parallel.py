"""Layers under tensor parallelism: the placements of their factors, and the forwards that
transformers has replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from ....init.sharded.layout import is_dtensor, of_dimension
from ....layers.adapter import Adapter
from ....layers.kinds import is_parallel_forward

Placements: TypeAlias = tuple[Any, ...]  # one for each mesh dimension
_SLOTS = ("forward", "_old_forward")  # of an instance; the second one is accelerate's


def factor_placements(
    placements: Sequence[Any], dims: int = 2, transposed: bool = False
) -> tuple[Placements, Placements]:
    """The placements of A [r, in] and of B [out, r] that fit those of W [out, in], stored as
    [in, out] if `transposed`: A is sharded as W's columns are and B as its rows are. With `dims=3`,
    W [E, out, in] is a stack of experts, and so are A and B.

    If W is packed, that is, if its rows are several matrices that are sharded one by one
    (`_StridedShard`), the rows of B are packed too.

    Raises:
        ValueError: W holds partial sums, or its columns are packed.

    """
    from torch.distributed.tensor import Replicate, Shard

    rows, columns = (dims - 1, dims - 2) if transposed else (dims - 2, dims - 1)
    for_A, for_B = [], []
    for placement in placements:
        if placement.is_partial():
            raise ValueError("the weight holds partial sums, of which no process knows the whole")
        dim = None if placement.is_replicate() else placement.dim % dims
        packed = hasattr(placement, "split_factor")
        if dim == columns and packed:
            raise ValueError(
                f"the weight's columns are packed ({placement}): leave this layer out of "
                "target_modules"
            )
        if dim is None or dim in (rows, columns):
            for_A.append(Shard(dims - 1) if dim == columns else Replicate())
            for_B.append(of_dimension(placement, dims - 2) if dim == rows else Replicate())
        else:  # experts
            for_A.append(placement)
            for_B.append(placement)
    return tuple(for_A), tuple(for_B)


def distribute_factors(
    adapter: Adapter, mesh: Any, placements: Sequence[Any], transposed: bool = False
) -> None:
    """Makes the parameters of an adapter DTensors that fit a W with these placements on this mesh.
    Before this, they are plain, and every process has the same whole ones, so that nothing is sent.
    Parameters that are DTensors already stay.

    Raises:
        ValueError: as `factor_placements`.

    """
    from torch.distributed.tensor import Replicate

    for_A, for_B = factor_placements(placements, adapter.lora_A.dim(), transposed)
    stack = adapter.lora_A.dim() == 3
    for_R = tuple(p if stack and p == q else Replicate() for p, q in zip(for_A, for_B, strict=True))
    own = {"lora_A": for_A, "lora_B": for_B, "lora_R": for_R, "lora_bias": for_B}
    own |= {"lora_diag": for_R, "lora_magnitude": for_B}
    for name, places in own.items():
        parameter = adapter._parameters[name]
        if parameter is not None and not is_dtensor(parameter):
            setattr(adapter, name, _distributed(parameter, mesh, places))


@contextmanager
def rewrapped(module: nn.Module) -> Iterator[None]:
    """Inside the context, the module's forward is without the wrapper of transformers' tensor
    parallelism, so that the module's class can be exchanged. At the end the wrapper is restored.

    Raises:
        ValueError: the layer has a parallel style that does not support the adapter's factors.

    """
    styles = _taken_off(module)
    try:
        yield
    finally:
        _put_on(module, styles)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Wraps the forward of `new` as transformers' tensor parallelism has wrapped that of `old`,
    which `new` replaces. Layers whose weight is replicated may have such a wrapper too.
    """
    if new is not old:
        styles = _taken_off(old)
        _put_on(old, styles)
        _put_on(new, styles)


def _put_on(module: nn.Module, styles: Sequence[tuple[Any, Any]]) -> None:
    for style, mesh in reversed(styles):
        style.install_forward(module, mesh)


def _taken_off(module: nn.Module) -> list[tuple[Any, Any]]:
    """Restores the module's forward, and returns the style and the mesh of each replacement of it,
    outermost first.
    """
    found: list[tuple[Any, Any]] = []
    for slot in _SLOTS:
        while is_parallel_forward(vars(module).get(slot)):
            closure = inspect.getclosurevars(vars(module)[slot]).nonlocals
            if "self" not in closure:
                raise ValueError(
                    "the gradients of this layer are summed by transformers' style "
                    "'replicated_with_grad_allreduce', which would not sum those of an adapter: "
                    "leave it out of target_modules"
                )
            found.append((closure["self"], closure["mesh"]))
            inner = closure["original_forward"]
            if slot == "forward" and getattr(inner, "__func__", None) is type(module).forward:
                del vars(module)[slot]
            else:
                object.__setattr__(module, slot, inner)
    return found


def _distributed(parameter: nn.Parameter, mesh: Any, placements: Placements) -> nn.Parameter:
    """A DTensor of a plain parameter that every process has whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parts: Any = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
    local: Tensor = parts.to_local().clone()  # not a view, which would keep the whole in memory
    size, strides = parts.shape, parts.stride()
    own = DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=strides)
    return nn.Parameter(own, requires_grad=parameter.requires_grad)
