"""FSDP1, `torch.distributed.fsdp.FullyShardedDataParallel`, around a model that is adapted.

FSDP1 replaces all parameters of a unit by views of one flat parameter, of which each process has a
contiguous piece. The parameters have values and shapes of their own only while the unit is summoned
(`summon_full_params`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import nn

from ....init.sharded.layout import is_flattened

T = TypeVar("T")
Unit = Any  # a FullyShardedDataParallel


def by_unit(
    model: nn.Module, entries: list[T], module_of: Callable[[T], nn.Module], write: bool = False
) -> Iterator[tuple[AbstractContextManager[None], list[T]]]:
    """Groups the entries by the unit of FSDP1 that holds their modules' parameters. Yields
    (context, entries), to be used at once. Within the context the parameters are whole; with
    `write`, changes of them are kept. One unit is whole at a time, and all processes must enter its
    context.

    For a model without FSDP1, it yields all entries at once, in the given list.

    Raises:
        ValueError: a unit outside of the model holds the parameters.

    """
    units = _units(model)
    inner = {id(part): unit for unit in units for part in unit.modules()}  # the last is innermost
    if not units and not any(_is_cut(module_of(entry)) for entry in entries):
        yield nullcontext(), entries
        return
    for unit in (None, *units):
        own = [entry for entry in entries if inner.get(id(module_of(entry))) is unit]
        if own and unit is None:
            _refuse_cut([module_of(entry) for entry in own])
        if own:
            yield _summoned(unit, write), own


def _units(model: nn.Module) -> list[Unit]:
    """The units of a model, outer ones first; afterwards FSDP1 knows which unit is the root."""
    # Without an import of ours: where nobody has imported FSDP, no module is FSDP1's.
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    units: list[Unit] = [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]
    for unit in units:  # FSDP1 makes the first unit that is used the root
        if getattr(unit, "_is_root", True) is None:
            with _summoned(unit, False):
                pass
    return units


def _summoned(unit: Unit | None, write: bool) -> AbstractContextManager[None]:
    if unit is None or unit.training_state.name == "SUMMON_FULL_PARAMS":  # by the caller already
        return nullcontext()
    context: AbstractContextManager[None]
    context = type(unit).summon_full_params(unit, recurse=False, writeback=write)
    return context


def _is_cut(module: nn.Module) -> bool:
    """Whether the module's matrices are pieces of a flat parameter."""
    flat = [p for p in module.parameters() if is_flattened(p)]
    return bool(flat) and all(parameter.dim() == 1 for parameter in flat)


def _refuse_cut(modules: Sequence[nn.Module]) -> None:
    if any(map(_is_cut, modules)):
        raise ValueError(
            "the parameters are held by a FullyShardedDataParallel outside of the given model: "
            "pass that wrapper, or call this within its summon_full_params"
        )
