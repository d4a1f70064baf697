"""The dropout mask as a function of (row, column, seed): Philox4x32-10 (Salmon et al., SC'11).

A mask that is regenerated is never stored; every backend draws the same one.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 x 32 bit product held in int64, whose wrap-around is harmless."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox_words(rows: int, cols: int, seed: torch.Tensor) -> torch.Tensor:
    """[rows, cols] int64 of uniform 32-bit words; counter = (col // 4, 0, row, row >> 32)."""
    device = seed.device
    quads = torch.arange((cols + 3) // 4, device=device)
    row = torch.arange(rows, device=device)[:, None]
    c0, c2 = torch.broadcast_tensors(quads & _LOW, row & _LOW)
    c1, c3 = torch.zeros_like(c0), (row >> 32).expand_as(c0)
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
