"""Base weights in a PEFT file, of layers that the file's adapter adapts."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ...init.sharded.zero3 import is_zero3
from ...layers.adapted import AdaptedLayer
from ...layers.linear import AdaptedFloatLayer
from ..config import AdapterState
from .saved_modules import known_places
from .sharded.copies import holds


def settled_weights(model: nn.Module, state: AdapterState) -> AdapterState:
    """The adapter without those weights of its layers that equal the model's weights.

    PEFT stores the weights of adapted embeddings and heads (`save_embedding_layers`), because the
    vocabulary may have been resized. If it was, the stored rows differ from the model's, and
    modules that are tied to such a layer get its stored weight too.
    """
    own = [name for name in state.extra if _owner(name) in state.layers]
    own = [name for name in own if name.endswith(".weight")]
    if not own:
        return state
    places, extra = known_places(model), dict(state.extra)
    for name in own:
        module, key = places.get(name, (model, ""))
        here = original_weight(module) if key else None
        if here is None:  # a later check raises the error
            continue
        if holds(here, extra[name]):
            del extra[name]
            continue
        shared = getattr(module, key)
        tied = [n for n, (other, k) in places.items() if getattr(other, k) is shared]
        extra = dict.fromkeys(tied, extra[name]) | extra
    return replace(state, extra=extra)


def original_weight(module: nn.Module) -> Tensor | None:
    """The stored weight of a layer before it was adapted; None if the layer has no weight of its
    own. A sharded weight stays sharded, except that all processes gather ZeRO-3's parts into a
    copy.
    """
    if isinstance(module, AdaptedFloatLayer):
        weight = module.base_weight().detach()
        return weight.T if module.transposed else weight
    found = None if isinstance(module, AdaptedLayer) else getattr(module, "weight", None)
    if isinstance(found, Tensor):
        return found if is_zero3(found) else found.detach()
    return None


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
