"""vLLM's rules.

They are in vLLM 0.33.0 in `vllm/lora/`: `peft_helper.py` (the configuration), `lora_model.py` and
`utils.py` (names of tensors), `lora_weights.py` (s is multiplied into B, in the engine's dtype),
`model_manager.py` (a module gets the factors with its whole name, or silently none),
`worker_manager.py`; and in `vllm/config/lora.py` (the rank) and `model.py` (the dtype). Servers run
older releases too. Where releases of early 2026 load an adapter differently, their rule is used:
one s for all layers, no rsLoRA for experts, names of a text model alone match nothing, and whole
modules are refused. A note says what 0.33.0 does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ...adapter.folder import VLLM_RANK, VLLM_RANKS, vllm_limit
from ..remedies import OTHER_BASE, TO_EACH, TO_STACKED, WHOLE, changing_start, start_remedy
from ..stored import EMBEDDING, StoredAdapter, StoredLayer, names_in_brief
from ..updates import (
    experts_of,
    number,
    rank_per_expert,
    saved_modules,
)
from .experts import refuse_incomplete
from .model import MISSING, TEXT, BaseModel
from .verdict import (
    Applied,
    Engine,
    Fault,
    Ignored,
    Verdict,
    refuse_convolutions,
    refuse_missing,
    refuse_shapes,
    residual_fault,
)

_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_HEADS = ("classifier", "score")
# Options that vLLM reads only in order to refuse them.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
}
# Classes that keep their experts in one tensor, as PEFT's target_parameters do.
_JOINED_EXPERTS = (
    "GptOssForCausalLM",
    "InternS1ProForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
# Multimodal classes that do not tell vLLM where their text model is.
_WITHOUT_MAPPING = (
    "BagelForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "WhisperForConditionalGeneration",
)


def judge(adapter: StoredAdapter, base: BaseModel | None) -> Verdict:
    """What vLLM does with an adapter."""
    verdict = Verdict.of(adapter, VLLM_RANKS[-1])
    _options(verdict, adapter.config)
    _ranks(verdict, adapter)
    _tensors(verdict, adapter)
    refuse_shapes(verdict, adapter, base)
    dtype, fault = _dtype(base), residual_fault(adapter, base)
    for name, layer in adapter.layers.items():
        verdict.layers[name] = _layer(adapter, layer, base, dtype, fault)
    _experts(verdict, adapter, base)
    _unknown_names(verdict, adapter, base)
    _notes(verdict, adapter, base)
    return verdict


def _options(verdict: Verdict, config: Mapping[str, Any]) -> None:
    refuse_missing(verdict, config, "r", "lora_alpha")
    if "target_modules" not in config:
        verdict.refuse("adapter_config.json must have target_modules", verdict.portable)
    saved = saved_modules(config)
    strange = [name for name in saved if name not in _HEADS]
    if strange:
        verdict.refuse(
            f"modules_to_save may be classifier and score only, not {names_in_brief(strange)}",
            verdict.merge,
        )
    elif saved:
        verdict.refuse(
            "releases before 0.33.0 refuse modules_to_save; 0.33.0 takes classifier and score: "
            f"{names_in_brief(saved)}",
            f"serve it with 0.33.0; or {verdict.merge}",
        )
    if config.get("bias", "none") != "none":
        verdict.refuse(f"bias must be 'none', not {config['bias']!r}", verdict.merge)
    for option, what in _REFUSED.items():
        if config.get(option):
            verdict.refuse(f"{what} ({option}) is not supported", verdict.merge)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _STARTS:
        verdict.refuse(
            f"init_lora_weights = {start!r} is not supported: PEFT changes the base for it. "
            "Releases before autumn 2026 load it, and are silently wrong on the original model",
            f"{start_remedy(start)}, with init_lora_weights = true in adapter_config.json",
        )


def _ranks(verdict: Verdict, adapter: StoredAdapter) -> None:
    ranks = [rank_per_expert(adapter, layer) for layer in adapter.layers.values()]
    patterns = adapter.config.get("rank_pattern") or {}
    ranks += [int(number(adapter.config, "r", 8))]
    ranks += [int(number(patterns, pattern, None)) for pattern in patterns]
    verdict.rank = max(ranks)
    if verdict.rank > VLLM_RANKS[-1]:
        verdict.refuse(
            f"the rank {verdict.rank} is above {VLLM_RANKS[-1]}, the highest max_lora_rank",
            "lora-kernels convert ADAPTER OUT --compress-to R",
        )
    elif verdict.rank > VLLM_RANK:
        verdict.flags.append(f"--max-lora-rank {vllm_limit(verdict.rank)}")


def _tensors(verdict: Verdict, adapter: StoredAdapter) -> None:
    """Refuses tensors whose names vLLM cannot parse."""
    base_copies = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    heads = tuple(f"{head}.{kind}" for head in _HEADS for kind in ("weight", "bias"))
    strange = [name for name in adapter.others if not name.endswith((*base_copies, *heads))]
    if strange:
        verdict.refuse(
            "every tensor must be lora_A or lora_B of a layer; the file also has "
            f"{names_in_brief(strange)}",
            verdict.merge,
        )
    named = [n for n, layer in adapter.layers.items() if layer.adapter or layer.style != "lora_A"]
    if named:
        layer = adapter.layers[named[0]]
        verdict.refuse(
            "names of tensors must end in lora_A.weight and lora_B.weight; the file has "
            f"{layer.right.name}",
            verdict.portable,
        )
    refuse_convolutions(verdict, adapter)


def _scale(config: Mapping[str, Any], layer: StoredLayer) -> float:
    """α / r, or with rsLoRA α / √r except for experts; patterns are ignored."""
    alpha, r = number(config, "lora_alpha", 8), number(config, "r", 8)
    rslora = config.get("use_rslora") and ".experts" not in layer.name
    return alpha / math.sqrt(r) if rslora else alpha / r


def _dtype(base: BaseModel | None) -> torch.dtype:
    """The base's dtype; vLLM serves float32 as bfloat16."""
    dtype = None if base is None else base.dtype
    return torch.float16 if dtype is torch.float16 else torch.bfloat16


def _layer(
    adapter: StoredAdapter,
    layer: StoredLayer,
    base: BaseModel | None,
    dtype: torch.dtype,
    fault: Fault,
) -> Applied | Ignored:
    scale = _scale(adapter.config, layer)
    applied = Applied(scale, dtype, folded=True, fault=fault.reason, remedy=fault.remedy)
    if base is None or not base.modules:
        return applied
    place = base.place(layer.name)
    if place.kind == MISSING:
        return Ignored("no module has this name", place.name)
    if place.kind == TEXT:
        return Ignored("the name is that of the text model alone, which the served class has "
                       "inside another module", place.name)  # fmt: skip
    if base.is_multimodal and not base.is_text(place):
        return Ignored("adapters of other parts than the text model need "
                       "--enable-tower-connector-lora",
                       remedy="start the server with --enable-tower-connector-lora, where the "
                       "class has it")  # fmt: skip
    return applied


def _unknown_names(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Refuses a last part that no linear layer's name has; a wrong beginning is not refused."""
    if base is None or not base.modules:
        return
    strange = [
        name
        for name, found in verdict.layers.items()
        if isinstance(found, Ignored)
        and ".experts" not in name
        and adapter.layers[name].last not in base.linear_names
    ]
    if strange:
        ends = sorted({adapter.layers[name].last for name in strange})
        verdict.refuse(
            f"no linear layer of the base is called {', '.join(ends)}: {names_in_brief(strange)}",
            OTHER_BASE,
        )


def _experts(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    classes = set() if base is None else set(base.classes)
    split = any(re.search(r"\.experts\.\d+\.", name) for name in adapter.layers)
    refuse_incomplete(verdict, adapter, base, "vLLM stacks the factors of all experts")
    if split and classes & set(_JOINED_EXPERTS):
        verdict.flags.append("--enable-mixed-moe-lora-format")
        verdict.notes.append(f"without the option for a pair of each expert: {TO_STACKED}")
    joined = {n for n, layer in adapter.layers.items() if experts_of(adapter, layer) > 1}
    if not joined:
        return
    halves = {n for n in joined if n.endswith(".base_layer")}
    alone = [n for n in joined - halves if f"{n}.base_layer" not in halves]
    alone += [n for n in halves if n.removesuffix(".base_layer") not in joined]
    if alone:
        verdict.refuse(
            "of experts in one tensor, gate_up_proj and down_proj must both be adapted: "
            f"{names_in_brief(sorted(alone))}",
            WHOLE,
        )
    if base is None:
        verdict.notes.append(
            "experts in one tensor are loaded for models that keep them so "
            f"({', '.join(_JOINED_EXPERTS)}); others need --enable-mixed-moe-lora-format and "
            f"is_3d_lora_weight in the request, or {TO_EACH}"
        )
    elif not classes & set(_JOINED_EXPERTS):
        verdict.flags.append(
            "--enable-mixed-moe-lora-format (and is_3d_lora_weight in the request)"
        )
        verdict.notes.append(f"without the option for experts in one tensor: {TO_EACH}")


def _notes(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    config = adapter.config
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        verdict.notes.append(
            "0.33.0 reads rank_pattern and alpha_pattern, earlier releases ignore them: one s for "
            f"all layers. {verdict.portable}"
        )
    if config.get("use_rslora") and any(".experts" in name for name in adapter.layers):
        verdict.notes.append(
            "0.33.0 reads use_rslora for experts, releases before September 2026 ignore it (issue "
            f"55545): √r times too weak. {verdict.portable}"
        )
    if changing_start(config) and not verdict.refusals:
        verdict.notes.append("it is loaded, and wrong unless the changed base is served")
    others = [n for n, layer in adapter.layers.items() if layer.kind == EMBEDDING
              and layer.last not in ("embed_tokens", "lm_head")]  # fmt: skip
    if others:
        verdict.notes.append(
            "of embeddings, most classes adapt embed_tokens only: try whether "
            f"{names_in_brief(others)} loads"
        )
    if base is None:
        verdict.notes.append(
            "names were not compared with a base (--base): a layer whose name is not that of the "
            "served class is silently left out"
        )
        return
    texts = [n for n in adapter.layers if base.modules and base.place(n).kind == TEXT]
    if texts and not any(c in _WITHOUT_MAPPING for c in base.classes):
        verdict.notes.append(
            f"0.33.0 finds {base.classes[0]}'s text model by names such as {texts[0]}; earlier "
            "releases silently leave these layers out (issues 34186, 48019)"
        )


ENGINE = Engine("vllm", "vLLM 0.33.0 and earlier in 2026", judge)
