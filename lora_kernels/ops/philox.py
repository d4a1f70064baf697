"""Random numbers as functions of (row, column, seed): Philox4x32-10 (Salmon et al., SC'11).

A dropout mask is recomputed from its seed instead of being stored. Every backend computes the same
mask, and the same Gaussian sketch for an SVD.
"""

from __future__ import annotations

import math

import torch

_LOW = 0xFFFFFFFF

# The second word of the counter: for one seed, each purpose gets independent numbers.
_DROPOUT = 0
_GAUSSIAN = 1


def dropout_seed(device: torch.device) -> torch.Tensor:
    """A seed for `dropout` (0-dim int64), drawn from torch's global generator of `device`, so that
    `torch.manual_seed` determines it and activation checkpointing repeats it.
    """
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 × 32-bit product. As int64 it may be negative; its bits are
    right.
    """
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox_words(
    rows: int, cols: int, seed: torch.Tensor, purpose: int = _DROPOUT, col_offset: int = 0
) -> torch.Tensor:
    """[rows, cols] int64 of uniform 32-bit words; counter = (col // 4, purpose, row, row >> 32),
    where the columns begin at `col_offset`, a multiple of 4.
    """
    device = seed.device
    quads = torch.arange((cols + 3) // 4, device=device) + col_offset // 4
    row = torch.arange(rows, device=device)[:, None]
    c0, c2 = torch.broadcast_tensors(quads & _LOW, row & _LOW)
    c1, c3 = torch.full_like(c0, purpose), (row >> 32).expand_as(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :cols]


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor, col_offset: int = 0) -> torch.Tensor:
    """The rows x [M, K]: each element is zeroed with probability p, the others are divided by 1 −
    p. If x is a part of wider rows, its first column is their column `col_offset`, a multiple of 4,
    and the mask equals that of the whole rows.
    """
    threshold = min(int(p * 2**32), 2**32 - 1)
    rows, cols = x.shape
    keep = philox_words(rows, cols, seed, col_offset=col_offset) >= threshold  # [M, K]
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    work = x if x.dtype == torch.float64 else x.float()
    factor = torch.tensor(scale, dtype=torch.float32, device=x.device).to(work.dtype)
    return torch.where(keep, work * factor, 0.0).to(x.dtype)


def gaussian(rows: int, cols: int, seed: int) -> torch.Tensor:
    """[rows, cols] float32 of standard normals, by Box and Muller (1958) in float64.

    Words w0 and w1 of each quad of columns give r cos θ and r sin θ for its first two columns, with
    r² = −2 ln u, u = (w0 + 1) / 2³² in (0, 1] and θ = 2π w1 / 2³². The last two come from w2 and
    w3. `seed` is any int64.
    """
    words = philox_words(rows, (cols + 3) // 4 * 4, torch.tensor(seed), _GAUSSIAN).double()
    radius = (-2.0 * ((words[:, ::2] + 1.0) * 2.0**-32).log()).sqrt()
    angle = words[:, 1::2] * (2.0 * math.pi * 2.0**-32)
    # [rows, pairs, 2]
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.flatten(1)[:, :cols].float()
