"""The portable form of a PEFT model's adapter (see `lora_kernels.files.adapter.portable`).

All kinds of PEFT's layers take part, also those that have no start here: embeddings; convolutions,
whose B is [out, r / g, 1, 1] with g groups, each of which takes r / g consecutive rows of A; and
the experts of a mixture, whose rank r is a dimension of A [E·r, in], the expert slowest, and of
B [out, r·E], the expert fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from .._utils.peft_names import PREFIX
from .._utils.safetensors import DTYPES, dtype_name
from ..files.adapter.portable import padded, portable_recipe, unscaled, with_bits
from ..files.adapter.recipe import layer_to_dict
from ..files.io.differences import changed, difference
from ..layers.options import lora_scaling
from ..layers.state import LayerState, scaled
from .layers import has_adapter
from .variant import start_of

Parts = tuple[int, int]  # the numbers of experts and of groups
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerFactors:
    """A and B of one layer: their names in the model's state_dict, and that of B's bias if there is
    one; rank and s; the numbers of experts and groups; whether they are those of a linear layer;
    and whether they are there whole, not as shards of DeepSpeed ZeRO-3 or FSDP, which are left as
    they are.
    """

    name: str
    key_A: str
    key_B: str
    key_bias: str | None
    r: int
    scaling: float
    lora_alpha: float
    parts: Parts
    linear: bool
    whole: bool
    start: tuple[Tensor, Tensor] | None

    @property
    def keys(self) -> tuple[str, str, str]:
        """The names of A, B and the bias; "" if there is none."""
        return self.key_A, self.key_B, self.key_bias or ""

    def state(self, tensors: Mapping[str, Tensor]) -> LayerState:
        """The adapter of a linear layer, with the tensors of the state_dict."""
        start_A, start_B = self.start or (None, None)
        return LayerState(
            tensors[self.key_A].detach(),
            tensors[self.key_B].detach(),
            self.scaling,
            self.lora_alpha,
            start_A=start_A,
            start_B=start_B,
            residual="implicit",
            lora_bias=None if self.key_bias is None else tensors[self.key_bias].detach(),
        )

    @torch.no_grad()
    def portable(self, tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
        """A' and s·B' of rank r, and s times the bias of B if there is one, by their names."""
        if not self.whole:
            return {key: tensors[key] for key in (self.key_A, self.key_B)}
        if self.linear:
            right, left = self.state(tensors).portable_factors()
        else:
            right, left = _wide(tensors[self.key_A]), scaled(tensors[self.key_B], self.scaling)
        found = {
            self.key_A: _resized(right, r, self.parts, 0),
            self.key_B: _resized(left, r, self.parts, 1),
        }
        if self.key_bias is not None:
            found[self.key_bias] = scaled(tensors[self.key_bias], self.scaling)
        return found

    def recipe(
        self, tensors: Mapping[str, Tensor], written: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What `layer_from_dict`, or `trained` if the layer is not linear, needs of the layer.
        `written` has what `portable` returned.
        """
        if self.linear:
            state = self.state(tensors)
            if not self.whole:
                return layer_to_dict(state)
            return portable_recipe(state, written[self.key_A], written[self.key_B])
        recipe: dict[str, Any]
        recipe = {"r": self.r, "scaling": self.scaling, "parts": list(self.parts)}
        if not self.whole:
            return recipe
        wanted = {"lora_B": tensors[self.key_B].detach()}
        if self.key_bias is not None:
            wanted["lora_bias"] = tensors[self.key_bias].detach()
        recipe["dtypes"] = {part: dtype_name(tensor.dtype) for part, tensor in wanted.items()}
        got = trained(recipe, *(written.get(key) for key in self.keys))
        return recipe | with_bits({part: difference(wanted[part], got[part]) for part in wanted})


def layer_factors_of(
    peft_model: peft.PeftModel, adapter: str, tensors: Mapping[str, Tensor]
) -> Iterator[LayerFactors]:
    """A and B of every layer that has the adapter, if they are in the state_dict `tensors`."""
    rule = "rslora" if peft_model.peft_config[adapter].use_rslora else "lora"
    for path, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer) or not has_adapter(layer, adapter):
            continue
        embedding = adapter in layer.lora_embedding_A
        form = "{}.lora_embedding_{}.{}" if embedding else "{}.lora_{}.{}.weight"
        key_A, key_B = (form.format(path, half, adapter) for half in "AB")
        if not {key_A, key_B} <= tensors.keys():
            continue
        A, B = tensors[key_A], tensors[key_B]
        bias = f"{path}.lora_B.{adapter}.bias"
        experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
        base = layer.get_base_layer()
        groups = base.groups if isinstance(base, _CONVOLUTIONS) else 1
        r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
        yield LayerFactors(
            name=path.removeprefix(PREFIX),
            key_A=key_A,
            key_B=key_B,
            key_bias=bias if bias in tensors else None,
            r=r,
            scaling=lora_scaling(alpha, r, rule),
            lora_alpha=alpha,
            parts=(experts, groups),
            linear=not embedding
            and A.dim() in (1, 2)  # a shard may be flat
            and not isinstance(layer, ParamWrapper),
            whole=is_whole(A) and is_whole(B),
            start=None if embedding else start_of(layer, adapter),
        )


def is_whole(factor: Tensor) -> bool:
    """Whether a factor is not a shard of DeepSpeed ZeRO-3 or FSDP."""
    return factor.dim() >= 2 and factor.numel() > 0


@torch.no_grad()
def trained(
    recipe: Mapping[str, Any], right: Tensor | None, left: Tensor | None, bias: Tensor | None
) -> dict[str, Tensor]:
    """A, B and, if there is one, its bias, of a layer that is not linear, from A', s·B' and s times
    the bias.
    """
    assert right is not None
    assert left is not None
    r, scaling = recipe["r"], recipe["scaling"]
    parts = (recipe["parts"][0], recipe["parts"][1])
    found = {"lora_B": unscaled(_resized(left, r, parts, 1), scaling)}
    if bias is not None:
        found["lora_bias"] = unscaled(bias, scaling)
    for part, text in recipe.get("bits", {}).items():
        found[part] = changed(found[part].to(DTYPES[recipe["dtypes"][part]]), text)
    return {"lora_A": _resized(right, r, parts, 0), **found}


def _wide(factor: Tensor) -> Tensor:
    return factor.detach().to(torch.promote_types(factor.dtype, torch.float32))


def _resized(factor: Tensor, r: int, parts: Parts, dim: int) -> Tensor:
    """A (`dim` 0) or B (1), of any rank, with rank r: zeros are added or taken away."""
    experts, groups = parts
    if experts > 1:
        # [E, r, in] or [out, r, E]
        split = factor.unflatten(dim, (experts, -1) if dim == 0 else (-1, experts))
        return _filled(split, r, 1).flatten(dim, dim + 1)
    if groups > 1 and dim == 0:
        # [g, r / g, in, ...]
        return _filled(factor.unflatten(0, (groups, -1)), r // groups, 1).flatten(0, 1)
    return _filled(factor, r // groups if dim == 1 else r, dim)


def _filled(factor: Tensor, size: int, dim: int) -> Tensor:
    if factor.shape[dim] >= size:
        return factor.narrow(dim, 0, size)
    return padded(factor, size, dim)
