"""The calls of operators that are measured and predicted, with the bytes that each must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.common.harness import dtype_name
from benchmarks.common.shapes import Shape, shape_name
from benchmarks.gpu.targets.plan import Plan


@dataclass(frozen=True)
class OperatorCase:
    """One call of one operator; `bytes` counts those that it must read and write."""

    operator: str
    shape: Shape
    dtype: torch.dtype
    bytes: int
    rank: int = 0
    weights: int = 1

    @property
    def footprint(self) -> int:
        """The bytes that a call uses; the next call must not find them in the L2 cache."""
        return self.bytes // 2 if self.operator == "subtract_dst_" else self.bytes

    @property
    def name(self) -> str:
        """The target's name."""
        parts = [self.operator, shape_name(self.shape), dtype_name(self.dtype)]
        if self.operator in ("subtract_dst_", "row_norms"):
            parts.append(f"r = {self.rank}")
        if self.weights > 1:
            parts.append(f"{self.weights} weights in one call")
        return ", ".join(parts)


def operator_cases(plan: Plan) -> Iterator[OperatorCase]:
    """`dst_basis` writes, `frobenius_stats` and `row_norms` read, `subtract_dst_` does both."""
    for shape in plan.operator_shapes:
        for dtype in (torch.float32, torch.bfloat16):
            rank = min(shape)
            size = max(shape) * rank * dtype.itemsize
            yield OperatorCase("dst_basis", shape, dtype, size, rank)
    dtype = torch.bfloat16
    for shape in plan.operator_shapes:
        size = shape[0] * shape[1] * dtype.itemsize
        yield OperatorCase("frobenius_stats", shape, dtype, size)
        many = plan.list_length
        yield OperatorCase("frobenius_stats", shape, dtype, many * size, weights=many)
        yield OperatorCase("row_norms", shape, dtype, size, plan.operator_ranks[0])
    for shape in plan.operator_shapes:
        size = shape[0] * shape[1] * dtype.itemsize
        for rank in plan.operator_ranks:
            yield OperatorCase("subtract_dst_", shape, dtype, 2 * size, rank)
