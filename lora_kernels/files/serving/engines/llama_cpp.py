"""llama.cpp's rules.

They are in `convert_lora_to_gguf.py` (names of tensors; α; the file is float32 unless --outtype
says otherwise), in the classes of `convert_hf_to_gguf.py` (which names a model has) and in
`src/llama-adapter.cpp` and `.h` (s = α / rank of the tensor; norms are ignored), as of October
2026.
"""

from __future__ import annotations

import torch

from ..remedies import GGUF, is_gguf, renaming_of
from ..stored import StoredAdapter, StoredLayer, names_in_brief
from ..updates import number, rank_per_expert, saved_modules
from .experts import refuse_incomplete, refuse_joined_experts
from .model import MISSING, BaseModel
from .verdict import (
    Applied,
    Engine,
    Ignored,
    Verdict,
    fault_of,
    refuse_convolutions,
    refuse_missing,
    refuse_shapes,
)

# llama.cpp applies activated LoRA, and refuses the others by the names of their tensors.
_KNOWN = ("alora_invocation_tokens", "use_dora", "lora_bias", "trainable_token_indices")

# The usual beginnings of names in models from which GGUF files are made.
_USUAL = ("model.layers.", "lm_head")


def judge(adapter: StoredAdapter, base: BaseModel | None) -> Verdict:
    """What llama.cpp does with an adapter that its script has converted."""
    config = adapter.config
    verdict = Verdict.of(adapter)
    verdict.rank = max(rank_per_expert(adapter, layer) for layer in adapter.layers.values())
    refuse_missing(verdict, config, "lora_alpha")
    _tensors(verdict, adapter, base)
    refuse_shapes(verdict, adapter, base)
    alpha = float(number(config, "lora_alpha", 8))
    fault, remedy = fault_of(adapter, base, _KNOWN)
    for name, layer in adapter.layers.items():
        scale = alpha / rank_per_expert(adapter, layer) if alpha else 1.0
        applied = Applied(scale, torch.float32, fault=fault, remedy=remedy)
        verdict.layers[name] = _layer(layer, base, applied)
    _names(verdict, adapter, base)
    if not config.get("base_model_name_or_path"):
        verdict.flags.append("--base <folder with the base's config.json and tokenizer>")
    if base is None:
        verdict.notes.append("names were not compared with a base (--base)")
    verdict.notes.append("applies to convert_lora_to_gguf.py with its default --outtype f32")
    known = base is not None or all(name.startswith(_USUAL) for name in adapter.layers)
    lost = any(isinstance(found, Ignored) for found in verdict.layers.values()) or not known
    tied = any(_is_head(layer) and base is not None and base.is_tied(name)
               for name, layer in adapter.layers.items())  # fmt: skip
    if is_gguf(adapter) and not saved_modules(config) and not lost and not tied:
        verdict.notes.append(f"{GGUF} writes the same format with s folded in")
    return verdict


def _tensors(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    strange = []
    for name in adapter.others:
        if ".base_layer.weight" in name:
            continue
        if "_layernorm" in name or ".norm" in name:
            verdict.dropped[name] = "norms are converted, and passed over when the file is loaded"
        else:
            strange.append(name)
    if strange:
        verdict.refuse(
            f"every tensor must be lora_A, lora_B or a norm; not {names_in_brief(strange)}",
            verdict.merge,
        )
    named = [layer.right.name for layer in adapter.layers.values()
             if layer.style != "lora_A" or layer.adapter]  # fmt: skip
    if named:
        verdict.refuse(
            "names of tensors must contain .lora_A.weight and .lora_B.weight: "
            f"{names_in_brief(named)}",
            verdict.portable,
        )
    refuse_joined_experts(verdict, adapter, base, "tensor")
    refuse_incomplete(verdict, adapter, base, "the script waits for the factors of all experts")
    refuse_convolutions(verdict, adapter)
    if adapter.config.get("fan_in_fan_out"):
        verdict.refuse(
            "layers that are stored transposed (fan_in_fan_out, GPT-2): the script transposes A "
            "and B, too, which do not fit then; square layers load and are wrong",
            verdict.merge,
        )


def _layer(layer: StoredLayer, base: BaseModel | None, applied: Applied) -> Applied | Ignored:
    if base is None or not base.modules:
        return applied
    place = base.place(layer.name)
    if base.is_multimodal and place.kind != MISSING and not base.is_text(place):
        return Ignored("the script converts the text model only")
    if place.kind == MISSING:
        return Ignored("no tensor of the base has this name", place.name)
    return applied


def _names(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Refuses a name that no tensor of the model has: the script or the loading fails."""
    missing = {n: found.name for n, found in verdict.layers.items()
               if isinstance(found, Ignored) and found.reason.startswith("no tensor")}  # fmt: skip
    if missing:
        verdict.refuse(
            f"no tensor of the base has the name of {names_in_brief(missing)}",
            renaming_of(missing),
        )
    heads = [name for name, layer in adapter.layers.items() if _is_head(layer)]
    tied = [None if base is None else base.is_tied(name) for name in heads]
    if any(tied):
        verdict.refuse(
            "the output head cannot be adapted if it is tied to the embedding: lm_head",
            verdict.merge,
        )
    elif None in tied:
        verdict.notes.append("lm_head cannot be adapted if it is tied to the embedding (--base)")


def _is_head(layer: StoredLayer) -> bool:
    return layer.last == "lm_head"


ENGINE = Engine("llama.cpp", "llama.cpp, October 2026", judge)
