"""For layers whose weight cannot be rewritten (quantized, or accessible only through forward): W,
the dtype, and a forward that autograd can differentiate.

A quantization package is imported only for a layer that belongs to it.
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
from .kinds import ForeignLayer, is_conv1d, kind_of

_ROW_BLOCK = 256  # rows of the identity matrix in one forward
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NONLINEAR = 0.1  # relative error; rounding the inputs to 8 bits causes 0.01


@torch.no_grad()
def dequantized_weight(module: nn.Module) -> Tensor:
    """The W [out, in] that the layer multiplies by, as a new float32 matrix.

    W is rounded to the layer's compute dtype only if it had to be read through the forward.

    Raises:
        ValueError: the layer is not quantized yet, rejects inputs [n, in], or is not linear.

    """
    return _WEIGHTS[kind_of(module) or "forward"](module)


@torch.no_grad()
def check_cast(module: ForeignLayer) -> None:
    """Raises ValueError unless something casts this layer's float8 weight for its forward, and the
    layer then computes x Wᵀ + c.
    """
    weight = _stored_weight(module)  # [out, in]
    stored = [(tensor, tensor.data) for tensor in module.parameters()]
    try:
        for dtype in _COMPUTE_DTYPES:
            empty = torch.empty(0, dtype=dtype, device=weight.device)
            try:
                constant = module(empty.new_zeros(1, weight.shape[1])).float()  # [1, out]
            except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
                continue
            _check_linear(module, lambda x: module(x).float(), weight, constant, empty)
            return
    finally:
        for tensor, data in stored:  # a failed forward leaves it cast
            tensor.data = data
    raise ValueError(
        f"the weight is stored in {module.weight.dtype}, and nothing casts it for the forward: "
        "cast the layer to bfloat16, or enable layerwise casting before adapting it"
    )


def compute_dtype(module: ForeignLayer) -> torch.dtype:
    """The dtype that the layer computes in: its weight's, its `compute_dtype` attribute, or the
    dtype of its bias or scales; float32 if there is none of these.
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
    """The device of the layer's tensors, where its inputs must be too.

    Raises:
        ValueError: the layer has no tensors.

    """
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors:
        raise ValueError(f"{type(module).__name__} has no tensor that tells its device")
    return tensors[0].device


def passes_gradient(module: ForeignLayer) -> bool:
    """Whether autograd reaches the layer's input from its output.

    torchao's layers that quantize their input, and kernels written for inference, may block it.
    Such layers are tried with one row of zeros; bitsandbytes' layers are known to pass gradients.
    A float8 layer is assumed not to pass gradients: autograd may have saved the weight itself,
    which a hook has cast back since.
    """
    kind = kind_of(module)
    if kind not in ("torchao", "forward"):
        return kind != "float8"
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
    """`module(x)` [..., in] → [..., out], with gradients for x and the bias for every layer.

    `differentiable` is the result of `passes_gradient`. If it is False, or if the layer is a 4-bit
    layer of bitsandbytes packed for inference, the gradient is that of x Wᵀ with the dequantized W
    (straight through a quantization of x, as in bitsandbytes' 8-bit layers).
    """
    if torch.is_grad_enabled() and x.requires_grad and not (differentiable and not _packed(module)):
        return _StraightThrough.apply(x, getattr(module, "bias", None), module)
    return module(x)


def keep_unpacked(module: ForeignLayer) -> None:
    """Keeps a 4-bit layer of bitsandbytes from packing its weight for inference.

    On a CPU with AVX512-BF16 the layer's first forward in eval mode packs the weight for good: from
    then on the layer computes in bfloat16 and has no gradient, and bitsandbytes 0.50's
    `state_dict()`, which unpacks the weight, misplaces the scales (the weight is off by 2 %). A
    layer that is packed already causes a warning.
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
    import bitsandbytes as bnb  # installed, as the layer shows; compiled code cannot call `needed`

    state = _state_4bit(module)
    if state is None:
        raise _not_quantized(module)
    if _packed(module):  # reordered, with scales rounded to bfloat16
        return _weight_through_forward(module)
    state = copy.copy(state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(module.weight.data, state)


def _state_4bit(module: ForeignLayer) -> Any:
    """bitsandbytes' QuantState or None; it is on the module if a wrapper replaced the weight."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _packed(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _weight_8bit(module: ForeignLayer) -> Tensor:
    if module.weight.dtype in FLOATS and module.state.has_fp16_weights:
        return module.weight.detach().float()
    import bitsandbytes as bnb

    # The first forward moves the scales from the weight to the module's state.
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    if module.weight.dtype != torch.int8 or scales is None:
        raise _not_quantized(module)
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)


def _not_quantized(module: nn.Module) -> ValueError:
    return ValueError(
        f"{type(module).__name__} is not quantized yet: move the model to its device first, "
        "model.to(device)"
    )


def _weight_torchao(module: ForeignLayer) -> Tensor:
    weight = module.weight
    if type(weight).dequantize is Tensor.dequantize:  # packed for a kernel; cannot be unpacked
        return _weight_through_forward(module)
    return weight.detach().dequantize().float()


def _stored_weight(module: ForeignLayer) -> Tensor:
    weight = module.weight.detach().float()
    return weight.T if is_conv1d(module) else weight


def _weight_through_forward(module: ForeignLayer) -> Tensor:
    """W [out, in] from the layer's output for the identity matrix, a block of rows at a time."""
    rows, cols = module.out_features, module.in_features
    empty = torch.empty(0, dtype=compute_dtype(module), device=device_of(module))
    # Without a bias, because a bias a hundred times as large would round W to its own precision.
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

    constant = forward(empty.new_zeros(1, cols))  # [1, out]
    weight = torch.empty(rows, cols, device=empty.device)  # [out, in]
    for begin in range(0, cols, _ROW_BLOCK):
        size = min(_ROW_BLOCK, cols - begin)
        block = empty.new_zeros(size, cols)  # [size, in]
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
            f"{type(module).__name__} computes no linear function of its input, or NaN: exclude it "
            "with exclude_modules"
        )


class _Forward(nn.Module):
    """A layer's forward without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


_WEIGHTS: dict[str, Callable[[ForeignLayer], Tensor]] = {
    "linear": _stored_weight,
    "conv1d": _stored_weight,
    "float8": _stored_weight,
    "bnb_4bit": _weight_4bit,
    "bnb_8bit": _weight_8bit,
    "torchao": _weight_torchao,
    "forward": _weight_through_forward,
}
