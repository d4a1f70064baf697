"""SGLang's rules.

They are in SGLang 0.5.23 in `python/sglang/srt/lora/`: `lora_config.py`, `lora_manager.py`
(`validate_new_adapter`, `init_lora_shapes`), `lora.py` (s = α / r; q, k, v and gate, up are
joined), `mem_pool.py` (shapes; the buffers have the model's dtype), `utils.py` (target modules;
tensors are assigned by the number of the layer and by a part of their name),
`layers/utils/common.py` (that number); and in `srt/configs/model_config.py` (the dtype). The
refusal of patterns is in the source after 0.5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...._utils.model_files import read_json
from ..remedies import OTHER_BASE
from ..stored import StoredAdapter, StoredLayer, names_in_brief
from ..updates import experts_of, number
from .experts import to_each
from .model import MISSING, BaseModel
from .verdict import (
    Applied,
    Engine,
    Ignored,
    Verdict,
    fault_of,
    note_other_files,
    refuse_convolutions,
    refuse_missing,
    refuse_shapes,
)

_BLOCK = re.compile(r"layers\.(\d+)\.")
_EMBEDDINGS = ("embed_tokens", "lm_head")
# SGLang's names for the target modules.
_TARGETS = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "vocab_emb": "embed_tokens",
    "embeddings": "embed_tokens",
    "word_embeddings": "embed_tokens",
    "output": "lm_head",
    "unembed_tokens": "lm_head",
}
_EXPERT_WORDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# SGLang's loader has no module names for them (pull requests 25528, 27381, not merged).
_JOINED = (
    "of experts in one tensor (target_parameters) no name is a module's: they are left out without "
    "an error, unless the server has --lora-strict-loading"
)
_ADDED_TOKENS = "added_tokens.json"


def judge(adapter: StoredAdapter, base: BaseModel | None) -> Verdict:
    """What SGLang does with an adapter."""
    config = adapter.config
    verdict = Verdict.of(adapter)
    verdict.rank = int(number(config, "r", 8))
    refuse_missing(verdict, config, "r", "lora_alpha")
    targets = _targets(verdict, config)
    _options(verdict, adapter, base)
    _tensors(verdict, adapter)
    refuse_shapes(verdict, adapter, base)
    scale = number(config, "lora_alpha", 8) / number(config, "r", 8)
    fault, remedy = fault_of(adapter, base, _REFUSED)
    dtype = _dtype(base)
    for name, layer in adapter.layers.items():
        applied = Applied(scale, dtype, fault=fault, remedy=remedy)
        if experts_of(adapter, layer) > 1:
            verdict.layers[name] = Ignored(_JOINED, remedy=to_each(verdict, base))
        else:
            verdict.layers[name] = _layer(verdict, layer, targets, base, applied)
    _targeted(verdict, adapter, targets)
    _joined(verdict, adapter)
    _blocks(verdict, adapter, base)
    verdict.dropped.update({name: "tensors outside the blocks are not loaded"
                            for name in adapter.saved if not _BLOCK.search(name)})  # fmt: skip
    verdict.notes.append(
        f"adapters that are loaded later need --max-lora-rank {verdict.rank} or more, and their "
        "modules in --lora-target-modules, when the server starts"
    )
    note_other_files(verdict, adapter)
    if base is None:
        verdict.notes.append("names were not compared with a base (--base)")
    return verdict


_REFUSED = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices")


def _targets(verdict: Verdict, config: Mapping[str, Any]) -> set[str] | None:
    """SGLang's names for the target modules; None for all modules."""
    targets = config.get("target_modules")
    if targets in ("all", "all-linear"):
        return None
    if isinstance(targets, list) and targets:
        ends = [str(target).rpartition(".")[2] for target in targets]
        return {_TARGETS.get(end, end) for end in ends}
    verdict.refuse(
        "target_modules must be a list of names, or 'all-linear'; a regular expression is not "
        f"understood, it is {targets!r}",
        verdict.portable,
    )
    return None


def _options(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    config = adapter.config
    if config.get("use_dora"):
        verdict.refuse("DoRA (use_dora) is not supported", verdict.merge)
    if config.get("layer_replication"):
        verdict.refuse(
            "layers of the base are not repeated (layer_replication): the adapter has more layers "
            "than the model",
            verdict.merge,
        )
    for option in ("rank_pattern", "alpha_pattern"):
        if config.get(option):
            verdict.refuse(
                f"{option} is refused after 0.5.23; up to 0.5.23 it is ignored: all layers get the "
                "same α / r, and a layer of another rank fails",
                verdict.portable,
            )
    if _ADDED_TOKENS in adapter.files:
        tokens = read_json(adapter.path / _ADDED_TOKENS)
        size = None if base is None else base.option("vocab_size")
        if size is not None and any(isinstance(t, int) and t >= size for t in tokens.values()):
            verdict.refuse(
                f"the adapter adds tokens to the vocabulary ({_ADDED_TOKENS})",
                f"resize the base and serve that; if the tokens are the base's, delete "
                f"{_ADDED_TOKENS} from the adapter's folder",
            )
        elif size is None and tokens:
            verdict.notes.append(
                f"{_ADDED_TOKENS}: adapters that add tokens to the vocabulary are refused; tokens "
                "of the base do no harm (--base tells)"
            )


def _tensors(verdict: Verdict, adapter: StoredAdapter) -> None:
    """Refuses ranks other than the configuration's, and tensors in blocks other than A and B."""
    r = number(adapter.config, "r", 8)
    other = [f"{n} has {layer.rank}" for n, layer in adapter.layers.items()
             if layer.rank != r and experts_of(adapter, layer) == 1]  # fmt: skip
    if other:
        verdict.refuse(
            f"all layers must have the configuration's rank, r = {r:g}: {names_in_brief(other)}",
            verdict.portable,
        )
    strange = [name for name in adapter.saved if _BLOCK.search(name)]
    if strange:
        verdict.refuse(
            "a tensor in a block that is neither lora_A nor lora_B is taken for lora_B, and does "
            f"not fit: {names_in_brief(strange)}",
            verdict.merge,
        )
    refuse_convolutions(verdict, adapter)
    down = [n for n, layer in adapter.layers.items() if layer.style != "lora_A"]
    if down:
        verdict.refuse(f"tensors must be called lora_A and lora_B: {names_in_brief(down)}",
                       verdict.portable)  # fmt: skip


def _dtype(base: BaseModel | None) -> torch.dtype:
    """The base's dtype; SGLang serves float32 as float16, and float32 Gemma as bfloat16."""
    if base is None:
        return torch.bfloat16
    if base.dtype in (torch.float16, torch.bfloat16):
        return base.dtype
    gemma = str(base.config.get("model_type", "")).startswith("gemma")
    return torch.bfloat16 if gemma else torch.float16


def _layer(
    verdict: Verdict,
    layer: StoredLayer,
    targets: set[str] | None,
    base: BaseModel | None,
    applied: Applied,
) -> Applied | Ignored:
    if not _BLOCK.search(layer.name):
        if not any(part in layer.name for part in _EMBEDDINGS):
            return Ignored("only layers whose names have 'layers.<number>.', embed_tokens and "
                           "lm_head are loaded", remedy=verdict.merge)  # fmt: skip
        own = "embed_tokens" if "embed_tokens" in layer.name else "lm_head"
        if targets is not None and own not in targets:
            return Ignored(
                f"{own} is loaded only if target_modules names it", remedy=verdict.portable
            )
        return applied
    if base is None or not base.modules:
        return applied
    place = base.place(layer.name)
    if base.is_multimodal and place.kind != MISSING and not base.is_text(place):
        fault = (
            "it is assigned by its number alone: what was trained for another part of the model is "
            "applied to the text model"
        )
        return Applied(applied.scale, applied.dtype, fault=fault, remedy=verdict.merge)
    number_and_end = f"layers.{_BLOCK.findall(layer.name)[-1]}.", f".{layer.last}"
    if place.kind == MISSING and not any(
        number_and_end[0] in n and n.endswith(number_and_end[1]) for n in base.modules
    ):
        return Ignored("the block has no module of this name", place.name)
    return applied


def _targeted(verdict: Verdict, adapter: StoredAdapter, targets: set[str] | None) -> None:
    """Refuses layers in blocks whose names do not contain a target module's name."""
    if targets is None:
        return
    strange = []
    for name, layer in adapter.layers.items():
        end = _EXPERT_WORDS.get(layer.last, layer.last)
        joined = name.removesuffix(layer.last) + _TARGETS.get(end, end)
        if experts_of(adapter, layer) > 1:
            continue
        if _BLOCK.search(name) and not any(target in joined for target in targets):
            strange.append(name)
    if strange:
        verdict.refuse(
            "target_modules must name the modules of all layers (experts' w1, w2 and w3 as "
            f"gate_proj, down_proj and up_proj): {names_in_brief(strange)}",
            "add gate_proj, down_proj and up_proj to target_modules in adapter_config.json"
            if all(adapter.layers[name].last in _EXPERT_WORDS for name in strange)
            else verdict.portable,
        )


def _joined(verdict: Verdict, adapter: StoredAdapter) -> None:
    """Refuses incomplete groups: q, k, v are joined, and so are gate, up."""
    siblings: dict[str, set[str]] = {}
    for layer in adapter.layers.values():
        if _BLOCK.search(layer.name):
            owner, _, last = layer.name.rpartition(".")
            siblings.setdefault(owner, set()).add(_EXPERT_WORDS.get(last, last))
    _refuse_unjoined(
        verdict,
        (o for o, ends in siblings.items() if ends & {"q_proj", "k_proj", "v_proj"}
         and not {"q_proj", "v_proj"} <= ends),
        "q_proj and v_proj must both be adapted where one of q_proj, k_proj and v_proj is (in "
        "older versions all three)",
    )  # fmt: skip
    _refuse_unjoined(
        verdict,
        (o for o, ends in siblings.items() if "up_proj" in ends and "gate_proj" not in ends),
        "up_proj without gate_proj fits no module",
    )


def _refuse_unjoined(verdict: Verdict, owners: Iterable[str], rule: str) -> None:
    owners = list(owners)
    if owners:
        verdict.refuse(
            f"{rule}: {names_in_brief(owners)}",
            f"{verdict.merge}; or add factors of zeros for the missing ones",
        )


def _blocks(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Refuses a block that the model does not have."""
    numbers = {name: int(found[1]) for name in adapter.layers
               if (found := _BLOCK.search(name))}  # fmt: skip
    count = None if base is None else base.option("num_hidden_layers")
    beyond = [name for name, block in numbers.items() if isinstance(count, int) and block >= count]
    if beyond:
        verdict.refuse(
            f"the base has {count} blocks: {names_in_brief(beyond)}",
            OTHER_BASE,
        )


ENGINE = Engine("sglang", "SGLang 0.5.23", judge)
