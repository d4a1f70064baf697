"""The linear layers that an adapter can sit on: those of float weights, and those whose weight
cannot be rewritten, quantised or seen only through their forward.

No quantiser's package is imported unless a layer is its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from .._utils.checks import FLOATS
from .._utils.extras import needed

_ROW_BLOCK = 256  # rows of the identity that a layer is fed at once
_NONLINEAR = 0.1  # relative; inputs rounded to 8 bits make 0.01


def kind_of(module: nn.Module) -> str | None:
    """What sort of linear layer it is; None if it is none that can be adapted.

    - "linear": an `nn.Linear` that computes as such, with a float64 ... float16 weight of its own.
    - "conv1d": GPT-2's, whose weight is [in, out].
    - "bnb_4bit", "bnb_8bit": bitsandbytes' `Linear4bit` and `Linear8bitLt`.
    - "torchao": an `nn.Linear` whose weight is one of torchao's tensors.
    - "forward": any other with integers `in_features` and `out_features`, no float weight, and a
      tensor of codes: GPTQ's, AWQ's, HQQ's.

    A layer whose weight is sharded has the kind that it had before: `refuse_sharded` tells.
    """
    return next((name for name, kind in _KINDS.items() if kind.owns(module)), None)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    if _known_kind(module) == "conv1d":
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


@torch.no_grad()
def dequantized_weight(module: nn.Module) -> Tensor:
    """W [out, in] as the layer multiplies with it. The module is not changed.

    The weight itself of "linear", a view of "conv1d"'s; of the others a new matrix in float32, not
    rounded to the dtype that the layer computes in, or, where only its forward knows, rounded to
    that once.

    Raises:
        TypeError: the module is none of `kind_of`'s.
        ValueError: the layer is not quantised yet, or does not take the inputs that it should.

    """
    return _KINDS[_known_kind(module)].weight(module)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that the layer computes in, as far as it tells: that of its weight, or its
    `compute_dtype`, or that of its bias or scales; float32 if nothing does.
    """
    kind, weight = _known_kind(module), getattr(module, "weight", None)
    if kind in ("linear", "conv1d", "torchao"):
        return weight.dtype
    told = getattr(module, "compute_dtype", None)
    if isinstance(told, torch.dtype):
        return told
    if kind == "bnb_4bit" and (state := _state_4bit(module)) is not None:
        return state.dtype
    own = [module.bias] if isinstance(getattr(module, "bias", None), Tensor) else []
    own += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return next((tensor.dtype for tensor in own if tensor.dtype in FLOATS), torch.float32)


def device_of(module: nn.Module) -> torch.device:
    """Where the layer's tensors lie, and its inputs should."""
    _known_kind(module)
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors:
        raise ValueError(f"{type(module).__name__} has no tensor that tells its device")
    return tensors[0].device


def passes_gradient(module: nn.Module) -> bool:
    """Whether autograd gets from the layer's output to its input.

    It does not through torchao's layers that quantise their input, nor through kernels that were
    written for inference. These are tried with a row of zeros; bitsandbytes' and float layers are
    known to.
    """
    if _known_kind(module) not in ("torchao", "forward"):
        return True
    options = {"dtype": compute_dtype(module), "device": device_of(module)}
    x = torch.zeros(1, linear_shape(module)[1], **options, requires_grad=True)
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

    `differentiable` is what `passes_gradient` says. If it is False the gradient is that of
    x Wᵀ with the dequantised W (straight through a quantisation of x, as in bitsandbytes' 8 bits).

    It is so too for bitsandbytes' 4-bit layers that are packed for inference, whatever is said.
    """
    if torch.is_grad_enabled() and x.requires_grad and not (differentiable and not _packed(module)):
        return _StraightThrough.apply(x, getattr(module, "bias", None), module)
    return module(x)


def keep_unpacked(module: nn.Module) -> None:
    """Keeps a 4-bit layer of bitsandbytes as it is, where it would change under training.

    On a CPU with AVX512-BF16 its first forward in eval mode packs the weight for inference for
    good: it computes in bfloat16 from then on, has no gradient, and bitsandbytes 0.50's
    `state_dict()`, which unpacks it, misplaces the scales (the weight is off by 2 %). A layer that
    is packed already is warned of.
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
    def forward(ctx, x: Tensor, bias: Tensor | None, module: nn.Module) -> Tensor:
        ctx.module = module
        return module(x.detach())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantized_weight(ctx.module).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None


def refuse_sharded(name: str, module: nn.Module) -> None:
    """Raises ValueError if the layer's tensors are shards, or not there at all."""
    for key, tensor in _tensors(module):
        what = f"{name}.{key}"
        if hasattr(tensor, "ds_id") and tensor.numel() == 0:
            raise ValueError(
                f"{what} is partitioned by DeepSpeed ZeRO-3: adapt the model before "
                "deepspeed.initialize, or within deepspeed.zero.GatheredParameters"
            )
        if _is_dtensor(tensor):
            raise ValueError(
                f"{what} is a DTensor, sharded by FSDP2 or tensor parallelism: adapt the model "
                "before fully_shard or parallelize_module"
            )
        if getattr(tensor, "_fsdp_flattened", False) or _is_flattened(module):
            raise ValueError(
                f"{what} is part of a flat parameter of FSDP: adapt the model before it is wrapped"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{what} is on the meta device: load it first (if accelerate has offloaded it, "
                "load the model with a device_map that keeps this layer)"
            )
    if getattr(module, "_hf_tp_plan", None) is not None:
        raise ValueError(
            f"{name} is sharded by transformers' tensor parallelism (tp_plan): load the model "
            "without it to adapt it"
        )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = {**module._parameters, **module._buffers}
    if _is_flattened(module):
        own["weight"] = module.weight
    return [(name, tensor) for name, tensor in own.items() if tensor is not None]


def _known_kind(module: nn.Module) -> str:
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is no linear layer that can be adapted")
    return kind


def _is_a(module: object, package: str, *names: str) -> bool:
    """Whether a class of that package, of one of the names if any are given, is among its bases."""
    return any(
        cls.__module__.partition(".")[0] == package and (not names or cls.__name__ in names)
        for cls in type(module).__mro__
    )


def _has_float_weight(module: nn.Module) -> bool:
    """A Parameter, be it sharded; a computed weight or bias (parametrised, hooked) is none."""
    weight = module._parameters.get("weight")
    if weight is None:
        return _is_flattened(module)
    if isinstance(vars(module).get("bias"), Tensor):
        return False
    return weight.dtype in FLOATS and (type(weight) is nn.Parameter or _is_dtensor(weight))


def _is_dtensor(tensor: Tensor) -> bool:
    return _is_a(tensor, "torch", "DTensor")


def _is_flattened(module: nn.Module) -> bool:
    """Whether FSDP has put views of a flat parameter in the place of all Parameters; unlike
    weight_norm and pruning, which leave some of their own.
    """
    return (
        (_is_plain_linear(module) or is_conv1d(module))
        and isinstance(vars(module).get("weight"), Tensor)
        and all(parameter is None for parameter in module._parameters.values())
    )


def _is_plain_linear(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear)
        and (type(module).forward is nn.Linear.forward or _is_falcon(module))
        # nn.MultiheadAttention's out_proj, whose forward is never called.
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and not _forward_is_replaced(module)
        and not is_parametrized(module)  # be it the bias only
    )


def _is_falcon(module: nn.Module) -> bool:
    """transformers' FalconLinear, whose forward is x Wᵀ + b in two steps."""
    kind = type(module)
    return kind.__name__ == "FalconLinear" and kind.__module__.startswith("transformers.")


def _forward_is_replaced(module: nn.Module) -> bool:
    """On the instance, by something else than accelerate's hook, which calls the class's."""
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def _is_forward_only(module: nn.Module) -> bool:
    sizes = [getattr(module, size, None) for size in ("in_features", "out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in FLOATS:
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not any(tensor.dim() >= 2 and tensor.dtype not in FLOATS for tensor in own):
        return False
    # A wrapper around a layer, PEFT's for one, is not the layer, and a block of layers is none.
    return not any(kind_of(part) for part in module.modules() if part is not module)


def _weight_4bit(module: nn.Module) -> Tensor:
    bnb = needed("bitsandbytes", "a 4-bit layer", "ecosystem")
    state = _state_4bit(module)
    if state is None:
        raise _not_quantized(module)
    if _packed(module):  # in an order of its own, with scales rounded to bfloat16
        return _weight_through_forward(module)
    state = copy.copy(state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(module.weight.data, state)


def _state_4bit(module: nn.Module):
    """bitsandbytes' QuantState; on the module where a wrapper has replaced the weight."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _packed(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _weight_8bit(module: nn.Module) -> Tensor:
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


def _weight_torchao(module: nn.Module) -> Tensor:
    weight = module.weight
    if type(weight).dequantize is Tensor.dequantize:  # packed for a kernel, and nothing unpacks it
        return _weight_through_forward(module)
    return weight.detach().dequantize().float()


def _weight_through_forward(module: nn.Module) -> Tensor:
    """W from what the layer makes of the identity, a block of rows at a time."""
    rows, cols = linear_shape(module)
    options = {"dtype": compute_dtype(module), "device": device_of(module)}
    # The sum would round W to the bias' precision, which may be a hundred times as large.
    bias = getattr(module, "bias", None)
    named = isinstance(bias, Tensor) and "bias" in {**module._parameters, **module._buffers}
    without = {"layer.bias": torch.zeros_like(bias)} if named else {}

    def forward(x: Tensor) -> Tensor:
        try:
            return functional_call(_Forward(module), without, (x,)).float()
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(module).__name__} does not take inputs [n, {cols}] in {x.dtype}: {error}"
            ) from error

    constant = forward(torch.zeros(1, cols, **options))
    weight = torch.empty(rows, cols, device=options["device"])
    for begin in range(0, cols, _ROW_BLOCK):
        size = min(_ROW_BLOCK, cols - begin)
        block = torch.zeros(size, cols, **options)
        block[:, begin : begin + size].fill_diagonal_(1.0)
        weight[:, begin : begin + size] = (forward(block) - constant).T
    _check_linear(module, forward, weight, constant, options)
    return weight


def _check_linear(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    weight: Tensor,
    constant: Tensor,
    options: dict,
) -> None:
    """Raises unless the layer is x ↦ x Wᵀ + c for another x too, but for 8 bits of that."""
    generator = torch.Generator(options["device"]).manual_seed(0)
    x = torch.empty(4, weight.shape[1], **options).normal_(generator=generator)
    want = x.float() @ weight.T + constant
    if not (forward(x) - want).norm() <= _NONLINEAR * want.norm():
        raise ValueError(
            f"{type(module).__name__} computes no linear function of its input, or NaN: leave it "
            "out with exclude_modules"
        )


class _Forward(nn.Module):
    """A layer's forward alone, without the hooks that others have put on it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


@dataclass(frozen=True)
class _Kind:
    owns: Callable[[nn.Module], bool]
    weight: Callable[[nn.Module], Tensor]


# The first that owns a module names its kind.
_KINDS = {
    "bnb_4bit": _Kind(lambda m: _is_a(m, "bitsandbytes", "Linear4bit"), _weight_4bit),
    "bnb_8bit": _Kind(lambda m: _is_a(m, "bitsandbytes", "Linear8bitLt"), _weight_8bit),
    "conv1d": _Kind(
        lambda m: is_conv1d(m) and _has_float_weight(m) and not _forward_is_replaced(m),
        lambda m: m.weight.detach().T,
    ),
    "linear": _Kind(
        lambda m: _is_plain_linear(m) and _has_float_weight(m),
        lambda m: m.weight.detach(),
    ),
    "torchao": _Kind(lambda m: _is_plain_linear(m) and _is_a(m.weight, "torchao"), _weight_torchao),
    "forward": _Kind(_is_forward_only, _weight_through_forward),
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is [in, out]. Told without transformers."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear` (a `LoRALinear` is one too) or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


FLOAT_KINDS = ("linear", "conv1d")  # kinds whose weight can be rewritten
