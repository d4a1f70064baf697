"""The weights that a quantized model was made from, one at a time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from .._utils.checks import check_weight
from .._utils.safetensors import stored_tensors
from ..layers.base import BaseLayer


def _given(tensor: Tensor) -> Tensor:
    return tensor


class OriginalWeights:
    """Weights by the names of their layers: of a dict {name: tensor}, which may be a state_dict,
    or of the safetensors file or folder of a checkpoint, of which one tensor at a time is read.

    Raises:
        ValueError, FileNotFoundError: there is no such checkpoint, or it is damaged.
        TypeError: neither a dict nor a path.

    """

    def __init__(self, source: Mapping[str, Tensor] | str | Path) -> None:
        self._loaders: dict[str, Callable[[], Tensor]]
        if isinstance(source, Mapping):
            self._loaders = {name: partial(_given, tensor) for name, tensor in source.items()}
        elif isinstance(source, (str, Path)):
            self._loaders = {tensor.name: tensor.load for tensor in stored_tensors(Path(source))}
        else:
            raise TypeError(
                "original_weights must be a dict of tensors or the path of a checkpoint, got "
                f"{type(source).__name__}"
            )

    def weight(self, name: str, base: BaseLayer) -> Tensor:
        """W [out, in] that the layer of that name was made from.

        Names may lack a prefix or have another one, as those of a model without its head do, if
        only one is left that ends the same.

        Raises:
            ValueError: there is none, or several, or it has another shape.
            TypeError: it is no float tensor.

        """
        key = self.find(name)
        weight = self._loaders[key]()
        check_weight(weight, key)
        weight = weight.T if base.transposed else weight
        if tuple(weight.shape) != base.shape:
            raise ValueError(
                f"the original weight {key!r} is {list(weight.shape)}, the layer {name!r} is "
                f"{list(base.shape)}"
            )
        return weight

    def find(self, name: str) -> str:
        """What the weight of the layer of that name is called here."""
        for key in (f"{name}.weight", name):
            if key in self._loaders:
                return key
        wanted = f".{name}.weight"
        near = [k for k in self._loaders if wanted.endswith(f".{k}") or f".{k}".endswith(wanted)]
        if len(near) == 1:
            return near[0]
        if near:
            raise ValueError(f"several original weights may be {name!r}'s: {', '.join(near)}")
        close = difflib.get_close_matches(f"{name}.weight", self._loaders, n=1)
        hint = f"; the nearest is {close[0]!r}" if close else ""
        raise ValueError(f"original_weights has no weight of {name!r}{hint}")
