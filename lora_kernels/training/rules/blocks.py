"""`Block`: the factors and gradients of layers of one shape, stacked, so that one call serves all
of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pairs import FactorPair

_BYTES = 16 * 2**20  # of the stacked copies that exist at a time; a larger layer has its own block


@dataclass(frozen=True)
class Block:
    """Pairs whose A, B, dtypes and devices are alike.

    A stack of E experts counts as E matrices. N is the number of matrices. Tensors that the methods
    return are float64 for float64 factors, else float32.
    """

    pairs: Sequence[FactorPair]

    @property
    def count(self) -> int:
        """N."""
        return sum(pair.count for pair in self.pairs)

    @property
    def eps(self) -> float:
        """The rounding unit of the factors, at least that of float32."""
        return float(torch.finfo(_work_dtype(self.pairs[0])).eps)

    @property
    def device(self) -> torch.device:
        """The factors' device."""
        return self.pairs[0].lora_A.device

    def lora_A(self) -> Tensor:
        """A [N, r, in]."""
        return self._stacked([pair.lora_A.view(pair.shape_A) for pair in self.pairs])

    def lora_B(self) -> Tensor:
        """B [N, out, r]."""
        return self._stacked([pair.lora_B.view(pair.shape_B) for pair in self.pairs])

    def grad_A(self) -> Tensor:
        """The gradients of A [N, r, in]."""
        return self._stacked([pair.grad_A.reshape(pair.shape_A) for pair in self.pairs])

    def grad_B(self) -> Tensor:
        """The gradients of B [N, out, r]."""
        return self._stacked([pair.grad_B.reshape(pair.shape_B) for pair in self.pairs])

    def inverse_squared_scaling(self) -> Tensor:
        """s⁻², float64 [N, 1, 1]."""
        values = [pair.scaling**-2 for pair in self.pairs for _ in range(pair.count)]
        return torch.tensor(values, dtype=torch.float64, device=self.device)[:, None, None]

    def matching(self, matrices: Tensor) -> Tensor:
        """Float64 `matrices` in the dtype of the factors and gradients that the methods return."""
        return matrices.to(_work_dtype(self.pairs[0]))

    def write_grad_A_(self, new: Tensor) -> None:
        """Overwrites the gradients of A with `new` [N, r, in], in place."""
        self._write_([pair.grad_A for pair in self.pairs], new)

    def write_grad_B_(self, new: Tensor) -> None:
        """Overwrites the gradients of B with `new` [N, out, r], in place."""
        self._write_([pair.grad_B for pair in self.pairs], new)

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach() for t in tensors]).to(_work_dtype(self.pairs[0]))

    def _write_(self, gradients: Sequence[Tensor], new: Tensor) -> None:
        parts = new.split([pair.count for pair in self.pairs])
        shaped = [part.view(g.shape) for g, part in zip(gradients, parts, strict=True)]
        torch._foreach_copy_(list(gradients), shaped)


def batches(pairs: Sequence[FactorPair]) -> Iterator[list[Block]]:
    """Pairs of one rank, dtype and device, in blocks of one shape; every pair is in one block."""
    by_rank: dict[object, dict[object, list[FactorPair]]] = {}
    for pair in pairs:
        rank = (pair.rank, pair.lora_A.dtype, pair.lora_B.dtype, pair.lora_A.device)
        shape = (pair.shape_A[-1], pair.shape_B[-2])
        by_rank.setdefault(rank, {}).setdefault(shape, []).append(pair)
    for shapes in by_rank.values():
        yield [block for alike in shapes.values() for block in _cut(alike)]


def _cut(pairs: Sequence[FactorPair]) -> Iterator[Block]:
    """Blocks whose factors and gradients have at most `_BYTES`, or of one larger pair."""
    taken: list[FactorPair] = []
    size = 0
    for pair in pairs:
        own = 2 * (pair.lora_A.numel() + pair.lora_B.numel()) * _work_dtype(pair).itemsize
        if taken and size + own > _BYTES:
            yield Block(taken)
            taken, size = [], 0
        taken.append(pair)
        size += own
    yield Block(taken)


def _work_dtype(pair: FactorPair) -> torch.dtype:
    """The widest of float32 and the factors' dtypes."""
    own = torch.promote_types(pair.lora_A.dtype, pair.lora_B.dtype)
    return torch.promote_types(own, torch.float32)
