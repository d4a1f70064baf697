"""`LoRALinear`: a linear layer with a low-rank adapter, in the place of `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from ._errors import unknown_name
from .init import Initializer, get_initializer
from .init.base import checked, subtract_factors_, subtract_recipe_
from .ops._checks import as_integer, check_number, check_rank, check_weight
from .scaling import DEFAULT_ALPHA, check_start, lora_scaling, resolve_rule

RESIDUALS = ("absorb", "implicit")
_ABSORBED = "_lora_absorbed"  # set on a Parameter that lacks a start


class LoRALinear(nn.Linear):
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
        rule = resolve_rule(scaling, use_rslora)
        self._adapt(r, lora_alpha, init_lora_weights, rule, lora_dropout, residual, gradient)

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
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, LoRALinear):
            raise TypeError(
                "this layer is adapted already; take layer.to_linear() or base_linear()"
            )
        if type(linear).forward is not nn.Linear.forward or isinstance(
            linear, NonDynamicallyQuantizableLinear
        ):
            # The latter is nn.MultiheadAttention's out_proj, whose forward is never called.
            raise TypeError(f"{type(linear).__name__} does not compute as nn.Linear does")
        if not isinstance(linear.weight, nn.Parameter) or is_parametrized(linear):
            raise TypeError("the weight is computed; remove its parametrization first")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        rule = resolve_rule(scaling, use_rslora)
        layer._adapt(r, lora_alpha, init_lora_weights, rule, lora_dropout, residual, gradient)
        return layer

    def _adapt(
        self,
        r: int,
        lora_alpha: float | None,
        init_lora_weights: str | Initializer,
        rule: str,
        lora_dropout: float,
        residual: str,
        gradient: Tensor | None,
    ) -> None:
        r = as_integer(r, "r")
        check_weight(self.weight)
        check_rank(r, *self.weight.shape)
        initializer = get_initializer(init_lora_weights)
        if residual not in RESIDUALS:
            raise unknown_name("residual", residual, RESIDUALS)
        check_number(lora_dropout, "lora_dropout")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        if getattr(self.weight, _ABSORBED, False):
            raise ValueError(
                "this weight lacks the start of another adapter, which absorbed it; adapt it with "
                "residual='implicit' if several adapters share it"
            )
        if (initializer.changes_base or initializer.reads_weight) and self.weight.is_meta:
            raise ValueError(
                f"{type(initializer).__name__} reads the weight, which is on the meta device: "
                "load it first"
            )
        if gradient is not None and not initializer.needs_gradient:
            raise ValueError(f"{type(initializer).__name__} has no use for a gradient")
        lora_alpha = DEFAULT_ALPHA[rule] if lora_alpha is None else lora_alpha
        scaling = lora_scaling(lora_alpha, r, rule)
        check_start(rule, scaling, initializer)
        self.r, self.lora_alpha, self.scaling, self.scaling_rule = r, lora_alpha, scaling, rule
        self.use_rslora = rule == "rslora"
        self.lora_dropout = lora_dropout
        self.residual = residual
        self.adapter_enabled = True

        with torch.no_grad():
            if residual == "absorb":
                start = initializer.absorb_(self.weight, r, scaling, gradient)
            else:
                start = checked(initializer(self.weight, r, scaling, gradient), self.weight, r)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        has_R = start.lora_R is not None
        self.lora_A = nn.Parameter(start.lora_A, requires_grad=not has_R)
        self.lora_B = nn.Parameter(start.lora_B, requires_grad=not has_R)
        self.register_parameter("lora_R", nn.Parameter(start.lora_R) if has_R else None)
        # What gives the base back: β and the rule, which is one number, or else the factors.
        changed = initializer.changes_base
        absorbed = changed and residual == "absorb"
        recipe = absorbed and start.beta is not None
        keep = changed and not recipe
        start_A = start.right() if has_R else start.lora_A.clone()
        self.register_buffer("start_A", start_A if keep else None)
        self.register_buffer("start_B", start.lora_B.clone() if keep else None)
        self._absorbed_beta = start.beta if recipe else None
        self._absorbed_scaling = self.scaling if absorbed else None
        if absorbed:
            setattr(self.weight, _ABSORBED, True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features], in x's dtype."""
        if not self.adapter_enabled:
            return nn.functional.linear(x, self._base_weight(), self.bias)
        dropout, seed = 0.0, None
        if self.training and self.lora_dropout > 0:
            # From the global generator, so that manual_seed and checkpointing govern it.
            dropout = self.lora_dropout
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
        return torch.ops.lora.linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            dropout,
            seed,
            *self._implicit_start(),
            self.lora_R,
        )

    def _implicit_start(self) -> tuple[Tensor | None, Tensor | None]:
        """The factors that the forward subtracts."""
        return (self.start_A, self.start_B) if self.residual == "implicit" else (None, None)

    @torch.no_grad()
    def start_factors(self) -> tuple[Tensor, Tensor] | None:
        """A₀ [r, in] and B₀ [out, r] that were absorbed or are subtracted: those that are kept, or
        made again from β. None if nothing was taken out: the start was zero, or is left in.
        """
        if self.start_A is not None:
            return self.start_A, self.start_B
        if self._absorbed_beta is None:
            return None
        beta = self._absorbed_beta.to(self.lora_A.device)
        A0, B0 = (
            torch.ops.lora.dst_basis(
                size, self.r, dtype=factor.dtype, device=factor.device, scale=beta
            )
            for size, factor in (
                (self.in_features, self.lora_A),
                (self.out_features, self.lora_B),
            )
        )
        return A0.T, B0

    def _base_weight(self) -> Tensor:
        """W as it was before the adapter: itself, or a copy with the start put back."""
        if self._absorbed_scaling is None:
            return self.weight
        weight = self.weight.detach().clone()
        if self._absorbed_beta is not None:
            subtract_recipe_(weight, self._absorbed_beta, self.r, -self._absorbed_scaling)
        else:
            subtract_factors_(weight, self.start_A, self.start_B, -self._absorbed_scaling)
        return weight

    @torch.no_grad()
    def base_linear(self) -> nn.Linear:
        """A new `nn.Linear`, the layer before it was adapted.

        W is what it was, bit for bit if the residual is implicit or the start was zero, else to one
        rounding of its dtype.
        """
        weight = self._base_weight()
        return self._plain(weight.detach().clone() if weight is self.weight else weight)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new `nn.Linear` with everything merged: W + s·(BA − B₀A₀), with BRA for BA if there is
        an R, summed in float32 or wider and rounded once.
        """
        work = torch.promote_types(self.lora_A.dtype, torch.float32)
        weight = self.weight.detach().to(work, copy=True)
        left, right = self.lora_B.to(work), self.lora_A.to(work)
        if self.lora_R is not None:
            right = self.lora_R.to(work) @ right
        start_A, start_B = self._implicit_start()
        if start_A is not None:
            left = torch.cat([left, -start_B.to(work)], dim=1)  # [out, 2r]
            right = torch.cat([right, start_A.to(work)], dim=0)  # [2r, in]
        return self._plain(weight.addmm_(left, right, alpha=self.scaling).to(self.weight.dtype))

    def _plain(self, weight: Tensor) -> nn.Linear:
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        linear.weight = nn.Parameter(weight)
        if has_bias:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def get_extra_state(self) -> Tensor:
        """What gives an absorbed base back: [s, β] of a DST start, [s] where the factors are kept,
        [] if nothing was absorbed. Float64, and not touched by `.to(dtype)`.
        """
        if self._absorbed_scaling is None:
            return torch.empty(0, dtype=torch.float64)
        scaling = torch.tensor([self._absorbed_scaling], dtype=torch.float64)
        if self._absorbed_beta is None:
            return scaling
        return torch.cat([scaling, self._absorbed_beta.detach().cpu().reshape(1)])

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` gave.

        Raises:
            ValueError: if it was absorbed with another s than this layer's, or if one of the two
                absorbed its start and the other subtracts it.

        """
        values = state.detach().cpu().to(torch.float64)
        scaling = float(values[0]) if values.numel() else None
        # Where nothing was absorbed, start factors are there only to be subtracted.
        saved = "implicit" if scaling is None and self.start_A is not None else "absorb"
        if self.residual != saved and (scaling is not None or self.start_A is not None):
            raise ValueError(
                f"the saved layer has residual={saved!r}, this one {self.residual!r}: its weight "
                "and its start do not go together; construct it with the same residual"
            )
        if scaling is not None and scaling != self.scaling:
            raise ValueError(
                f"the saved layer absorbed its start with scaling {scaling:g}, this one has "
                f"{self.scaling:g}: construct it with the same r, lora_alpha and scaling rule"
            )
        self._absorbed_scaling = scaling
        self._absorbed_beta = values[1].clone() if values.numel() > 1 else None

    def extra_repr(self) -> str:
        """`nn.Linear`'s, and the adapter's settings."""
        return (
            f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}, residual={self.residual!r}"
        )
