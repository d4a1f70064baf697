"""transformers' key-value caches: split into the groups of a batch's rows, and written back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import NotRowsError, Rows, is_shared, joined_shared

_MODULE = "transformers.cache_utils"
_COUNT = "batch_size"  # the attribute of a static layer that counts the rows


def is_cache(value: object) -> bool:
    """Whether this is a cache of transformers, or a layer of one."""
    return any(cls.__module__ == _MODULE for cls in type(value).__mro__)


class Caches:
    """The caches of one call. Each group gets copies with its rows. When all groups have run, the
    contents of the copies are written into the caches. New caches of the groups are joined.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._originals: dict[int, Any] = {}  # by the id of the first group's copy
        self._parts: dict[int, list[Any]] = {}  # by the id of the original
        self._pending: list[Callable[[], object]] = []

    def parts(self, cache: Any) -> list[Any]:
        """Each group's copy of a cache.

        Raises:
            NotRowsError: the first dimension of one of its tensors is not that of the rows, as in
                quantized caches.

        """
        if id(cache) not in self._parts:
            copies = [copy.copy(cache) for _ in self._rows.groups]
            for key, value in vars(cache).items():
                for own, part in zip(copies, self._values(key, value), strict=True):
                    vars(own)[key] = part
            self._remember(cache, copies)
        return self._parts[id(cache)]

    def _remember(self, original: Any, parts: list[Any]) -> None:
        self._originals[id(parts[0])] = original
        self._parts[id(original)] = parts

    def _values(self, key: str, value: Any) -> list[Any]:
        if isinstance(value, Tensor):
            return self._tensors(key, value)
        if isinstance(value, (list, tuple)):
            columns = [self._values(key, item) for item in value]
            return [type(value)(c[g] for c in columns) for g in range(len(self._rows.groups))]
        if isinstance(value, dict):
            own = {k: self._values(key, item) for k, item in value.items()}
            return [{k: v[g] for k, v in own.items()} for g in range(len(self._rows.groups))]
        if is_cache(value):
            return self.parts(value)
        if key == _COUNT:
            return list(self._rows.counts)
        if is_shared(value):
            return [value] * len(self._rows.groups)
        raise NotRowsError(f"a cache has {key}, a {type(value).__name__}")

    def _tensors(self, key: str, value: Tensor) -> list[Tensor]:
        size = self._rows.size
        if type(value) is Tensor and value.dim() and len(value) == size:
            parts = self._rows.of(value)
        elif type(value) is Tensor and (value.dim() == 0 or value.numel() == 0):
            parts = [value.clone() for _ in self._rows.groups]
        else:
            raise NotRowsError(f"a cache has {key}, a {type(value).__name__} {list(value.shape)}")
        self._remember(value, parts)
        return parts

    def finish(self) -> None:
        """Joins the groups' copies and writes them back, but only if all of them can be joined."""
        for original in [self._originals[id(parts[0])] for parts in self._parts.values()]:
            if is_cache(original):
                self.joined(self._parts[id(original)])
        for write in self._pending:
            write()
        self._pending.clear()

    def joined(self, parts: Sequence[Any], key: str = "a cache") -> Any:
        """The cache, or the entry `key` of one, for these parts of the groups, which are copies of
        it or new.
        """
        first = parts[0]
        if isinstance(first, Tensor):
            return self._joined_tensor(parts, key)
        if is_cache(first):
            return self._joined_cache(parts)
        if isinstance(first, (list, tuple)):
            columns = zip(*parts, strict=True)
            return type(first)(self.joined(column, key) for column in columns)
        if isinstance(first, dict):
            return {k: self.joined([part[k] for part in parts], key) for k in first}
        return self._rows.size if key == _COUNT else joined_shared(parts, key)

    def _joined_cache(self, parts: Sequence[Any]) -> Any:
        first = parts[0]
        original = self._originals.get(id(first))
        if original is None:
            original = copy.copy(first)
            self._remember(original, list(parts))
        values = {key: self.joined([vars(p)[key] for p in parts], key) for key in vars(first)}
        self._pending.append(lambda: _update(original, values))
        return original

    def _joined_tensor(self, parts: Sequence[Tensor], key: str) -> Tensor:
        original = self._originals.get(id(parts[0]))
        if original is None:
            return self._rows.join(parts, key)
        if original.is_inference() and not torch.is_inference_mode_enabled():
            return parts[0] if original.dim() == 0 else self._rows.join(parts, key)
        if any(part.is_inference() or part._version for part in parts):  # written in place
            self._pending.append(lambda: self._rows.write(original, parts))
        return original


def _update(cache: Any, values: dict[str, Any]) -> None:
    """Sets these attributes of a cache; its lists and dicts stay the same objects."""
    for key, value in values.items():
        old = vars(cache).get(key)
        if isinstance(old, list) and isinstance(value, list):
            old[:] = value
        elif isinstance(old, dict) and isinstance(value, dict):
            old.clear()
            old.update(value)
        else:
            vars(cache)[key] = value
