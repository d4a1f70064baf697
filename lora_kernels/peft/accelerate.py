"""`accelerate`: one fused operator instead of the four operators of PEFT's LoRA layer, and no full
weights of all experts, which PEFT's `target_parameters` would form at every forward.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import pad

from .._utils.checks import FLOATS
from ..layers.kinds import is_conv1d
from ..ops.philox import dropout_seed
from .experts.forward import fused_experts, why_never_fused
from .experts.wrappers import chain_of, outermost
from .layers import check_model, described, lora_layers
from .patch import is_plain, is_replaced, replace_method, restore_method
from .variant import StartVariant, magnitude_of, start_of
from .variant.dora import DoraStartVariant


@dataclass
class AccelerateReport:
    """What `accelerate` did. `layers` are the names of the accelerated layers; `left` is
    {name: reason} of the LoRA layers that were not accelerated.
    """

    layers: list[str]
    left: dict[str, str]
    _accelerated: list[LoraLayer] = field(repr=False)

    def undo(self) -> None:
        """Restores PEFT's own forward in all of these layers. A second call does nothing.

        Raises:
            RuntimeError: another tool has wrapped a layer's forward since; then nothing is undone.

        """
        for name, layer in zip(self.layers, self._accelerated, strict=True):
            wrapped = "forward" in layer.__dict__
            if wrapped and not any(is_replaced(layer, "forward", own) for own in _FORWARDS):
                raise RuntimeError(f"{name}: its forward was wrapped since: undo that first")
        for layer in self._accelerated:
            for own in _FORWARDS:
                restore_method(layer, "forward", own)

    def __str__(self) -> str:
        total = len(self.layers) + len(self.left)
        lines = [f"fused forward in {len(self.layers)} of {total} LoRA layers"]
        return "\n".join(lines + described(self.left))


def accelerate(peft_model: peft.PeftModel) -> AccelerateReport:
    """Makes a PEFT model's LoRA layers use `torch.ops.lora.linear` in forward and backward, and its
    LoRA layers over experts' parameters `torch.ops.lora.grouped_linear`.

    The parameters remain PEFT's, so that optimizers, saving and all of PEFT's methods still work.
    A layer is accelerated if its base is a plain `nn.Linear` or GPT-2's `Conv1D` with a
    floating-point weight. In such a layer, a call is fused if exactly one adapter is active, it is
    plain LoRA or DoRA, with or without a start of `initialize`, and it is neither merged nor
    disabled. All other calls (several adapters, mixed batches ...) use PEFT's own forward. Each
    call is checked anew.

    DoRA layers use `torch.ops.lora.dora_linear`, which does not form W + s·BA and computes norms in
    float32 or wider. While dropout is active, DoRA layers use PEFT's own forward, in which dropout
    also applies to the input of the base's product.

    A layer that PEFT makes for `target_parameters` is accelerated if its parameters are the
    floating-point experts of a class that transformers decorates with `use_experts_implementation`.
    Its calls are fused on the same conditions, and only if the experts are frozen. PEFT forms
    W + s·BA of all experts at every forward, and the whole gradient of it. The fused operator forms
    neither: it multiplies x with the W, A and B of the experts that x is routed to.

    The results equal PEFT's except for rounding and for the dropout mask, which comes from another
    generator. The operator computes in x's dtype: with a bfloat16 base and PEFT's default float32
    adapters, A and B are rounded to bfloat16, while PEFT multiplies in float32.

    Returns:
        A report, whose `undo()` restores PEFT's forward.

    Raises:
        TypeError: the model is not a `PeftModel`, or has adapters other than LoRA.

    """
    check_model(peft_model)
    accelerated, left = {}, {}
    layers = lora_layers(peft_model)
    reasons = _reasons_of_wrappers(layers.values())
    for name, layer in layers.items():
        reason = reasons[id(layer)] if id(layer) in reasons else _why_never(layer)
        if reason is None:
            accelerated[name] = layer
        else:
            left[name] = reason
    called = {id(wrapper) for wrapper in outermost(accelerated.values())}
    for layer in accelerated.values():
        if not isinstance(layer, ParamWrapper):
            replace_method(layer, "forward", fused_forward)
        elif id(layer) in called:  # it also computes the updates of the wrappers inside it
            replace_method(layer, "forward", fused_experts)
    return AccelerateReport(list(accelerated), left, list(accelerated.values()))


def fused_forward(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y [..., out] of x [..., in]; replaces PEFT's `Linear.forward`, and calls it if not fused."""
    adapter = None if args or kwargs else _fusable_adapter(layer, x)
    if adapter is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    base, dropout = layer.base_layer, layer.lora_dropout[adapter]
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    lora_A, lora_B, scaling, start_A, start_B = _operands(layer, adapter)
    weight = base.weight.T if layer.fan_in_fan_out else base.weight  # [out, in]
    magnitude = magnitude_of(layer, adapter)  # [out]
    if magnitude is not None:
        factors = (lora_A, lora_B, magnitude, scaling)
        starts = {"start_A": start_A, "start_B": start_B}
        return torch.ops.lora.dora_linear(x, weight, base.bias, *factors, **starts)
    seed = dropout_seed(x.device) if p > 0 else None
    others = (lora_A, lora_B, scaling, p, seed, start_A, start_B)
    return torch.ops.lora.linear(x, weight, base.bias, *others)


def _operands(
    layer: Linear, adapter: str
) -> tuple[Tensor, Tensor, float, Tensor | None, Tensor | None]:
    """A [r, in], B [out, r], s, A₀ [r, in] and B₀ [out, r] in the operator's form.

    PEFT's hot-swapping changes only the rank of A and B. In a compiled model it also makes s a
    tensor, so that another s does not recompile the model.
    """
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    A0, B0 = start_of(layer, adapter) or (None, None)
    if A0 is not None and B0 is not None and len(A0) != len(A):
        r = max(len(A0), len(A))
        A, B, A0, B0 = *_of_rank(r, A, B), *_of_rank(r, A0, B0)
    scaling = layer.scaling[adapter]
    if isinstance(scaling, Tensor):
        B, B0, scaling = B * scaling, None if B0 is None else B0 * scaling, 1.0
    return A, B, scaling, A0, B0


def _of_rank(r: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with the same product; the additional rows and columns are zero."""
    missing = r - len(A)
    return pad(A, (0, 0, 0, missing)), pad(B, (0, missing))


def _reasons_of_wrappers(layers: Collection[LoraLayer]) -> dict[int, str | None]:
    """{id of a wrapper: why its calls can never be fused, or None}, for the wrappers of parameters.
    The wrappers of one module are fused together or not at all.
    """
    return {
        id(wrapper): reason
        for first in outermost(layers)
        for reason in [why_never_fused(first)]
        for wrapper in chain_of(first)
    }


def _why_never(layer: LoraLayer) -> str | None:
    """Why no call of the layer can ever be fused; None if some can."""
    if type(layer) is not Linear:
        return f"PEFT's {type(layer).__name__} is not over a plain linear layer"
    base = layer.base_layer
    conv1d = is_conv1d(base)
    if type(base) is not nn.Linear and not conv1d:
        return f"its base is {type(base).__name__}, not a plain linear layer"
    weight = base.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if layer.fan_in_fan_out != conv1d:
        return "its fan_in_fan_out does not fit its base"
    if "forward" in layer.__dict__ and not is_replaced(layer, "forward", fused_forward):
        return "its forward is wrapped by another tool"
    if not is_plain(base, type(base)):
        return "its base has hooks or a wrapped forward"
    reasons = [_why_not(layer, adapter) for adapter in layer.lora_A]
    return reasons[0] if reasons and all(reasons) else None


def _why_not(layer: Linear, adapter: str) -> str | None:
    """Why calls with this adapter cannot be fused; None if they can."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) not in _VARIANTS:
        return f"it is PEFT's {type(variant).__name__}, not plain LoRA"
    if adapter in layer.lora_magnitude_vector and not is_plain(
        layer.lora_magnitude_vector[adapter], DoraLinearLayer
    ):
        return "its lora_magnitude_vector has hooks or is wrapped"
    if layer.lora_bias[adapter]:
        return "its lora_B has a bias"
    if type(layer.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
        return "its dropout is not nn.Dropout"
    if not (is_plain(layer.lora_A[adapter]) and is_plain(layer.lora_B[adapter])):
        return "its lora_A or lora_B has hooks or is wrapped"
    return None


def _fusable_adapter(layer: Linear, x: Tensor) -> str | None:
    """The active adapter if this call can be fused, else None."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1 or _why_not(layer, active[0]) is not None:
        return None
    base = layer.base_layer
    if not is_plain(base, type(base)):
        return None
    if not _fits_dora(layer, active[0]):
        return None
    if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    return active[0]


def _fits_dora(layer: Linear, adapter: str) -> bool:
    """Whether DoRA allows that a call with this adapter is fused. PEFT also applies dropout to the
    input of the base's product, and may keep magnitudes on the CPU; such calls are not fused.
    """
    magnitude = magnitude_of(layer, adapter)
    if magnitude is None:
        return True
    dropout = layer.lora_dropout[adapter]
    drops = layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    return not drops and magnitude.device == layer.base_layer.weight.device


_FORWARDS = (fused_forward, fused_experts)
# Variants of PEFT's layers that are fused, besides plain LoRA.
_VARIANTS = (StartVariant, DoraStartVariant, DoraLinearVariant)
