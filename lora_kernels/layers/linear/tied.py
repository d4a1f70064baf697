"""`TiedAdapter`: the adapter of an output head, tied to that of the embedding with the same W."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..state import LayerState


def _transposed(name: str) -> Any:
    """A property that is a factor of the embedding's adapter, transposed."""

    def read(adapter: TiedAdapter) -> Tensor | None:
        factor: Tensor | None = getattr(adapter.source, name)
        return None if factor is None else factor.mT

    return property(read)


class TiedAdapter(Adapter):
    """The embedding's adapter as the adapter of a linear layer with the same W [V, D].

    The embedding's update of Wᵀ is s·BA with A [r, V] and B [D, r], so that of W is s·AᵀBᵀ: this
    layer's A is Bᵀ and its B is Aᵀ, with Rᵀ for R, and the initial factors likewise; all else is
    the embedding's. This adapter has no Parameters: the embedding's get the gradients of both
    layers, and a state_dict has them once.
    """

    source: Adapter
    embedding = False
    lora_A = _transposed("lora_B")  # [r, D]
    lora_B = _transposed("lora_A")  # [V, r]
    lora_R = _transposed("lora_R")  # [r, r]
    start_A = _transposed("start_B")  # [r, D]
    start_B = _transposed("start_A")  # [V, r]

    def __init__(self, source: Adapter) -> None:
        super(Adapter, self).__init__()
        object.__setattr__(self, "source", source)  # not a submodule: the embedding has it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "source":
                raise
            return getattr(self.source, name)

    def set_trainable(self, trainable: bool) -> None:
        """Does nothing: the embedding's adapter decides what trains."""

    def check_replaceable(self, state: LayerState) -> None:
        """Raises ValueError: an adapter that is not tied could not be written into this one."""
        raise ValueError(
            "its adapter is tied to the embedding's (ensure_weight_tying): load the new one as a "
            "further adapter, load_adapter(..., adapter_name=...)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        pass
