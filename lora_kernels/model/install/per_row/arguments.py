"""Splits the arguments of a call into groups of a batch's rows, and joins the results."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from .caches import Caches, is_cache
from .rows import NotRowsError, Rows, is_shared, joined_shared

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Arguments whose first dimension is not that of the rows, even if it is as long.
_OF_ALL_ROWS = ("cache_position", "logits_to_keep", "head_mask", "img_ids", "txt_ids")
# torch's names for masks [L, S] of all rows; masks of single rows have three dimensions. In other
# modules, a mask with such a name may be [rows, L].
_TORCH_MASKS = ("mask", "src_mask", "tgt_mask", "memory_mask", "attn_mask")
# Of multimodal rotary embeddings, [3, rows, length].
_POSITIONS = "position_ids"


def named_arguments(module: nn.Module, call: Call) -> list[tuple[str, Any]]:
    """The arguments of a call of a module, with the names that its forward gives them."""
    args, kwargs = call
    cls: Any = type(module)  # type checkers see no Hashable, by nn.Module's annotations
    names = _parameter_names(cls)
    numbered = [f"argument {number}" for number in range(len(names), len(args))]
    return [*zip((*names, *numbered)[: len(args)], args, strict=True), *kwargs.items()]


@lru_cache(maxsize=1024)
def _parameter_names(cls: Any) -> tuple[str, ...]:
    """The names of the positional parameters of a class's forward."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = list(inspect.signature(_forward_of(cls)).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def _forward_of(cls: Any) -> Any:
    """The function `forward` of a class; None for TorchScript, where each module has its own."""
    return getattr(cls, "forward", None)


def row_count(named: Sequence[tuple[str, Any]]) -> int:
    """The first dimension of the first tensor that may hold several rows, else 1.

    Raises:
        NotRowsError: there is no such tensor.

    """
    sizes = [len(tensor) for name, tensor in _tensors(named) if _may_hold_rows(name, tensor)]
    if not sizes:
        raise NotRowsError("it gets no tensor with rows")
    return next((size for size in sizes if size != 1), 1)


def _tensors(named: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in named:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(list(value.items()))
        elif isinstance(value, (list, tuple)):
            yield from _tensors([(name, item) for item in value])


def _may_hold_rows(name: str, tensor: Tensor) -> bool:
    if tensor.dim() == 0 or name in _OF_ALL_ROWS:
        return False
    if name == _POSITIONS and tensor.dim() == 3:
        return False
    return not (name in _TORCH_MASKS and tensor.dim() == 2)


class SplitCall:
    """A call of a module in groups of rows: `calls` has each group's arguments.

    Raises:
        NotRowsError: an argument is neither one value for all rows nor has an index for each row.

    """

    def __init__(self, module: nn.Module, call: Call, rows: Rows) -> None:
        self._rows, self._caches = rows, Caches(rows)
        origin = getattr(_forward_of(type(module)), "__module__", "")
        self._of_torch = origin.partition(".")[0] == "torch"
        args, kwargs = call
        named = named_arguments(module, call)
        parts = [self._parts(name, value) for name, value in named]
        count, keys = len(args), list(kwargs)
        self.calls: list[Call] = [
            (own[:count], dict(zip(keys, own[count:], strict=True)))
            for own in zip(*parts, strict=True)
        ]

    def _parts(self, name: str, value: Any) -> list[Any]:
        """Each group's part of a value."""
        groups = range(len(self._rows.groups))
        if isinstance(value, Tensor):
            return self._tensor_parts(name, value)
        if isinstance(value, (list, tuple)):
            columns = [self._parts(name, item) for item in value]
            return [_like(value, [column[g] for column in columns]) for g in groups]
        if is_cache(value):
            return self._caches.parts(value)
        if isinstance(value, MutableMapping):
            own = {key: self._parts(str(key), item) for key, item in value.items()}
            return [_with_items(value, {k: v[g] for k, v in own.items()}) for g in groups]
        if _is_dataclass(value):
            own = {key: self._parts(key, item) for key, item in vars(value).items()}
            return [_with_fields(value, {k: v[g] for k, v in own.items()}) for g in groups]
        if is_shared(value):
            return [value for _ in groups]
        raise NotRowsError(f"{name} is a {type(value).__name__}")

    def _tensor_parts(self, name: str, value: Tensor) -> list[Tensor]:
        if not _may_hold_rows(name, value):
            if name == _POSITIONS and value.dim() == 3 and value.shape[1] == self._rows.size:
                return [part.transpose(0, 1) for part in self._rows.of(value.transpose(0, 1))]
            if name in _TORCH_MASKS and len(value) == self._rows.size and not self._of_torch:
                raise NotRowsError(f"{name} {list(value.shape)} may be [rows, L] or [L, S]")
            return [value for _ in self._rows.groups]
        if len(value) == self._rows.size:
            return self._rows.of(value)
        if len(value) == 1:
            return [value for _ in self._rows.groups]
        raise NotRowsError(f"{name} is {list(value.shape)}, for {self._rows.size} rows")

    def joined(self, results: Sequence[Any]) -> Any:
        """The results of the groups as one result; their caches are written back.

        Raises:
            NotRowsError: the results cannot be joined. The caches are unchanged.

        """
        result = self._joined("the result", results)
        self._caches.finish()
        return result

    def _joined(self, what: str, parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            return self._rows.join(parts, what)
        if is_cache(first):
            return self._caches.joined(parts)
        if isinstance(first, (list, tuple)):
            if len({len(part) for part in parts}) > 1:
                raise NotRowsError(f"{what} has another length for each adapter")
            columns = zip(*parts, strict=True)
            return _like(first, [self._joined(what, column) for column in columns])
        if isinstance(first, MutableMapping):
            if any(part.keys() != first.keys() for part in parts[1:]):
                raise NotRowsError(f"{what} has other keys for each adapter")
            items = {key: self._joined(str(key), [p[key] for p in parts]) for key in first}
            return _with_items(first, items)
        if _is_dataclass(first):
            items = {key: self._joined(key, [vars(p)[key] for p in parts]) for key in vars(first)}
            return _with_fields(first, items)
        if is_shared(first):
            return joined_shared(parts, what)
        raise NotRowsError(f"{what} is a {type(first).__name__}")


def _like(value: Any, items: list[Any]) -> Any:
    """A list, tuple or named tuple of the kind of `value`."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _with_fields(value: Any, items: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with these attributes."""
    new = copy.copy(value)
    for key, item in items.items():
        object.__setattr__(new, key, item)
    return new


def _with_items(value: Any, items: Mapping[Any, Any]) -> Any:
    """A copy of a mapping with these items: of a dict, or a model's output."""
    new = copy.copy(value)
    for key, item in items.items():
        new[key] = item
    return new
