"""`hotswap_adapter`: exchanges an adapter in place, so that compiled graphs remain valid."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ...model.install import unwrapped
from ...model.lora import replace_state
from .folder import read_adapter
from .peft_format.experts.placing import placed


def hotswap_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    residual_base: bool = False,
    expert_order: str = "auto",
) -> None:
    """Overwrites an adapter of the model with the adapter in a folder, in place.

    A model that `torch.compile` compiled is not compiled again. `save_adapter` then saves the new
    adapter, and `requires_grad` does not change. An optimizer keeps the state of the old adapter.

    Args:
        model: a model adapted by `add_lora` or `load_adapter`.
        folder: written by `save_adapter` or PEFT; an adapter of the same layers and ranks.
        adapter_name: the adapter to overwrite, active or not.
        residual_base: see `load_adapter`.
        expert_order: see `load_adapter`.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: see `read_adapter`; the model has no adapter of that name; the new adapter has
            other layers, ranks or fully trained tensors, or a start to subtract where the old one
            has none; or the old adapter's start was subtracted from the weights
            (residual="absorb"). The model is then unchanged.

    """
    state = read_adapter(folder, residual_base=residual_base, expert_order=expert_order)
    replace_state(model, placed(state, unwrapped(model)), adapter_name)
