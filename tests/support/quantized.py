"""Quantized layers for tests, and their weights by the quantizers' own definitions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .oracle import to_numpy

# Dettmers et al., QLoRA, arXiv 2305.14314, appendix E.
NF4 = np.array(
    [
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
    ]
)
# Codes of one sign bit, two of exponent, one of mantissa, in bitsandbytes' order; the largest is 1.
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
FP4 = np.concatenate([FP4, -FP4])


class OnlyForward(nn.Module):
    """Like GPTQ's and AWQ's layers: only sizes and a forward, over int8 codes and float scales."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scales = weight.abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8).T.contiguous())
        self.register_buffer("scales", scales.to(dtype).T.contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.scales.dtype:
            raise RuntimeError(f"expected {self.scales.dtype}, got {x.dtype}")
        y = x @ (self.qweight.to(x.dtype) * self.scales)
        return y if self.bias is None else y + self.bias

    def oracle(self) -> np.ndarray:
        """W [out, in] in float64."""
        return (to_numpy(self.qweight) * to_numpy(self.scales)).T


class ForInference(OnlyForward):
    """Like `OnlyForward`, but its forward has no backward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def linear_4bit(linear: nn.Linear, *, quant_type: str = "nf4", nested: bool = False) -> nn.Module:
    """bitsandbytes' layer with the weight and bias of `linear`, frozen, in training mode."""
    import bitsandbytes as bnb

    options = {"quant_type": quant_type, "compress_statistics": nested}
    options |= {"bias": linear.bias is not None, "compute_dtype": linear.weight.dtype}
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **options)
    layer.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False)


def linear_8bit(linear: nn.Linear, threshold: float = 0.0) -> nn.Module:
    """bitsandbytes' layer with the weight and bias of `linear`, frozen."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
    )
    layer.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False)


def quantize_4bit(W: np.ndarray, quant_type: str = "nf4", blocksize: int = 64) -> np.ndarray:
    """Divides every entry by its block's largest and takes the nearest code, in float64: QLoRA,
    section 2.

    A block consists of consecutive entries and may extend over several rows.
    """
    codes = NF4 if quant_type == "nf4" else FP4
    flat = W.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % blocksize)).reshape(-1, blocksize)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = blocks / np.where(largest == 0, 1, largest)
    nearest = np.abs(scaled[..., None] - codes).argmin(axis=-1)
    return (codes[nearest] * largest).reshape(-1)[: len(flat)].reshape(W.shape)
