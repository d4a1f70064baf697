"""The rules of diffusers' `load_lora_weights` and `load_lora_adapter`.

They are in diffusers 0.42.1 in `loaders/peft.py`, `loaders/lora_base.py`,
`loaders/lora_pipeline.py`, `loaders/lora_conversion_utils.py` (kohya's names) and
`utils/peft_utils.py` (`get_peft_kwargs`: ranks and α from the tensors). PEFT applies the layers,
cast to the base's dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ...adapter.content import COMPONENTS
from ..stored import KOHYA, PEFT, StoredAdapter, StoredLayer, names_in_brief
from ..updates import alpha_of, option_name, options_of, rank_of, scale_of
from .model import BaseModel
from .verdict import Applied, Engine, Ignored, Verdict, residual_fault

# The models of Stable Diffusion, whose pipelines read α only from kohya's files.
_STABLE_DIFFUSION = ("unet", "text_encoder", "text_encoder_2")
_DROPPED_ALPHA = (
    "Stable Diffusion's pipelines drop the tensors <layer>.alpha, except those of kohya's files"
)
_FOLD_ALPHA = (
    "multiply <layer>.lora_B.weight by <layer>.alpha / rank and delete <layer>.alpha; or save the "
    "adapter with save_lora_weights, which writes lora_adapter_metadata"
)
_RENAME = "rename its tensors to <component>.<layer>.lora_A.weight, with one of the components " + (
    ", ".join(COMPONENTS[:4]) + " ..."
)


def judge(adapter: StoredAdapter, base: BaseModel | None) -> Verdict:
    """What a pipeline of diffusers does with an adapter."""
    verdict = Verdict.of(adapter)
    verdict.rank = max(layer.rank for layer in adapter.layers.values())
    if adapter.kind != PEFT:  # `lora-kernels` cannot read these files
        verdict.portable = _FOLD_ALPHA
        verdict.merge = "merge it into the model with the program that trained it"
    kohya = all(name.startswith(tuple(KOHYA)) for name in adapter.layers)
    _tensors(verdict, adapter, kohya)
    dtype = torch.bfloat16 if base is None or base.dtype is None else base.dtype
    _ranks(verdict, adapter)
    drops = not kohya and adapter.components is None and _is_stable_diffusion(adapter)
    scales = _scales(verdict, adapter, drops)
    fault, remedy = residual_fault(adapter, base)
    for name, layer in adapter.layers.items():
        if adapter.kind == PEFT and layer.prefixed:
            verdict.layers[name] = Ignored(
                "names must begin with a component of the pipeline", f"unet.{name}", _RENAME
            )
        elif not layer.component:
            verdict.layers[name] = Ignored(
                "its name begins with no component that is known here; some pipelines rename it",
                remedy=_RENAME,
            )
        else:
            changed = drops and layer.alpha is not None
            verdict.layers[name] = Applied(
                scales[name], dtype, fault=fault, remedy=remedy or (_FOLD_ALPHA if changed else "")
            )
    if adapter.kind == PEFT and any(layer.prefixed for layer in adapter.layers.values()):
        verdict.notes.append("a warning, and no error, says that nothing was loaded")
    if drops and _alphas(adapter):
        verdict.notes.append(_DROPPED_ALPHA)
    verdict.notes.append("names were not compared with a pipeline's models")
    return verdict


def _tensors(verdict: Verdict, adapter: StoredAdapter, kohya: bool) -> None:
    dora = [name for name in adapter.others if name.endswith(".dora_scale")]
    for name in dora:
        verdict.dropped[name] = "DoRA of kohya's files is left out"
    rest = [name for name in adapter.others if name not in dora]
    if kohya and rest:
        verdict.refuse(
            f"every tensor must be lora_down, lora_up or alpha; not {names_in_brief(rest)}",
            "delete them, or convert the adapter with the program that wrote it",
        )
    elif not kohya:
        strange = [name for name in rest if "lora" not in name and not name.endswith(".alpha")]
        if strange:
            verdict.refuse(
                'all names must contain "lora" (Invalid LoRA checkpoint): '
                f"{names_in_brief(strange)}",
                "delete these tensors",
            )
    if adapter.damaged:
        verdict.refuse(
            "lora_adapter_metadata in the file's header is not JSON",
            "save the adapter again with save_lora_weights, or delete the entry of the header",
        )
    if adapter.components is not None and any(n.endswith(".alpha") for n in _alphas(adapter)):
        verdict.refuse(
            "a file has either lora_adapter_metadata in its header or tensors <layer>.alpha",
            "delete one of the two",
        )


def _ranks(verdict: Verdict, adapter: StoredAdapter) -> None:
    """Refuses tensors whose ranks differ from those in the options."""
    other = []
    for name, layer in adapter.layers.items():
        options = options_of(adapter, layer)
        r = layer.rank if options is None else rank_of(options, option_name(options, layer))
        if layer.rank != r:
            other.append(f"{name} has {layer.rank} instead of {r}")
    if other:
        verdict.refuse(
            f"the tensors must have the ranks of the options: {names_in_brief(other)}",
            "correct r and rank_pattern, in the file's header or in adapter_config.json",
        )


def _is_stable_diffusion(adapter: StoredAdapter) -> bool:
    components = {layer.component for layer in adapter.layers.values()}
    return adapter.kind != PEFT and components <= {*_STABLE_DIFFUSION, ""}


def _alphas(adapter: StoredAdapter) -> list[str]:
    return [layer.alpha.name for layer in adapter.layers.values() if layer.alpha is not None]


def _scales(verdict: Verdict, adapter: StoredAdapter, drops: bool) -> dict[str, float]:
    """s of each layer: from the header's options; or α / r, with the most frequent α for a layer
    without α; 1 if the pipeline drops α.
    """
    if adapter.kind == PEFT:
        config = adapter.config
        return {n: scale_of(config, option_name(config, layer))
                for n, layer in adapter.layers.items()}  # fmt: skip
    if drops:
        return dict.fromkeys(adapter.layers, 1.0)
    found: dict[str, float] = {}
    by_component: dict[str, list[StoredLayer]] = {}
    for layer in adapter.layers.values():
        by_component.setdefault(layer.component, []).append(layer)
    for layers in by_component.values():
        found |= _scales_of_component(adapter, layers)
    ranks = {layer.rank for layer in adapter.layers.values()}
    if adapter.components is None and not _alphas(adapter) and len(ranks) > 1:
        verdict.notes.append(
            "before August 2026 (pull request 14409), layers of another rank than the first had "
            "another strength; now α = rank"
        )
    return found


def _scales_of_component(adapter: StoredAdapter, layers: list[StoredLayer]) -> Mapping[str, float]:
    options = options_of(adapter, layers[0])
    if options is not None:
        return {layer.name: scale_of(options, option_name(options, layer)) for layer in layers}
    alphas = {layer.name: alpha_of(layer, 0.0) for layer in layers if layer.alpha is not None}
    if not alphas:
        return {layer.name: 1.0 for layer in layers}
    common = Counter(alphas.values()).most_common()[0][0]
    return {layer.name: alphas.get(layer.name, common) / layer.rank for layer in layers}


ENGINE = Engine("diffusers", "diffusers 0.42.1", judge)
