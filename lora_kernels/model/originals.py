"""`OriginalWeights`: the weights of a quantized model before quantization, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from .._utils.checks import check_weight
from .._utils.errors import did_you_mean
from .._utils.model_files import stored_tensors
from ..layers.base import BaseLayer


def _given(tensor: Tensor) -> Tensor:
    return tensor


class OriginalWeights:
    """Weights by layer name, from a dict {name: tensor}, such as a state_dict, or from a checkpoint
    (a safetensors file or its folder), whose tensors are read one at a time.

    Raises:
        ValueError, FileNotFoundError: there is no such checkpoint, or it is damaged.
        TypeError: `source` is neither a dict nor a path.

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
        """The original W [out, in] of the layer `name`.

        The stored name may have another prefix or none, as in a checkpoint without the model's
        head, if exactly one stored name matches.

        Raises:
            ValueError: no stored name matches, or several do, or the shape differs.
            TypeError: the tensor is not floating-point.

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
        """The stored name of the weight of the layer `name`.

        Raises:
            ValueError: no stored name matches, or several do.

        """
        for key in (f"{name}.weight", name):
            if key in self._loaders:
                return key
        wanted = f".{name}.weight"
        near = [k for k in self._loaders if wanted.endswith(f".{k}") or f".{k}".endswith(wanted)]
        if len(near) == 1:
            return near[0]
        if near:
            raise ValueError(f"several original weights match {name!r}: {', '.join(near)}")
        hint = did_you_mean(f"{name}.weight", self._loaders)
        raise ValueError(f"original_weights has no weight of {name!r}{hint}")
