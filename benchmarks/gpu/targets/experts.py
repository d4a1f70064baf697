"""The sizes of experts that are measured and predicted."""

from __future__ import annotations

from dataclasses import dataclass

BF16 = 2
FEW_ROWS = 64  # of an expert, up to which a tile has as many, as in triton_kernels/grouped/gemm.py


@dataclass(frozen=True)
class Projection:
    """One parameter [experts, n, k] and a product of `size` rows, gathered from `tokens` if any."""

    experts: int
    n: int
    k: int
    size: int
    tokens: int = 0

    @property
    def tile(self) -> int:
        """The rows of a tile of the GEMM."""
        return 64 if self.size <= FEW_ROWS * self.experts else 128

    @property
    def padded(self) -> float:
        """The rows that tensor cores compute, including half-empty tiles."""
        return self.size + self.experts * self.tile / 2

    @property
    def weight(self) -> int:
        """The bytes of W."""
        return BF16 * self.experts * self.n * self.k

    def matrix(self, columns: int) -> int:
        """The bytes of [size, columns]."""
        return BF16 * self.size * columns


@dataclass(frozen=True)
class Layer:
    """The experts of one layer: [E, 2 I, H] and [E, H, I]."""

    experts: int
    top_k: int
    tokens: int
    hidden: int
    inner: int
    r: int

    @property
    def projections(self) -> tuple[Projection, Projection]:
        size = self.tokens * self.top_k
        up = Projection(self.experts, 2 * self.inner, self.hidden, size, self.tokens)
        return up, Projection(self.experts, self.hidden, self.inner, size)


# The experts of Qwen3-30B-A3B.
QWEN3 = Layer(128, 8, 8192, 2048, 768, 16)
# PEFT's measurement in its pull request 3577, with 4096 "tokens": 2.56 ms and 1.30 GB on an H100.
# W, W + B A and its gradient are 1.21 GB of that, so a token is one row of the product.
PEFT_CASE = Projection(128, 2048, 768, 4096)
