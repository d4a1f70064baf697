"""Layers whose weight cannot be rewritten, quantized or known only through their forward: their W,
their dtype, and a forward that autograd goes through.

A quantizer's package is imported only for a layer of its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._utils.checks import FLOATS
from .._utils.extras import needed
from .kinds import ForeignLayer, kind_of

_ROW_BLOCK = 256  # rows of the identity that a layer is given at once
_NONLINEAR = 0.1  # relative; inputs rounded to 8 bits cause 0.01


@torch.no_grad()
def dequantized_weight(module: nn.Module) -> Tensor:
    """W [out, in] as the layer multiplies with it, a new matrix in float32. It is not rounded to
    the dtype that the layer computes in, unless only the layer's forward gives W.

    Raises:
        ValueError: the layer is not quantised yet, or does not take the inputs that it should.

    """
    return _WEIGHTS[kind_of(module) or "forward"](module)


def compute_dtype(module: ForeignLayer) -> torch.dtype:
    """The dtype that the layer computes in, as far as it tells: that of its weight, or its
    `compute_dtype`, or that of its bias or scales; float32 if nothing does.
    """
    kind = kind_of(module)
    if kind == "torchao":
        return module.weight.dtype
    declared = getattr(module, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    if kind == "bnb_4bit" and (state := _state_4bit(module)) is not None:
        return state.dtype
    own = [module.bias] if isinstance(getattr(module, "bias", None), Tensor) else []
    own += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return next((tensor.dtype for tensor in own if tensor.dtype in FLOATS), torch.float32)


def device_of(module: nn.Module) -> torch.device:
    """Where the layer's tensors are, and its inputs should be."""
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors:
        raise ValueError(f"{type(module).__name__} has no tensor that tells its device")
    return tensors[0].device


def passes_gradient(module: ForeignLayer) -> bool:
    """Whether autograd reaches the layer's input from its output.

    It does not through torchao's layers that quantize their input, nor through kernels that were
    written for inference. These are tried with a row of zeros; bitsandbytes' layers are known to.
    """
    if kind_of(module) not in ("torchao", "forward"):
        return True
    dtype, device = compute_dtype(module), device_of(module)
    x = torch.zeros(1, module.in_features, dtype=dtype, device=device, requires_grad=True)
    with torch.enable_grad():
        y = module.forward(x)
        if not y.requires_grad:
            return False
        try:
            (grad,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        except RuntimeError:  # an operator without a backward
            return False
    return grad is not None


def frozen_forward(module: nn.Module, x: Tensor, differentiable: bool = True) -> Tensor:
    """`module(x)`, with a gradient for x and a bias whatever the layer is.

    `differentiable` is what `passes_gradient` returned. If it is False the gradient is that of
    x Wᵀ with the dequantized W (straight through a quantization of x, as in bitsandbytes' 8 bits);
    the same for bitsandbytes' 4-bit layers that are packed for inference.
    """
    if torch.is_grad_enabled() and x.requires_grad and not (differentiable and not _packed(module)):
        return _StraightThrough.apply(x, getattr(module, "bias", None), module)
    return module(x)


def keep_unpacked(module: ForeignLayer) -> None:
    """Keeps a 4-bit layer of bitsandbytes as it is, where it would change under training.

    On a CPU with AVX512-BF16 its first forward in eval mode packs the weight for inference for
    good: it computes in bfloat16 from then on, has no gradient, and bitsandbytes 0.50's
    `state_dict()`, which unpacks it, misplaces the scales (the weight is off by 2 %). Warns of a
    layer that is packed already.
    """
    if kind_of(module) != "bnb_4bit":
        return
    if _packed(module):
        warnings.warn(
            "a forward in eval mode has packed this 4-bit model for inference: it trains, but "
            "model.state_dict(), which Trainer's checkpoints call, damages the base "
            "(bitsandbytes 0.50 on CPUs with AVX512-BF16). Load it again and adapt it before its "
            "first forward",
            stacklevel=2,
        )
    elif hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: nn.Module) -> Tensor:
        ctx.module = module
        return module(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantized_weight(ctx.module).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None


def _weight_4bit(module: ForeignLayer) -> Tensor:
    bnb = needed("bitsandbytes", "a 4-bit layer", "ecosystem")
    state = _state_4bit(module)
    if state is None:
        raise _not_quantized(module)
    if _packed(module):  # in an order of its own, with scales rounded to bfloat16
        return _weight_through_forward(module)
    state = copy.copy(state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(module.weight.data, state)


def _state_4bit(module: ForeignLayer) -> Any:
    """bitsandbytes' QuantState; on the module where a wrapper has replaced the weight."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _packed(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _weight_8bit(module: ForeignLayer) -> Tensor:
    if module.weight.dtype in FLOATS and module.state.has_fp16_weights:
        return module.weight.detach().float()
    bnb = needed("bitsandbytes", "an 8-bit layer", "ecosystem")
    # The first forward moves the scales from the weight to the module's state.
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    if module.weight.dtype != torch.int8 or scales is None:
        raise _not_quantized(module)
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)


def _not_quantized(module: nn.Module) -> ValueError:
    return ValueError(
        f"{type(module).__name__} is not quantised yet: move the model to its device first, "
        "model.to(device)"
    )


def _weight_torchao(module: ForeignLayer) -> Tensor:
    weight = module.weight
    if type(weight).dequantize is Tensor.dequantize:  # packed for a kernel, and nothing unpacks it
        return _weight_through_forward(module)
    return weight.detach().dequantize().float()


def _weight_through_forward(module: ForeignLayer) -> Tensor:
    """W from the layer's output for the identity matrix, a block of rows at a time."""
    rows, cols = module.out_features, module.in_features
    empty = torch.empty(0, dtype=compute_dtype(module), device=device_of(module))
    # The sum would round W to the bias' precision, which may be a hundred times as large.
    bias = getattr(module, "bias", None)
    without: dict[str, Tensor] = {}
    if isinstance(bias, Tensor) and "bias" in {**module._parameters, **module._buffers}:
        without["layer.bias"] = torch.zeros_like(bias)

    def forward(x: Tensor) -> Tensor:
        try:
            return functional_call(_Forward(module), without, (x,)).float()
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(module).__name__} does not take inputs [n, {cols}] in {x.dtype}: {error}"
            ) from error

    constant = forward(empty.new_zeros(1, cols))
    weight = torch.empty(rows, cols, device=empty.device)
    for begin in range(0, cols, _ROW_BLOCK):
        size = min(_ROW_BLOCK, cols - begin)
        block = empty.new_zeros(size, cols)
        block[:, begin : begin + size].fill_diagonal_(1.0)
        weight[:, begin : begin + size] = (forward(block) - constant).T
    _check_linear(module, forward, weight, constant, empty)
    return weight


def _check_linear(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    weight: Tensor,
    constant: Tensor,
    empty: Tensor,
) -> None:
    """Raises unless the layer matches x Wᵀ + c on random inputs, within 8-bit rounding."""
    generator = torch.Generator(empty.device).manual_seed(0)
    x = empty.new_empty(4, weight.shape[1]).normal_(generator=generator)
    want = x.float() @ weight.T + constant
    if not (forward(x) - want).norm() <= _NONLINEAR * want.norm():
        raise ValueError(
            f"{type(module).__name__} computes no linear function of its input, or NaN: leave it "
            "out with exclude_modules"
        )


class _Forward(nn.Module):
    """A layer's forward without the hooks that others have put on it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


_WEIGHTS: dict[str, Callable[[ForeignLayer], Tensor]] = {
    "bnb_4bit": _weight_4bit,
    "bnb_8bit": _weight_8bit,
    "torchao": _weight_torchao,
    "forward": _weight_through_forward,
}
