"""The sizes and the numbers of rounds of the full run and the quick run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.common.shapes import Shape
from benchmarks.gpu.targets.experts import PEFT_CASE, QWEN3, Layer, Projection


@dataclass(frozen=True)
class Plan:
    """Shapes are [out, in]; `model` lists each shape with its number of projections."""

    name: str = "full"
    copy_bytes: int = 2**30
    gemm: int = 8192
    operator_shapes: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (14336, 4096))
    operator_ranks: tuple[int, ...] = (16, 128)
    list_length: int = 8  # weights in one call of frobenius_stats
    # Llama-2-7B, 32 layers: q, k, v, o; gate, up; down.
    model: tuple[tuple[Shape, int], ...] = (
        ((4096, 4096), 128),
        ((11008, 4096), 64),
        ((4096, 11008), 32),
    )
    init_ranks: tuple[int, ...] = (16, 128)
    svd_shapes: int = 3  # number of the model's shapes with an exact SVD
    # (r, dropout) of the targets, all at this shape and number of tokens.
    layer_shape: Shape = (4096, 4096)
    layer_tokens: int = 8192
    layer_cases: tuple[tuple[int, float], ...] = ((16, 0.0), (128, 0.0), (16, 0.1))
    grid_shapes: tuple[Shape, ...] = ((4096, 4096), (14336, 4096), (4096, 14336))
    grid_tokens: tuple[int, ...] = (1, 16, 64, 512, 2048, 8192, 16384)
    grid_ranks: tuple[int, ...] = (8, 16, 64, 128)
    decode_tokens: tuple[int, ...] = (1, 16, 64)
    decode_rank: int = 16
    experts_layer: Layer = QWEN3
    experts_stack: Projection = PEFT_CASE
    experts_rank: int = 16
    decode_layers: int = 8  # together, their weights exceed any L2 cache
    sharded_shape: Shape = (11008, 4096)  # of W₁; W₂ has the other order
    sharded_blocks: int = 8
    sharded_tokens: int = 4096
    sharded_rank: int = 16
    rounds: int = 15
    grid_rounds: int = 5
    burst_ms: float = 5.0  # approximate time of all calls between two events
    grid_burst_ms: float = 1.5

    @property
    def projections(self) -> int:
        """The number of projections in the model."""
        return sum(count for _, count in self.model)


FULL = Plan()
# A quick check: the same targets, fewer rounds, a small part of the grid, one exact SVD.
QUICK = replace(
    FULL,
    name="quick",
    rounds=5,
    grid_rounds=3,
    grid_tokens=(1, 512, 8192),
    grid_ranks=(16,),
    svd_shapes=1,
)
