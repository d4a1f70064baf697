"""The portable form of a PEFT model's adapter (see `lora_kernels.files.adapter.portable`).

The portable form covers all kinds of PEFT's layers: linear layers and embeddings; the experts of a
mixture, where the expert varies slowest in the rows of A [E·r, in] and fastest in the columns of
B [out, r·E]; and layers that get no start here: matrices among `target_parameters`, and
convolutions. With g groups, a convolution's B is [out, r / g, 1, 1], and each group uses r / g
consecutive rows of A.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ..._utils.peft_names import PREFIX
from ..._utils.safetensors import DTYPES, dtype_name
from ...files.adapter.peft_format.experts.layouts import STACKED, stacked, unstacked
from ...files.adapter.portable import padded, portable_recipe, unscaled, with_bits
from ...files.adapter.recipe import EXPERTS, TENSORS, experts_to_json, parts_to_json
from ...files.io.differences import changed, difference
from ...layers.options import lora_scaling
from ...layers.state import LayerState, scaled
from ...model.config import ExpertPart, StoredExperts
from ..layers import has_adapter, pattern_name
from ..variant import start_of

Parts = tuple[int, int]  # the numbers of experts and of groups
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerFactors:
    """A and B of one layer, and what the portable form needs of the layer.

    Attributes:
        name: the layer's name in the base model.
        key_A: the name of A in the model's state_dict.
        key_B: the name of B there.
        key_bias: the name of B's bias there; None if there is none.
        r: the rank.
        scaling: s.
        lora_alpha: α.
        parts: the numbers of experts and of groups.
        linear: whether A and B are matrices, as those of a linear layer or embedding.
        parameter: the name of the experts' 3-D parameter; None for other layers.
        whole: False for shards of DeepSpeed ZeRO-3 or FSDP, which are written as they are.
        start: A₀ and B₀; None if nothing is subtracted.
        embedding: whether the layer is an embedding.
        key_magnitude: the name of DoRA's magnitudes in the state_dict; None if there are none.

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
    parameter: str | None
    whole: bool
    start: tuple[Tensor, Tensor] | None
    embedding: bool = False
    key_magnitude: str | None = None

    @property
    def keys(self) -> tuple[str, str, str]:
        """The names of A, B and B's bias; "" if there is no bias."""
        return self.key_A, self.key_B, self.key_bias or ""

    @property
    def recipe_name(self) -> str:
        """The layer's name in the recipe; for experts, the name of their parameter."""
        return self.parameter or self.name

    def state(self, tensors: Mapping[str, Tensor]) -> LayerState:
        """The adapter of a linear layer or of experts, with the tensors of the state_dict."""
        lora_A, lora_B = tensors[self.key_A].detach(), tensors[self.key_B].detach()
        start_A, start_B = self.start or (None, None)
        if self.parameter is not None:
            lora_A, lora_B = unstacked(lora_A, lora_B, self.parts[0])
            if start_A is not None and start_B is not None:
                start_A, start_B = unstacked(start_A, start_B, self.parts[0])
        return LayerState(
            lora_A,
            lora_B,
            self.scaling,
            self.lora_alpha,
            start_A=start_A,
            start_B=start_B,
            residual="implicit",
            lora_bias=None if self.key_bias is None else tensors[self.key_bias].detach(),
            embedding=self.embedding,
            lora_magnitude=None
            if self.key_magnitude is None
            else tensors[self.key_magnitude].detach(),
        )

    @torch.no_grad()
    def portable(self, tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
        """{name: tensor} of A' and s·B' at rank r, and of s times B's bias if there is one."""
        if not self.whole:
            return {key: tensors[key] for key in (self.key_A, self.key_B)}
        if self.parameter is not None:
            right, left = stacked(*self.state(tensors).portable_factors())
        elif self.linear:
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
        """The recipe from which `layer_from_dict` restores the layer, or `trained` if the layer is
        neither linear nor one of experts. `written` is the result of `portable`.
        """
        recipe: dict[str, Any] = {"r": self.r, "scaling": self.scaling, "parts": list(self.parts)}
        if not self.whole:  # a shard cannot be read again
            return recipe
        pair = written[self.key_A], written[self.key_B]
        if self.parameter is not None:
            pair = unstacked(*pair, self.parts[0])
        if self.linear or self.parameter is not None:
            return portable_recipe(self.state(tensors), *pair)
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
        magnitude = f"{path}.lora_magnitude_vector.{adapter}.weight"
        experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
        base = layer.get_base_layer()
        groups = base.groups if isinstance(base, _CONVOLUTIONS) else 1
        r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
        name, start = path.removeprefix(PREFIX), start_of(layer, adapter)
        whole = is_whole(A) and is_whole(B)
        stack = isinstance(layer, ParamWrapper) and (start or layer.get_param().dim() == 3)
        yield LayerFactors(
            name=name,
            key_A=key_A,
            key_B=key_B,
            key_bias=bias if bias in tensors else None,
            r=r,
            scaling=lora_scaling(alpha, r, rule),
            lora_alpha=alpha,
            parts=(experts, groups),
            # A shard may be flat.
            linear=A.dim() in (1, 2) and not isinstance(layer, ParamWrapper),
            parameter=pattern_name(name, layer) if stack and whole else None,
            whole=whole,
            start=start,
            embedding=embedding,
            key_magnitude=magnitude if magnitude in tensors else None,
        )


def is_whole(factor: Tensor) -> bool:
    """Whether a factor is not a shard of DeepSpeed ZeRO-3 or FSDP."""
    return factor.dim() >= 2 and factor.numel() > 0


def expert_entries(
    pairs: Iterable[LayerFactors], written: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """The entries of a recipe that say which tensors of the file hold experts' parameters; {} if
    none do. `written` is the result of `portable`.
    """
    parts = {
        pair.parameter: (ExpertPart(pair.name, 0, len(written[pair.key_B])),)
        for pair in pairs
        if pair.parameter is not None
    }
    stored = {name: StoredExperts((), STACKED) for name in parts}
    return {EXPERTS: experts_to_json(stored), TENSORS: parts_to_json(parts)} if parts else {}


@torch.no_grad()
def trained(
    recipe: Mapping[str, Any], right: Tensor | None, left: Tensor | None, bias: Tensor | None
) -> dict[str, Tensor]:
    """A, B and, if there is one, B's bias of a layer that is not linear, from A', s·B' and s times
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
    """A (`dim` 0) or B (`dim` 1) of any rank, with zeros added or removed to get rank r."""
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
