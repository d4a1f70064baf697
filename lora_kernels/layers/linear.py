"""`LoRALinear`: a linear layer with a low-rank adapter, in the place of `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from .._utils.checks import check_weight
from ..init import Initializer, get_initializer
from ..init.start import Start, checked
from .base import AdaptedMatrix, refuse_unfit
from .options import AdapterOptions
from .transplant import transplant


class LoRALinear(AdaptedMatrix, nn.Linear):
    """y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ with W, b frozen and A [r, in], B [out, r] trained.

    With a start that has an R [r, r], LoRA-XS's or LoRA-SB's, y = x Wᵀ + b + s · drop(x) Aᵀ Rᵀ Bᵀ
    and only R, `lora_R`, is trained; A and B are parameters that need no gradient. Else `lora_R`
    is None.

    An adapter that does not start at zero must be taken out of the layer once:

    - `residual="absorb"`: W ← W − s·B₀A₀ in place. The forward costs what LoRA costs.
    - `residual="implicit"`: W keeps its bits, the forward subtracts the constant s·B₀A₀ itself
      (one product of rank 2r), so that many adapters can share the base.

    A, B and R are float32 (float64 over a float64 base) whatever W is; the output has x's dtype.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank, 1 ≤ r ≤ min(in_features, out_features).
        lora_alpha: what `scaling` makes s from; 8 by default, 256 for "alpha_sqrt".
        init_lora_weights: a name ("loram", "pissa" ...) or an object of `lora_kernels.init`.
        use_rslora: PEFT's spelling of scaling="rslora".
        scaling: the rule of s: "lora" (the default), s = lora_alpha / r; "rslora" or "alpha_sqrt"
            (LoRA-α), s = lora_alpha / √r, the latter for starts that do not grow with s. The rule
            is the layer's `scaling_rule`; its `scaling` is the number s.
        lora_dropout: probability of dropping an element of x on its way to A, while training.
        residual: "absorb" or "implicit".
        gradient: [out, in], the loss gradient of W, for the starts that are made from it.

    Raises:
        ValueError: a value out of range, an unknown name, a weight that is zero or not finite.
        TypeError: an argument or a weight of the wrong type. Nothing is changed then.

    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float | None = None,
        init_lora_weights: str | Initializer = "loram",
        use_rslora: bool = False,
        scaling: str | None = None,
        lora_dropout: float = 0.0,
        residual: str = "absorb",
        gradient: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        options = (r, lora_alpha, use_rslora, scaling, lora_dropout, residual)
        self._adapt(init_lora_weights, gradient, *options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float | None = None,
        init_lora_weights: str | Initializer = "loram",
        use_rslora: bool = False,
        scaling: str | None = None,
        lora_dropout: float = 0.0,
        residual: str = "absorb",
        gradient: Tensor | None = None,
    ) -> LoRALinear:
        """The adapted layer over the linear's own weight and bias, which it takes over and freezes.

        No second copy of W is made: with `residual="absorb"`, `linear.weight` changes with it.
        """
        check_adaptable(linear)
        layer = cls._over(linear)
        options = (r, lora_alpha, use_rslora, scaling, lora_dropout, residual)
        layer._adapt(init_lora_weights, gradient, *options)
        transplant(linear, layer)
        return layer

    @classmethod
    def _over(cls, linear: nn.Linear) -> LoRALinear:
        """A layer that has the linear's parameters, and no adapter yet."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        return layer

    @classmethod
    def from_start(
        cls,
        linear: nn.Linear,
        start: Start,
        options: AdapterOptions,
        changes_base: bool,
        adapter_name: str = "default",
    ) -> LoRALinear:
        """The adapted layer with a start that is made already. Nothing of `linear` changes: where
        `residual="absorb"`, its weight is to have the start taken out by the caller.
        """
        layer = cls._over(linear)
        layer._begin_as(adapter_name, options, start, changes_base)
        transplant(linear, layer)
        return layer

    def _adapt(
        self, init_lora_weights: str | Initializer, gradient: Tensor | None, *options
    ) -> None:
        check_weight(self.weight)
        initializer = get_initializer(init_lora_weights)
        options = AdapterOptions.checked(initializer, *options)
        refuse_unfit(self.weight, self.weight, options.r, initializer)
        if gradient is not None and not initializer.needs_gradient:
            raise ValueError(f"{type(initializer).__name__} has no use for a gradient")
        r, scaling = options.r, options.scaling
        with torch.no_grad():
            if options.residual == "absorb":
                start = initializer.absorb_(self.weight, r, scaling, gradient)
            else:
                start = checked(initializer(self.weight, r, scaling, gradient), self.weight, r)
        self._begin_as("default", options, start, initializer.changes_base)
        self._freeze()

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight, linear.bias = weight, bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """`nn.Linear`'s, and the adapter's settings."""
        return (
            f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}, residual={self.residual!r}"
        )


def check_adaptable(linear: nn.Module) -> None:
    """Raises TypeError unless it is an `nn.Linear` with a weight and the forward of its own."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
    if isinstance(linear, LoRALinear):
        raise TypeError("this layer is adapted already; take layer.to_linear() or base_linear()")
    if type(linear).forward is not nn.Linear.forward or isinstance(
        linear, NonDynamicallyQuantizableLinear
    ):
        # The latter is nn.MultiheadAttention's out_proj, whose forward is never called.
        raise TypeError(f"{type(linear).__name__} does not compute as nn.Linear does")
    if "forward" in vars(linear) and not hasattr(linear, "_hf_hook"):
        raise TypeError("the forward of this nn.Linear is replaced; undo that first")
    if not isinstance(linear.weight, nn.Parameter) or is_parametrized(linear):
        raise TypeError("the weight is computed; remove its parametrization first")


class LoRAConv1D(AdaptedMatrix):
    """transformers' `Conv1D` with an adapter: `LoRALinear` with W stored as [in, out].

    `weight` and `bias` are the Conv1D's own, frozen; `nx` is in_features and `nf` out_features.
    """

    transposed = True

    @classmethod
    def from_start(
        cls,
        conv: nn.Module,
        start: Start,
        options: AdapterOptions,
        changes_base: bool,
        adapter_name: str = "default",
    ) -> LoRAConv1D:
        """As `LoRALinear.from_start`."""
        layer = cls()
        layer.nx, layer.nf = layer.in_features, layer.out_features = conv.weight.shape
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.training = conv.training
        layer._class = type(conv)
        layer._begin_as(adapter_name, options, start, changes_base)
        transplant(conv, layer)
        return layer

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        with torch.device("meta"):
            conv = self._class(self.nf, self.nx)
        conv.weight, conv.bias = weight, bias
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """The sizes and the adapter's settings."""
        return (
            f"in_features={self.nx}, out_features={self.nf}, r={self.r}, "
            f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, "
            f"residual={self.residual!r}"
        )
