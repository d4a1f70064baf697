"""What is measured: sizes and rounds of the full run and of the quick one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.common.shapes import Shape


@dataclass(frozen=True)
class Plan:
    """Shapes are [out, in]; `model` lists them with how many projections have each."""

    name: str = "full"
    copy_bytes: int = 2**30
    gemm: int = 8192
    operator_shapes: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (14336, 4096))
    operator_ranks: tuple[int, ...] = (16, 128)
    list_length: int = 8  # weights that one call of frobenius_stats is given
    # Llama-2-7B, 32 layers: q, k, v, o; gate, up; down.
    model: tuple[tuple[Shape, int], ...] = (
        ((4096, 4096), 128),
        ((11008, 4096), 64),
        ((4096, 11008), 32),
    )
    init_ranks: tuple[int, ...] = (16, 128)
    svd_shapes: int = 3  # how many of the model's shapes are decomposed exactly
    # (r, dropout) of the targets, all at this shape and number of tokens.
    layer_shape: Shape = (4096, 4096)
    layer_tokens: int = 8192
    layer_cases: tuple[tuple[int, float], ...] = ((16, 0.0), (128, 0.0), (16, 0.1))
    grid_shapes: tuple[Shape, ...] = ((4096, 4096), (14336, 4096), (4096, 14336))
    grid_tokens: tuple[int, ...] = (1, 16, 64, 512, 2048, 8192, 16384)
    grid_ranks: tuple[int, ...] = (8, 16, 64, 128)
    decode_tokens: tuple[int, ...] = (1, 16, 64)
    decode_rank: int = 16
    decode_layers: int = 8  # with a weight each, more bytes than any L2 holds
    rounds: int = 15
    grid_rounds: int = 5
    burst_ms: float = 5.0  # how long the calls between two events take together, about
    grid_burst_ms: float = 1.5

    @property
    def projections(self) -> int:
        """Of the whole model."""
        return sum(count for _, count in self.model)


FULL = Plan()
# A smoke test: the same targets, fewer rounds, a corner of the grid, one exact SVD.
QUICK = replace(
    FULL,
    name="quick",
    rounds=5,
    grid_rounds=3,
    grid_tokens=(1, 512, 8192),
    grid_ranks=(16,),
    svd_shapes=1,
)
