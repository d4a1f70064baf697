"""Random numbers as functions of (row, column, seed): Philox4x32-10 (Salmon et al., SC'11).

A dropout mask that is regenerated is never stored; every backend draws the same one, and the same
Gaussian sketch for an SVD.
"""

from __future__ import annotations

import math

import torch

_LOW = 0xFFFFFFFF

# The second word of the counter: what is drawn with one seed for different ends is independent.
_DROPOUT = 0
_GAUSSIAN = 1


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 x 32 bit product held in int64, whose wrap-around is harmless."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox_words(rows: int, cols: int, seed: torch.Tensor, purpose: int = _DROPOUT) -> torch.Tensor:
    """[rows, cols] int64 of uniform 32-bit words; counter = (col // 4, purpose, row, row >> 32)."""
    device = seed.device
    quads = torch.arange((cols + 3) // 4, device=device)
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


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """The rows x [M, K], each element dropped with probability p, the rest times 1 / (1 − p)."""
    threshold = min(int(p * 2**32), 2**32 - 1)
    keep = philox_words(*x.shape, seed) >= threshold
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    work = x if x.dtype == torch.float64 else x.float()
    factor = torch.tensor(scale, dtype=torch.float32, device=x.device).to(work.dtype)
    return torch.where(keep, work * factor, 0.0).to(x.dtype)


def gaussian(rows: int, cols: int, seed: int) -> torch.Tensor:
    """[rows, cols] float32 of standard normals, by Box and Muller (1958) in float64.

    Words w0, w1 of a quad give r cos θ and r sin θ of its first two columns, r² = −2 ln u,
    u = (w0 + 1) / 2³² in (0, 1], θ = 2π w1 / 2³²; its last two come from w2, w3. `seed`: any int64.
    """
    words = philox_words(rows, (cols + 3) // 4 * 4, torch.tensor(seed), _GAUSSIAN).double()
    radius = (-2.0 * ((words[:, ::2] + 1.0) * 2.0**-32).log()).sqrt()
    angle = words[:, 1::2] * (2.0 * math.pi * 2.0**-32)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.flatten(1)[:, :cols].float()


def dropout_seed(device: torch.device) -> torch.Tensor:
    """The seed of one call's dropout mask, int64 [] on `device`.

    From torch's global generator, so that `manual_seed` and activation checkpointing govern it.
    """
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
