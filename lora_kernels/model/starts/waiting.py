"""`WaitingAdapter`: an adapter of a layer whose weight is on the meta device, without its start."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..._utils.checks import factor_dtype
from ...init.base import Initializer
from ...init.sharded.layout import fill_
from ...init.start import Start
from ...layers.adapter import Adapter
from ...layers.base import BaseLayer
from ...layers.options import AdapterOptions

_MIDDLES = (("lora_R", "has_R", "an R"), ("lora_diag", "has_diag", "a λ"))
WAITS = "waits for its start: load the weights, then call start_adapters(model)"


def _refused(self: WaitingAdapter, *args: Any, **options: Any) -> NoReturn:
    raise ValueError(f"this adapter {WAITS}")


class WaitingAdapter(Adapter):
    """An `Adapter` whose A, B and R have no values. `start_`, or loading a checkpoint of a started
    adapter, turns it into an `Adapter`. Until then, whatever needs the values raises ValueError.
    """

    _changes_base: bool

    operands = implicit_start = start_factors = merge_factors = layer_state = _refused
    check_replaceable = replace_ = _refused

    @classmethod
    def of(
        cls, base: BaseLayer, options: AdapterOptions, initializer: Initializer
    ) -> WaitingAdapter:
        """The adapter of a layer, for a start by `initializer`."""
        (rows, cols), count, r = base.shape, base.num_experts, options.r
        stack = () if count is None else (count,)

        def empty(*shape: int) -> Tensor:
            dtype = factor_dtype(base.dtype)
            return torch.empty((*stack, *shape), dtype=dtype, device="meta")

        beta = empty() if initializer.has_recipe else None
        lora_R = empty(r, r) if initializer.has_R else None
        lora_diag = empty(r) if initializer.has_diag else None
        start = Start(empty(r, cols), empty(rows, r), beta, lora_R, lora_diag=lora_diag)
        adapter = cls(options, start, initializer.changes_base)
        adapter._changes_base = initializer.changes_base
        adapter._forget_numbers()
        return adapter

    def _forget_numbers(self) -> None:
        self.beta = self.absorbed_scaling = self._weight_norm = None

    @property
    def changes_base(self) -> bool:
        """Whether s·B₀A₀ is to be subtracted from the base."""
        return self._changes_base

    def check_start(self, start: Start) -> None:
        """Raises ValueError if the start has an R or a λ that its initializer does not declare, or
        lacks one that it declares.
        """
        for name, attribute, what in _MIDDLES:
            if (getattr(start, name) is None) != (getattr(self, name) is None):
                raise ValueError(
                    f"the start has {what}, or lacks one, against `{attribute}` of its "
                    "initializer: set that class attribute to what the initializer returns"
                )

    @torch.no_grad()
    def start_(self, start: Start, device: torch.device) -> None:
        """Gives the adapter its start, which is that of the whole weight, on the layer's device."""
        if self.lora_A.is_meta:
            self.to_empty(device=device)
        for name in ("lora_A", "lora_B", "lora_R", "lora_diag"):
            factor, values = getattr(self, name), getattr(start, name)
            if factor is not None:
                fill_(factor, values)
        dtype = self.lora_A.dtype
        self._set_start(start, self._changes_base)
        if self.start_A is not None and self.start_B is not None:
            self.start_A, self.start_B = self.start_A.to(dtype), self.start_B.to(dtype)
        self.__class__ = Adapter  # type: ignore[assignment]

    def wait_again(self) -> None:
        """Undoes `start_`, except for the values of A, B and R."""
        self.__class__ = WaitingAdapter
        self._forget_numbers()

    def get_extra_state(self) -> Tensor:
        """As in an `Adapter`, with an infinite s, which says that there is no start yet."""
        state = super().get_extra_state()
        state[0] = math.inf
        return state

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the numbers of a started adapter; those of a waiting one change nothing."""
        if self._numbers(state)[0] != math.inf:
            super().set_extra_state(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if not saved:
            return  # only the base was loaded: the start is computed from it
        super()._load_from_state_dict(state_dict, prefix, *rest)
        state = state_dict.get(f"{prefix}_extra_state")
        if state is None:
            has_numbers = not self._changes_base
        else:
            has_numbers = self._numbers(state)[0] != math.inf
        factors = {name: p for name, p in self._parameters.items() if p is not None}
        if has_numbers and factors.keys() <= saved and not any(p.is_meta for p in factors.values()):
            self.__class__ = Adapter  # type: ignore[assignment]


def waiting_adapters(module: nn.Module) -> list[WaitingAdapter]:
    """The adapters within a module that wait for their start."""
    return [part for part in module.modules() if isinstance(part, WaitingAdapter)]
