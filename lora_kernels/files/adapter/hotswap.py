"""`hotswap_adapter`: exchanges an adapter in place, which keeps compiled graphs."""

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
    """Overwrites an adapter of the model by the one in a folder, in place.

    A model compiled by `torch.compile` is not compiled again. `save_adapter` then saves the new
    adapter, and `requires_grad` does not change. An optimizer's state is still that of the old one.

    Args:
        model: a model adapted by `add_lora` or `load_adapter`.
        folder: written by `save_adapter` or PEFT; an adapter of the same layers and ranks.
        adapter_name: the adapter to overwrite; active or not.
        residual_base: as for `load_adapter`.
        expert_order: as for `load_adapter`.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: as `read_adapter`; the model has no adapter of that name; the new adapter has
            other layers, ranks or tensors trained in full, or a start to subtract where the old one
            has none; or the old one's start was subtracted from the weights (residual="absorb").
            The model is then unchanged.

    """
    state = read_adapter(folder, residual_base=residual_base, expert_order=expert_order)
    replace_state(model, placed(state, unwrapped(model)), adapter_name)
