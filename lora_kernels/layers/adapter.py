"""`Adapter`: the trained factors of one adapter of one layer, and what gives the base back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..init.start import Start
from .options import AdapterOptions
from .state import LayerState, dst_start


class Adapter(nn.Module):
    """A [r, in], B [out, r] and, for some starts, R [r, r]; s; and the start that was taken out.

    A part of a layer, or beside it if the layer has several.
    """

    def _begin(self, options: AdapterOptions, start: Start, changes_base: bool) -> None:
        """Takes the options and the factors over.

        What gives the base back is β, or else the factors; a layer that subtracts its start keeps
        them in any case.
        """
        self.r, self.lora_alpha = options.r, options.lora_alpha
        self.scaling, self.scaling_rule = options.scaling, options.scaling_rule
        self.use_rslora = options.scaling_rule == "rslora"
        self.lora_dropout = options.lora_dropout
        self.residual = options.residual
        has_R = start.lora_R is not None
        self.lora_A = nn.Parameter(start.lora_A, requires_grad=not has_R)
        self.lora_B = nn.Parameter(start.lora_B, requires_grad=not has_R)
        self.register_parameter("lora_R", nn.Parameter(start.lora_R) if has_R else None)
        absorbed = changes_base and self.residual == "absorb"
        keep = changes_base and not (absorbed and start.beta is not None)
        start_A = start.right() if has_R else start.lora_A.clone()
        self.register_buffer("start_A", start_A if keep else None)
        self.register_buffer("start_B", start.lora_B.clone() if keep else None)
        self._beta = start.beta if changes_base else None
        self._absorbed_scaling = self.scaling if absorbed else None
        self._weight_norm = start.weight_norm if changes_base else None
        self._rewritten = start.rewritten

    def load_factors(self, lora_A: Tensor, lora_B: Tensor, lora_R: Tensor | None) -> None:
        """Puts trained factors in the place of the start's; they are taken over."""
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.lora_R = None if lora_R is None else nn.Parameter(lora_R)
        self.set_trainable(True)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A, B and R."""
        factors = (self.lora_A, self.lora_B, self.lora_R)
        return [factor for factor in factors if factor is not None]

    def set_trainable(self, trainable: bool) -> None:
        """`requires_grad` of what this adapter trains: R if there is one, else A and B."""
        self.lora_A.requires_grad_(trainable and self.lora_R is None)
        self.lora_B.requires_grad_(trainable and self.lora_R is None)
        if self.lora_R is not None:
            self.lora_R.requires_grad_(trainable)

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
        if self._beta is None:
            return None
        return dst_start(self.lora_A, self.lora_B, self._beta)

    @torch.no_grad()
    def layer_state(self) -> LayerState:
        """Copies of the adapter's tensors on the CPU, and its numbers.

        Of a base that was rewritten, LoftQ's, it is the adapter of what that base is now: nothing
        is taken out of it.
        """

        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to("cpu", copy=True).contiguous()

        recipe, kept = self._beta is not None, not self._rewritten
        norm = self._weight_norm if kept else None
        return LayerState(
            lora_A=copied(self.lora_A),
            lora_B=copied(self.lora_B),
            scaling=self.scaling,
            lora_alpha=self.lora_alpha,
            lora_R=copied(self.lora_R),
            beta=float(self._beta) if recipe else None,
            start_A=copied(self.start_A) if kept and not recipe else None,
            start_B=copied(self.start_B) if kept and not recipe else None,
            residual=self.residual,
            weight_norm=None if norm is None else float(norm),
        )

    def get_extra_state(self) -> Tensor:
        """What gives the base back beside the factors, float64 and not touched by `.to(dtype)`: [s]
        if a start was absorbed, [s, β] if it is a DST start, [NaN, β] if a DST start is subtracted,
        [] otherwise.
        """
        scaling = self._absorbed_scaling
        if scaling is None and self._beta is None:
            return torch.empty(0, dtype=torch.float64)
        state = torch.tensor([math.nan if scaling is None else scaling], dtype=torch.float64)
        if self._beta is None:
            return state
        return torch.cat([state, self._beta.detach().cpu().reshape(1)])

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` gave.

        Raises:
            ValueError: if it was absorbed with another s than this layer's, or if one of the two
                absorbed its start and the other subtracts it.

        """
        values = state.detach().cpu().to(torch.float64)
        absorbed = values.numel() > 0 and not math.isnan(float(values[0]))
        scaling = float(values[0]) if absorbed else None
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
        self._beta = values[1].clone() if values.numel() > 1 else None
        self._weight_norm = None


def stand_alone(options: AdapterOptions, start: Start, changes_base: bool) -> Adapter:
    """An adapter that is no layer itself: one more of a layer that has one."""
    adapter = Adapter()
    adapter._begin(options, start, changes_base)
    return adapter
