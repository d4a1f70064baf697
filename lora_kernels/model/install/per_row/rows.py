"""`Rows`: the rows of a batch in groups; tensors are split into groups and joined again."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Types of values that are the same for every group; functions and classes are the same too.
_SHARED = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.Generator, torch.Stream),
)


class NotRowsError(ValueError):
    """It is not known which parts of a call's value belong to which rows."""


class WrongCountError(NotRowsError):
    """A call has more or fewer rows than there are names."""


class Rows:
    """The rows 0 to `size` − 1 of a batch in groups, each a list of rows in ascending order."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self.groups = groups
        self.counts = [len(rows) for rows in groups]
        self.size = sum(self.counts)
        order = [row for rows in groups for row in rows]
        self._is_sorted = order == sorted(order)
        self._order = torch.tensor(order)
        self._indices: dict[torch.device, tuple[list[Tensor], Tensor]] = {}

    def of(self, tensor: Tensor) -> list[Tensor]:
        """Each group's rows of a tensor [size, ...]: copies, aligned as any new tensor is and with
        the tensor's memory layout, because the bits of a product may depend on both.
        """
        indices = self._on(tensor.device)[0]
        return [_laid_out(tensor.index_select(0, index), tensor) for index in indices]

    def join(self, parts: Sequence[Tensor], what: str) -> Tensor:
        """The tensor [k · size, ...] of the groups' [k · count, ...], with k entries for each row;
        or, if all groups have the same tensor, that tensor.

        Raises:
            NotRowsError: the tensors cannot be joined; the error says `what` they are.

        """
        per_row = self._per_row(parts)
        if per_row:
            joined = torch.cat(list(parts))
            if not self._is_sorted:
                shape = joined.shape
                joined = joined.reshape(self.size, per_row, *shape[1:])
                joined = joined.index_select(0, self._on(joined.device)[1]).view(shape)
            return _laid_out(joined, max(parts, key=len))
        if all(p.shape == parts[0].shape and torch.equal(p, parts[0]) for p in parts[1:]):
            return parts[0]
        shapes = ", ".join(dict.fromkeys(str(list(part.shape)) for part in parts))
        raise NotRowsError(f"{what} has no part for each row: {shapes} for {self.counts} rows")

    def write(self, target: Tensor, parts: Sequence[Tensor]) -> None:
        """Writes the groups' tensors into `target` [size, ...], or one of them into a number."""
        if target.dim() == 0 or target.numel() == 0:
            target.copy_(parts[0])
            return
        for index, part in zip(self._on(target.device)[0], parts, strict=True):
            target.index_copy_(0, index, part)

    def _per_row(self, parts: Sequence[Tensor]) -> int:
        """How many indices of dimension 0 each row has; 0 if dimension 0 has no rows."""
        first = parts[0]
        if any(p.dim() == 0 or p.shape[1:] != first.shape[1:] for p in parts):
            return 0
        per_row = len(first) // self.counts[0]
        fits = all(len(p) == per_row * n for p, n in zip(parts, self.counts, strict=True))
        return per_row if fits else 0

    def _on(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Each group's rows, and the position of each row in the concatenated groups."""
        if device not in self._indices:
            order = self._order.to(device)
            self._indices[device] = list(order.split(self.counts)), order.argsort()
        return self._indices[device]


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, with its dimensions in the same order in memory as those of `like`."""
    if like.is_contiguous():
        return tensor
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    back = [order.index(dim) for dim in range(like.dim())]
    return tensor.permute(order).contiguous().permute(back)


def is_shared(value: object) -> bool:
    """Whether a value holds no rows: a number, a name, a setting, a function."""
    return isinstance(value, _SHARED) or callable(value)


def joined_shared(parts: Sequence[Any], what: str) -> Any:
    """The value that all groups have; raises NotRowsError if they differ."""
    if any(part is not parts[0] and part != parts[0] for part in parts[1:]):
        raise NotRowsError(f"{what} differs between the adapters: {', '.join(map(repr, parts))}")
    return parts[0]
