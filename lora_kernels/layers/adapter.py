"""`Adapter`: the factors of one adapter of one layer, and the data that restore its base."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..init.start import Start, subtract_factors_, subtract_recipe_
from .options import AdapterOptions
from .state import LayerState, WithStart, product_factors


class Adapter(WithStart, nn.Module):
    """A [r, in], B [out, r] and, for some starts, R [r, r]; s; and the initial factors A₀ and B₀.

    A₀ and B₀ are needed to restore the base. Those of a DST start are computed from β; those of
    other starts are stored. A layer that subtracts s·B₀A₀ in its forward ("implicit") always stores
    them. A, B and R are float32, or float64 over a float64 base.
    """

    lora_A: nn.Parameter  # [r, in]
    lora_B: nn.Parameter  # [out, r]
    lora_R: nn.Parameter | None  # [r, r]
    beta: Tensor | None

    def __init__(self, options: AdapterOptions, start: Start, changes_base: bool) -> None:
        super().__init__()
        self.options = options
        # Stored, because every forward reads them.
        self.scaling, self.lora_dropout = options.scaling, options.lora_dropout
        self.residual = options.residual
        lora_R = None if start.lora_R is None else nn.Parameter(start.lora_R)
        self.lora_A = nn.Parameter(start.lora_A, requires_grad=lora_R is None)
        self.lora_B = nn.Parameter(start.lora_B, requires_grad=lora_R is None)
        self.register_parameter("lora_R", lora_R)
        absorbed = changes_base and options.residual == "absorb"
        keep = changes_base and not (absorbed and start.beta is not None)
        start_A = start.lora_A.clone() if lora_R is None else start.right()
        self.register_buffer("start_A", start_A if keep else None)
        self.register_buffer("start_B", start.lora_B.clone() if keep else None)
        self.beta = start.beta if changes_base else None
        # s, if s·B₀A₀ was subtracted from the base's weight.
        self.absorbed_scaling = options.scaling if absorbed else None
        self._weight_norm = start.weight_norm if changes_base else None
        self._rewritten = start.rewritten

    @property
    def r(self) -> int:
        """The rank."""
        return self.options.r

    def load_factors(self, lora_A: Tensor, lora_B: Tensor, lora_R: Tensor | None) -> None:
        """Replaces A [r, in], B [out, r] and R [r, r] by trained ones, which are not copied."""
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.lora_R = None if lora_R is None else nn.Parameter(lora_R)
        self.set_trainable(True)

    def set_trainable(self, trainable: bool) -> None:
        """Sets `requires_grad` of the trained factors: R if there is one, else A and B."""
        self.lora_A.requires_grad_(trainable and self.lora_R is None)
        self.lora_B.requires_grad_(trainable and self.lora_R is None)
        if self.lora_R is not None:
            self.lora_R.requires_grad_(trainable)

    def implicit_start(self) -> tuple[Tensor | None, Tensor | None]:
        """A₀ [r, in] and B₀ [out, r] if the forward subtracts s·B₀A₀, else (None, None)."""
        return (self.start_A, self.start_B) if self.residual == "implicit" else (None, None)

    def add_absorbed_(self, matrix: Tensor) -> None:
        """Adds the start that was absorbed, if one was, to the base's `matrix` [out, in]."""
        if self.absorbed_scaling is None:
            return
        if self.beta is not None:
            subtract_recipe_(matrix, self.beta, self.r, -self.absorbed_scaling)
        elif self.start_A is not None and self.start_B is not None:
            subtract_factors_(matrix, self.start_A, self.start_B, -self.absorbed_scaling)

    @torch.no_grad()
    def merge_factors(self) -> tuple[Tensor, Tensor]:
        """A' [k, in] and B' [out, k], in float32 or wider: the forward adds s·B'A' to W.

        k = r, or 2r if the forward subtracts s·B₀A₀.
        """
        start = self.start_factors() if self.residual == "implicit" else None
        return product_factors(self.lora_A, self.lora_B, self.lora_R, start)

    @torch.no_grad()
    def layer_state(self) -> LayerState:
        """Copies of the adapter's tensors on the CPU, and its numbers.

        If the start rewrote the base (LoftQ), the state describes an adapter of the rewritten base,
        from which nothing is subtracted.
        """

        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", copy=True).contiguous()

        def copied_if_any(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copied(tensor)

        stored = self.beta is None and not self._rewritten
        norm = None if self._rewritten else self._weight_norm
        return LayerState(
            lora_A=copied(self.lora_A),
            lora_B=copied(self.lora_B),
            scaling=self.scaling,
            lora_alpha=self.options.lora_alpha,
            lora_R=copied_if_any(self.lora_R),
            beta=None if self.beta is None else float(self.beta),
            start_A=copied_if_any(self.start_A) if stored else None,
            start_B=copied_if_any(self.start_B) if stored else None,
            residual=self.residual,
            weight_norm=None if norm is None else float(norm),
        )

    def get_extra_state(self) -> Tensor:
        """The numbers that restore the base, in float64, which `.to(dtype)` does not change.

        [s] if initial factors were absorbed, [s, β] if those of a DST start were, [NaN, β] if the
        forward subtracts a DST start, [] otherwise.
        """
        scaling = self.absorbed_scaling
        if scaling is None and self.beta is None:
            return torch.empty(0, dtype=torch.float64)
        state = torch.tensor([math.nan if scaling is None else scaling], dtype=torch.float64)
        if self.beta is None:
            return state
        return torch.cat([state, self.beta.detach().cpu().reshape(1)])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the numbers that `get_extra_state` returned.

        Raises:
            ValueError: the saved adapter has another `residual` than this one, or its initial
                factors were absorbed with another s.

        """
        values = state.detach().cpu().to(torch.float64)
        absorbed = values.numel() > 0 and not math.isnan(float(values[0]))
        scaling = float(values[0]) if absorbed else None
        # If nothing was absorbed, A₀ and B₀ are stored only for a forward that subtracts them.
        saved = "implicit" if scaling is None and self.start_A is not None else "absorb"
        if self.residual != saved and (scaling is not None or self.start_A is not None):
            raise ValueError(
                f"the saved layer has residual={saved!r}, this one {self.residual!r}: the saved "
                "weight and start do not fit this layer; construct it with the same residual"
            )
        if scaling is not None and scaling != self.scaling:
            raise ValueError(
                f"the saved layer absorbed its start with scaling {scaling:g}, this one has "
                f"{self.scaling:g}: construct it with the same r, lora_alpha and scaling rule"
            )
        self.absorbed_scaling = scaling
        self.beta = values[1].clone() if values.numel() > 1 else None
        self._weight_norm = None
