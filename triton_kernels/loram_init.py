"""`lora::_loram_init_` on a GPU: any number of weights in about six launches.

Each weight is read twice and written once, and β stays on the device. The host waits once, for the
copy of the sums of squares, which it checks before any weight is written. The work launched after
that copy keeps the device busy meanwhile. Without the check, a CUDA graph can contain it all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .dst_basis import fill_factors
from .jobs import float_bits, integers, known, upload
from .subtract_dst import Subtraction

BLOCK = 256


@triton.jit(do_not_specialize=["rank", "count"])
def scales_kernel(stats, gains, scaling, beta, coefficients, rank, count, BLOCK: tl.constexpr):
    """Write β = (‖W‖ √(Q / rank))^½ and scaling · β² for each weight, from ‖W‖² in column 1 of
    `stats` [count, 2] and Q in column 0 of `gains` [count, 2]; its column 1 has the mask of β's
    bits.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < count
    sum_of_squares = tl.load(stats + 2 * k + 1, mask=mask, other=1.0)
    gain = tl.load(gains + 2 * k, mask=mask, other=0).to(tl.float64, bitcast=True)
    kept = tl.load(gains + 2 * k + 1, mask=mask, other=-1)
    root = tl.sqrt(tl.sqrt(sum_of_squares * gain / rank.to(tl.float64)))
    bits = root.to(tl.int64, bitcast=True)
    root = ((bits + ((0 - kept) >> 1)) & kept).to(tl.float64, bitcast=True)
    tl.store(beta + k, root, mask=mask)
    tl.store(coefficients + k, tl.load(scaling) * (root * root), mask=mask)


def loram_init_(
    weights: list[torch.Tensor],
    lora_A: list[torch.Tensor],
    lora_B: list[torch.Tensor],
    beta: torch.Tensor,
    stats: torch.Tensor,
    rank: int,
    scaling: float,
    gain: Callable[[tuple[int, int]], float],
    limit: Callable[[torch.dtype, tuple[int, int]], float],
    refuse: Callable[[list[float]], None] | None,
) -> None:
    """Write A₀ = βΦᵀ, B₀ = βΦ and β, and subtract scaling · B₀A₀ from each weight.

    `stats` are the weights' `frobenius_stats`, `gain(shape)` is Q in β² = ‖W‖ √(Q / rank). If a sum
    of squares is not in (0, limit(dtype, shape)], `refuse` is called with all sums and may raise.
    """
    device, count = beta.device, len(weights)
    if refuse is not None:
        sums = _Awaited(stats)
    tensors = known(weights)
    gains = tensors.rows(lambda kind: (float_bits(gain(kind.shape)), kept_bits(kind.dtype)))
    gains, factor = upload(device, gains, integers([float_bits(scaling)]))
    coefficients = torch.empty_like(beta)
    scales_kernel[(-(-count // BLOCK),)](
        stats,
        gains,
        factor.view(torch.float64),
        beta,
        coefficients,
        rank,
        count,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    subtraction = Subtraction(weights, rank, tensors)
    # One call per dtype of the factors.
    dtypes = [factor.dtype for factor in lora_A]
    for dtype in dict.fromkeys(dtypes):
        if dtypes.count(dtype) == count:
            fill_factors(lora_A, lora_B, beta)
            continue
        members = [k for k in range(count) if dtypes[k] == dtype]
        scales = torch.stack([beta[k] for k in members])
        fill_factors([lora_A[k] for k in members], [lora_B[k] for k in members], scales)
    if refuse is not None:  # as late as possible, while the device does the work above
        limits = [limit(kind.dtype, kind.shape) for kind in tensors.kinds]
        limits = torch.tensor(limits, dtype=torch.float64, device="cpu")[tensors.which]
        sums = sums.get()[:, 1]
        if not ((sums > 0) & (sums <= limits)).all():
            refuse(sums.tolist())
    subtraction.run(coefficients)


def kept_bits(dtype: torch.dtype) -> int:
    """The mask of the bits of β that are kept: 41 significant ones, or all for float64 weights, as
    `shortened` in lora_kernels/ops/loram_init.py says.
    """
    return -1 if dtype == torch.float64 else -(1 << 12)


class _Awaited:
    """An asynchronous copy of a tensor to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy, self._event = tensor, None
        if tensor.device.type == "cuda":
            options = {"dtype": tensor.dtype, "device": "cpu", "pin_memory": True}
            self._copy = torch.empty(tensor.shape, **options).copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> torch.Tensor:
        """Wait for the copy, but not for work launched after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
