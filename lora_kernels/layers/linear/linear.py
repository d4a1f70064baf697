"""`LoRALinear`: a layer with adapters that replaces an `nn.Linear` and uses its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._utils.checks import check_weight
from ...init import Activations, Initializer, get_initializer
from ...init.sharded.layout import ADAPT_MODEL, is_sharded
from ...init.start import checked
from ..adapted import AdaptedLayer, transplant
from ..adapter import Adapter
from ..kinds import check_adaptable
from ..options import AdapterOptions
from .float_layer import AdaptedFloatLayer, check_startable


class LoRALinear(AdaptedFloatLayer, nn.Linear):
    """y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, with W [out, in] and b [out] frozen, and A [r, in] and
    B [out, r] trained (LoRA: Hu et al., arXiv 2106.09685, equation 3).

    LoRA-XS and LoRA-SB add an R [r, r], `lora_R`: y = x Wᵀ + b + s · drop(x) Aᵀ Rᵀ Bᵀ. Then only R
    is trained, and A and B need no gradient. For other starts `lora_R` is None.

    If the initial B₀A₀ is not zero, the layer subtracts it, so that training begins at W:

    - `residual="absorb"`: W ← W − s·B₀A₀ in place, once. The forward costs what LoRA costs.
    - `residual="implicit"`: W does not change; every forward subtracts s·B₀A₀ (one product of rank
      2r), so that many adapters can share the base.

    A, B and R are float32 (float64 over a float64 base), whatever dtype W has; the output has x's
    dtype.

    DoRA (`use_dora`, Liu et al., arXiv 2402.09353, equation 5) trains the norms m [out] of the
    adapted weight's rows too, `lora_magnitude`. Let y₀ be the output above without b, and ‖V‖ the
    norms of the rows of V = W + s·(BA − B₀A₀). Then y = (m ⊘ ‖V‖) ∘ y₀ + b. ‖V‖ is a constant in
    the backward (section 4.3), dropout does not change ‖V‖, and V is never in memory. m begins as
    ‖V‖, so that training begins where it would without DoRA.

    Args:
        in_features: as in `nn.Linear`.
        out_features: as in `nn.Linear`.
        bias: as in `nn.Linear`.
        r: rank, 1 ≤ r ≤ min(in_features, out_features).
        lora_alpha: the α from which `scaling` computes s; 8 by default, 256 for "alpha_sqrt".
        init_lora_weights: a name ("loram", "pissa" ...) or an object of `lora_kernels.init`.
        use_rslora: PEFT's spelling of scaling="rslora".
        scaling: the rule for s: "lora" (the default), s = lora_alpha / r; "rslora" or "alpha_sqrt"
            (LoRA-α), s = lora_alpha / √r. "alpha_sqrt" is only for starts whose s·B₀A₀ does not
            grow with s. The layer's attribute `scaling_rule` is the rule, and `scaling` is s.
        lora_dropout: the probability of dropping an element of A's input x during training.
        use_dora: whether magnitudes are trained too.
        residual: "absorb" or "implicit".
        gradient: ∂loss/∂W [out, in], for starts that are computed from the gradient.
        activations: statistics of the layer's inputs, as `capture_activations` returns them, for
            starts that are computed from activations.
        device: as in `nn.Linear`.
        dtype: as in `nn.Linear`.

    Raises:
        ValueError: a value out of range, an unknown name, a weight that is zero or not finite.
        TypeError: an argument or a weight of the wrong type.

    """

    weight: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]  # nn.Linear's annotation omits None

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
        use_dora: bool = False,
        residual: str = "absorb",
        gradient: Tensor | None = None,
        activations: Activations | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._begin()
        initializer = get_initializer(init_lora_weights)
        options = AdapterOptions.checked(
            initializer,
            r,
            lora_alpha,
            use_rslora=use_rslora,
            scaling=scaling,
            lora_dropout=lora_dropout,
            residual=residual,
            use_dora=use_dora,
        )
        self._adapt(initializer, options, gradient, activations)

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
        use_dora: bool = False,
        residual: str = "absorb",
        gradient: Tensor | None = None,
        activations: Activations | None = None,
    ) -> LoRALinear:
        """An adapted layer that uses the weight and bias of `linear` and freezes them.

        W is not copied: with `residual="absorb"`, `linear.weight` changes. The arguments and errors
        are those of `LoRALinear`; after an error `linear` is unchanged.

        Raises:
            TypeError: `linear` is adapted already, is sharded, or is not a plain `nn.Linear`.

        """
        if isinstance(linear, AdaptedLayer):
            raise TypeError(
                "this layer is adapted already: pass layer.to_linear() or layer.base_linear()"
            )
        check_adaptable(linear)
        if is_sharded(linear.weight):
            raise TypeError(f"the weight of this layer is sharded: {ADAPT_MODEL}")
        initializer = get_initializer(init_lora_weights)
        options = AdapterOptions.checked(
            initializer,
            r,
            lora_alpha,
            use_rslora=use_rslora,
            scaling=scaling,
            lora_dropout=lora_dropout,
            residual=residual,
            use_dora=use_dora,
        )
        layer = cls.over(linear)
        layer._adapt(initializer, options, gradient, activations)
        transplant(linear, layer)
        return layer

    @classmethod
    def over(cls, linear: nn.Linear) -> LoRALinear:
        """A layer with the parameters of `linear`, and no adapter yet."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer._take_over(linear)
        return layer

    @torch.no_grad()
    def _adapt(
        self,
        initializer: Initializer,
        options: AdapterOptions,
        gradient: Tensor | None,
        activations: Activations | None,
    ) -> None:
        """Computes the start of this layer's first adapter and attaches the adapter."""
        check_weight(self.weight)
        check_startable(self.weight, self.weight, options.r, initializer)
        if gradient is not None and not initializer.needs_gradient:
            raise ValueError(f"{type(initializer).__name__} does not use a gradient")
        if activations is not None and not initializer.needs_activations:
            raise ValueError(f"{type(initializer).__name__} does not use activations")
        r, scaling = options.r, options.scaling
        data = (gradient,) if activations is None else (gradient, activations)
        if options.residual == "absorb":
            start = initializer.absorb_(self.weight, r, scaling, *data)
        else:
            start = checked(initializer(self.weight, r, scaling, *data), self.weight, r)
        adapter = Adapter(options, start, initializer.changes_base)
        self.attach("default", adapter)
        if options.use_dora:
            try:
                adapter.measure_(self.matrix())
            except BaseException:
                self.restore_()  # the weight may belong to another layer too
                raise
        self.freeze()

    def _base_class(self) -> type[nn.Module]:
        return nn.Linear

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = weight
        if bias is not None:
            linear.bias = bias
        return linear.train(self.training)
