"""PEFT's adapter format: `adapter_config.json` and names of tensors, to and from an `AdapterState`.

After PEFT 0.21's `LoraConfig`, `LoraModel` and `save_pretrained`. It holds for the original base:
a start that was taken out is a second half of the rank, A' = [A; A₀], B' = [B, −B₀].
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ..._utils.errors import unknown_name
from ..._utils.names import match_names, without_wrappers
from ...layers.options import lora_scaling
from ...layers.state import LayerState
from ...model.config import BIASES, TASK_HEADS, TASK_TYPES, AdapterState, LoRAConfig

PREFIX = "base_model.model."
# Fields that decide nothing about a trained adapter: where it came from, and how it started.
_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
_SAME_NAME = (
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
)
_TRANSLATED = (*_SAME_NAME, "init_lora_weights")
# Fields on which s and the names of the tensors depend.
DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def to_peft(
    state: AdapterState, module_names: Collection[str] | None = None, fan_in_fan_out: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors, in float32 or wider.

    Args:
        state: the adapter.
        module_names: the names of all modules of the base, so that `target_modules` can be endings
            that PEFT resolves to exactly these layers; without them it is full names.
        fan_in_fan_out: whether the layers are Conv1D; PEFT sets it right itself, with a warning.

    """
    config = state.config
    tensors, ranks = {}, {}
    for name, layer in state.layers.items():
        right, left = layer.update_factors()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = right
        tensors[f"{PREFIX}{name}.lora_B.weight"] = left
        ranks[name] = right.shape[0]
    saved = {}  # modules in full, in the order of their tensors
    for key, tensor in state.extra.items():
        owner, _, last = key.rpartition(".")
        module = _saved_module(owner, config.modules_to_save or (), last != "bias")
        if module is not None:
            saved[module] = None
        elif last == "bias" and owner in state.layers:
            key = f"{owner}.base_layer.bias"
        tensors[PREFIX + key] = tensor
    return {
        "peft_type": "LORA",
        "task_type": _task_type(config.task_type, saved),
        "base_model_name_or_path": state.base_model,
        "inference_mode": True,
        "use_rslora": config.scaling_rule != "lora",
        **rank_fields(state, ranks),
        "target_modules": _targets(list(state.layers), module_names, tuple(saved)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(saved) or None,
        "bias": config.bias,
        "lora_dropout": config.lora_dropout,
        "fan_in_fan_out": fan_in_fan_out,
    }, tensors


def rank_fields(state: AdapterState, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields that give the layers these ranks, each with its s."""
    rslora = state.config.scaling_rule != "lora"
    alphas = {name: _alpha(state.layers[name].scaling, r, rslora) for name, r in ranks.items()}
    # As a pair: vLLM takes s from these two for all layers, and reads no pattern.
    pairs = [(ranks[name], alphas[name]) for name in ranks]
    r, lora_alpha = Counter(pairs).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {_pattern(n): k for n, k in ranks.items() if k != r},
        "alpha_pattern": {_pattern(n): a for n, a in alphas.items() if a != lora_alpha},
        "init_lora_weights": True,
    }


def from_peft(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterState:
    """The adapter that PEFT wrote.

    Raises:
        ValueError: it has an option that is not implemented here, it holds for a base that PEFT
            changed, or configuration and tensors do not go together.

    """
    check_options(values)
    halves, extra = split_tensors(tensors)
    if not halves:
        raise ValueError("it has no lora_A and lora_B of a linear layer")
    config = config_from_peft(values, tuple(halves))
    layers = {}
    for name, (lora_A, lora_B) in halves.items():
        check_pair(name, lora_A, lora_B)
        r, alpha = config.layer_rank(name), config.layer_alpha(name)
        if lora_A.shape[0] != r:
            raise ValueError(
                f"lora_A of {name!r} has rank {lora_A.shape[0]}, the configuration says {r}: they "
                "are not of one adapter"
            )
        scaling = lora_scaling(alpha, r, config.scaling_rule)
        layers[name] = LayerState(lora_A, lora_B, scaling, alpha)
    return AdapterState(config, layers, extra, values.get("base_model_name_or_path"))


def split_tensors(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A and B of each layer, and all else by its name in the base model.

    Raises:
        ValueError: one of the two is missing, or a tensor belongs to another kind of adapter.

    """
    halves: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = without_wrappers(key).removeprefix(PREFIX)
        pair = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if pair:
            if pair[2] in halves.setdefault(pair[1], {}):
                raise ValueError(f"lora_{pair[2]} of {pair[1]!r} is there twice")
            halves[pair[1]][pair[2]] = tensor
        elif re.search(r"(^|\.)lora_\w+(\.|$)", name):
            raise ValueError(
                f"{key!r} is no A or B of a linear layer: embeddings, DoRA and other variants are "
                "not implemented"
            )
        elif ".original_module." not in name:
            # bias="all" writes the biases of saved modules twice, and those of their originals.
            extra[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    for name, found in halves.items():
        for half in "AB":
            if half not in found:
                raise ValueError(f"lora_{half} of {name!r} is missing")
    return {name: (found["A"], found["B"]) for name, found in halves.items()}, extra


def check_pair(name: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raises unless they are A [r, in] and B [out, r]."""
    shapes = f"lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} of {name!r}"
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(f"{shapes} are not those of a linear layer")
    if lora_A.shape[0] != lora_B.shape[1] or 0 in (*lora_A.shape, *lora_B.shape):
        raise ValueError(f"{shapes} do not go together; expected [r, in] and [out, r]")


def check_options(values: Mapping[str, Any]) -> None:
    """Raises ValueError if a configuration of PEFT has an option that is not implemented here."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r}: only 'LORA' adapters can be read")
    for option, value in values.items():
        # What PEFT adds to LoRA is off, None or empty by default.
        if value and option not in (*_TRANSLATED, *_HARMLESS):
            raise ValueError(
                f"{option} = {value!r} is not implemented here: without it the adapter would "
                "compute something else"
            )
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGING_INITS):
        raise ValueError(
            f"init_lora_weights = {init!r}: its factors hold for a base that PEFT changed, which "
            "the folder does not tell; save it from PEFT with "
            "path_initial_model_for_weight_conversion=<the adapter saved before training>, or if "
            "the changed base was saved, set init_lora_weights to true and load it onto that"
        )
    if isinstance(init, str) and init not in _INITS:
        raise unknown_name("init_lora_weights of PEFT", init, _INITS)
    if init == "mica":
        warnings.warn(
            "init_lora_weights = 'mica': PEFT trains A only; further training here moves B too",
            stacklevel=2,
        )


def config_from_peft(values: Mapping[str, Any], names: tuple[str, ...]) -> LoRAConfig:
    """Our configuration of an adapter of PEFT that has layers of these names."""
    given = {key: values[key] for key in _SAME_NAME if values.get(key) not in (None, [], {}, "")}
    if given.get("task_type") not in TASK_TYPES:
        given.pop("task_type", None)  # it decides nothing
    if "layers_to_transform" not in given:
        given.pop("layers_pattern", None)
    if given.get("bias", "none") not in BIASES:
        raise unknown_name("bias", given["bias"], BIASES)
    for key in ("target_modules", "layers_to_transform", "modules_to_save", "layers_pattern"):
        if isinstance(given.get(key), list):
            given[key] = tuple(given[key])
    given.setdefault("target_modules", names)
    given.setdefault("lora_alpha", 8)
    given["init_lora_weights"] = (
        "gaussian" if values.get("init_lora_weights") == "gaussian" else "lora"
    )
    if not isinstance(given.get("use_rslora", False), bool):
        raise ValueError(f"use_rslora must be true or false, got {given['use_rslora']!r}")
    try:
        return LoRAConfig(**given)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _task_type(task_type: str | None, saved: Collection[str]) -> str | None:
    """None if PEFT would look for a head, in vain: the adapter is that of any model then."""
    heads = TASK_HEADS.get(task_type, ())
    return task_type if not heads or any(name.endswith(heads) for name in saved) else None


def _alpha(scaling: float, r: int, rslora: bool) -> float:
    """lora_alpha with α / r, or α / √r, equal to `scaling`; an integer if one is."""
    divisor = math.sqrt(r) if rslora else r
    whole = round(scaling * divisor)
    return whole if whole / divisor == scaling else scaling * divisor


def _pattern(name: str) -> str:
    """PEFT takes the key for the end of a name, as a regular expression: this is the whole name."""
    return "^" + re.escape(name)


def _saved_module(
    owner: str, modules_to_save: Collection[str], loosely: bool = False
) -> str | None:
    """The name of the module in `modules_to_save` that the tensor's owner is, or lies in.

    `loosely`: PEFT has "norm" mean "input_layernorm" too. Whole names mean the same to both.
    """
    parts = owner.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        for saved in modules_to_save:
            if name == saved or name.endswith(saved if loosely else f".{saved}"):
                return name
    return None


def _targets(
    names: list[str], module_names: Collection[str] | None, saved: tuple[str, ...]
) -> list[str] | str:
    """The shortest endings that mean exactly these layers, or their names.

    Serving engines know modules by the last part of the name, which is why it is tried first.
    """
    if module_names is None:
        return sorted(names)
    wanted = set(names)
    # PEFT leaves out what lies in modules that are saved in full.
    others = [n for n in module_names if _saved_module(n, saved) is None]
    for length in (1, 2, None):
        endings = {
            name if length is None else ".".join(name.split(".")[-length:]) for name in names
        }
        if set(match_names(others, sorted(endings), others)) == wanted:
            return sorted(endings)
    return "|".join(re.escape(name) for name in sorted(names))
