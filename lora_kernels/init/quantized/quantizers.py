"""Quantizers by name: each returns a weight quantized and dequantized again.

The values equal those of bitsandbytes bit for bit; bitsandbytes itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._utils.errors import unknown_name

Quantizer = Callable[[Tensor], Tensor]

BLOCK_SIZE = 64
# Dettmers et al., QLoRA, arXiv 2305.14314, appendix E.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A sign, two bits of exponent and one of mantissa, divided by the largest value.
_FP4 = tuple(sign * code / 12 for sign in (1, -1) for code in (0, 0.0625, 8, 12, 4, 6, 2, 3))
_SMALLEST = 1e-38  # bitsandbytes' smallest divisor


@torch.no_grad()
def quantized(weight: Tensor, quantizer: str | Quantizer = "nf4") -> Tensor:
    """`weight` [out, in], quantized and dequantized. The named quantizers return float32.

    - "nf4", "fp4": bitsandbytes' 4-bit types, in blocks of 64 consecutive entries. A block's scale
      is its largest magnitude, and is not quantized itself.
    - "int8": bitsandbytes' 8-bit type (LLM.int8), round(127 w / c) · c / 127 where c is the row's
      largest magnitude; w is first rounded to float16.
    - A function of the weight that returns such values.

    Raises:
        ValueError: an unknown name, or a function that returns another shape, NaN or Inf.
        TypeError: neither a name nor a function, or a function that does not return a float tensor.

    """
    check_quantizer(quantizer)
    function = QUANTIZERS[quantizer.lower()] if isinstance(quantizer, str) else quantizer
    values = function(weight.detach())
    if not isinstance(values, Tensor) or not values.is_floating_point():
        what = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"the quantizer must return a float tensor, dequantized; got {what}")
    if values.shape != weight.shape:
        raise ValueError(
            f"the quantizer returned shape {list(values.shape)} for a weight {list(weight.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError("the quantizer returned NaN or Inf")
    return values


def check_quantizer(quantizer: str | Quantizer) -> None:
    """Raise unless it is a known name or a function."""
    if callable(quantizer):
        return
    if not isinstance(quantizer, str):
        raise TypeError(
            "quantizer must be a name or a function W -> quantized and dequantized W, got "
            f"{type(quantizer).__name__}"
        )
    if quantizer.lower() not in QUANTIZERS:
        raise unknown_name("quantizer", quantizer, tuple(QUANTIZERS))


def _four_bits(codes: tuple[float, ...]) -> Quantizer:
    def quantizer(weight: Tensor) -> Tensor:
        flat = weight.float().reshape(-1)
        whole = len(flat) - len(flat) % BLOCK_SIZE
        table = torch.tensor(sorted(codes), device=weight.device)
        bounds = (table[:-1] + table[1:]) / 2
        blocks = flat[:whole].view(-1, BLOCK_SIZE)  # [block, 64]
        scale = blocks.abs().amax(dim=1, keepdim=True)  # [block, 1]
        # bitsandbytes multiplies by the inverse here and divides below: the bits depend on it.
        scaled = (blocks * (1.0 / scale.clamp(min=_SMALLEST))).clamp_(-1, 1)
        values = table[torch.bucketize(scaled, bounds, out_int32=True)].mul_(scale).view(-1)
        rest = flat[whole:]
        if len(rest):
            scale = rest.abs().max().clamp(min=_SMALLEST)
            scaled = (rest / scale).clamp_(-1, 1)
            values = torch.cat([values, table[torch.bucketize(scaled, bounds)] * scale])
        return values.view(weight.shape)

    return quantizer


def _eight_bits(weight: Tensor) -> Tensor:
    rows = weight.half().float()
    scale = rows.abs().amax(dim=1, keepdim=True)  # [out, 1]
    codes = (rows * (127.0 / scale.clamp(min=_SMALLEST))).round_()
    return codes.mul_(scale).mul_(7.874015718698502e-3)  # bitsandbytes' 1 / 127


QUANTIZERS: dict[str, Quantizer] = {
    "nf4": _four_bits(_NF4),
    "fp4": _four_bits(_FP4),
    "int8": _eight_bits,
}
