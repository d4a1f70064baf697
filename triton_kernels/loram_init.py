"""`lora::_loram_init_` on a GPU: any number of weights in about a dozen launches.

Two reads and one write of each weight; β never leaves the device. The one wait is for the sums of
squares that `check` looks at, before anything is written; without it a CUDA graph can hold it all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .dst_basis import dst_fill
from .frobenius_stats import frobenius_stats
from .jobs import float_bits, upload
from .subtract_dst import Subtraction


def loram_init_(
    weights: list[torch.Tensor],
    lora_A: list[torch.Tensor],
    lora_B: list[torch.Tensor],
    beta: torch.Tensor,
    rank: int,
    scaling: float,
    gains: list[float],
    check: Callable[[list[float]], None] | None,
) -> None:
    """Writes A₀ = βΦᵀ, B₀ = βΦ and β, and subtracts scaling · B₀A₀ from each weight.

    `gains` are the Q of β² = ‖W‖ √(Q / rank); `check` gets the sums of squares and may raise.
    """
    sums_of_squares = frobenius_stats(weights)[:, 1]
    (gain,) = upload(beta.device, [[float_bits(value) for value in gains]])
    squared = (sums_of_squares * gain.view(torch.float64)).div_(rank).sqrt_()
    root = squared.sqrt()
    beta.copy_(root)
    # One call a dtype: the factors' follow the weights'.
    for dtype in dict.fromkeys(factor.dtype for factor in lora_A):
        members = [k for k, factor in enumerate(lora_A) if factor.dtype == dtype]
        scales = root if len(members) == len(weights) else torch.stack([root[k] for k in members])
        for factors, axis, transposed in ((lora_A, 1, True), (lora_B, 0, False)):
            outs = [factors[k] for k in members]
            dst_fill(outs, transposed, [weights[k].shape[axis] for k in members], scales)
    subtraction = Subtraction(weights, rank)
    squared.mul_(scaling)
    if check is not None:  # last, while the device has all of this to do
        check(sums_of_squares.tolist())
    subtraction.run(squared)
