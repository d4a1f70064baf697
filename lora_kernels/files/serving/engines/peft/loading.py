"""The rules of PEFT's `PeftModel.from_pretrained`.

They are in PEFT 0.21.2 in `peft_model.py`, `utils/save_and_load.py`, `tuners/lora/config.py`,
`tuners/lora/layer.py` (s; starts are made again while an adapter is loaded) and
`tuners/tuners_utils.py` (16-bit factors are cast to float32 unless autocast_adapter_dtype=False).
Which layers the configuration selects is in `selection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....._utils.peft_names import PREFIX, TASK_HEADS, TOKEN_INDICES
from ....adapter.peft_format.loading import lost_in_peft
from ...remedies import CONVERT_START, SERVE_MADE_BASE, changing_start
from ...stored import StoredAdapter, names_in_brief, plain_name
from ...updates import experts_of, option_name, rank_of, saved_modules, scale_of
from ..experts import each_expert, left_bare_by_peft, refuse_doubled_rank
from ..model import FOUND, RENAMED, SERVED, BaseModel, Place
from ..verdict import (
    Applied,
    Engine,
    Fault,
    Ignored,
    Verdict,
    refuse_missing,
    refuse_shapes,
    residual_fault,
)
from .selection import unselected

# Starts that are computed from the weights alone; PEFT computes them again while it loads.
_MADE_AGAIN = ("pissa", "olora", "loftq")
# Other starts: PEFT accepts the first ones in any case, and the others only as they are here.
_ANY_CASE = ("olora", "mica", "gaussian")
_STARTS = ("loftq", "eva", "orthogonal", "lora_ga")
_WRITE = "adapter_config.json"
# Tensors that an option requires; if they are missing, PEFT makes new ones.
_PROMISED = {
    "use_dora": "lora_magnitude_vector",
    "kasa_config": "lora_diag",
    "lora_bias": "lora_B.bias",
}


def judge(adapter: StoredAdapter, base: BaseModel | None) -> Verdict:
    """What PEFT does with a folder of its format."""
    config = adapter.config
    verdict = Verdict.of(adapter)
    _options(verdict, config)
    _saved(verdict, adapter, base)
    fault = _start(verdict, adapter, base)
    _tensors(verdict, adapter)
    refuse_shapes(verdict, adapter, base)
    places = _places(adapter, base)
    left_out = unselected(verdict, adapter, base)
    bare = left_bare_by_peft(verdict, adapter, base)
    refuse_doubled_rank(verdict, adapter, base)
    experts = {name for own in each_expert(adapter, base).values() for name in own.names}
    found = [name for name, place in places.items() if place.kind == FOUND]
    lost = _lost(base, [name for name in found if name not in experts])
    for name, layer in adapter.layers.items():
        own = option_name(config, layer)
        verdict.rank = max(verdict.rank, rank_of(config, own))
        if base is not None and name in places and not _is_known(base, places[name], name):
            verdict.layers[name] = Ignored("no module has this name", places[name].name)
        elif name in left_out or name in bare:
            verdict.layers[name] = left_out.get(name) or bare[name]
        elif layer.adapter or not layer.prefixed or layer.style != "lora_A":
            verdict.layers[name] = Ignored(
                "the names of its tensors must be those of save_pretrained, "
                f"{PREFIX}<layer>.lora_A.weight",
                remedy=verdict.portable,
            )
        elif name in lost and experts_of(adapter, layer) == 1:
            verdict.layers[name] = Ignored(lost[name], remedy=verdict.merge)
        else:
            reason, remedy = fault if fault.reason else _promised(adapter, name)
            verdict.layers[name] = Applied(
                scale_of(config, own), torch.float32, fault=reason, remedy=remedy
            )
    if adapter.layers and all(isinstance(found, Ignored) for found in verdict.layers.values()):
        verdict.notes.append("if no target module is in the base, it is an error")
    if base is None:
        verdict.notes.append("names were not compared with a base (--base)")
    return verdict


def _places(adapter: StoredAdapter, base: BaseModel | None) -> dict[str, Place]:
    """The layers' places; {} if the base's modules are unknown, or PEFT will repeat some."""
    if base is None or not base.modules or adapter.config.get("layer_replication"):
        return {}
    return {name: base.place(name) for name in adapter.layers}


def _lost(base: BaseModel | None, layers: list[str]) -> dict[str, str]:
    """The layers that PEFT does not adapt, although modules have their names."""
    if base is None or base.architecture is None:
        return {}
    return lost_in_peft(base.architecture.model, layers)


def _is_known(base: BaseModel, place: Place, name: str) -> bool:
    """Whether PEFT finds the module; PEFT knows older names too."""
    known = place.kind in (FOUND, RENAMED)
    return known or (place.kind == SERVED and plain_name(name) in base.older)


def _options(verdict: Verdict, config: Mapping[str, Any]) -> None:
    """Refuses options with which PEFT fails."""
    absent = {"r": 8, "lora_alpha": 8}  # PEFT's defaults, which do not replace null
    refuse_missing(verdict, absent | dict(config), "r", "lora_alpha")
    if isinstance(config.get("r"), float):
        verdict.refuse(
            f"r must be written as a whole number, it is {config['r']!r}",
            f"write {config['r']:g} into {_WRITE}",
        )
    kind = config.get("peft_type")
    if kind is not None and kind != "LORA":
        verdict.refuse(f"peft_type must be 'LORA', not {kind!r}", f"write 'LORA' into {_WRITE}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start and not _is_known_start(start):
        verdict.refuse(
            f"init_lora_weights = {start!r} is none of PEFT's starts, which it has in lower case",
            f"write {start.lower()!r} into {_WRITE}"
            if _is_known_start(start.lower())
            else f"write true into {_WRITE}, if the start did not change the base",
        )
    if start == "loftq" and not config.get("loftq_config"):
        verdict.refuse(
            "init_lora_weights = 'loftq' needs loftq_config",
            f"write true into {_WRITE}, and {SERVE_MADE_BASE}",
        )
    if config.get("lora_bias") and start not in (True, False):
        verdict.refuse("lora_bias needs init_lora_weights = true or false", "write true")
    if config.get("lora_bias") and config.get("use_dora"):
        verdict.refuse("lora_bias and use_dora exclude each other", f"correct {_WRITE}")
    blocks = [option for option in ("layers_to_transform", "layers_pattern")
              if config.get(option) is not None]  # fmt: skip
    if blocks and isinstance(config.get("target_modules"), str):
        verdict.refuse(
            f"{' and '.join(blocks)} cannot be used where target_modules is one text",
            verdict.portable,
        )
    elif config.get("layers_pattern") and config.get("layers_to_transform") is None:
        verdict.refuse("layers_pattern needs layers_to_transform", verdict.portable)


def _is_known_start(start: str) -> bool:
    return start.startswith(("pissa", "corda")) or start.lower() in _ANY_CASE or start in _STARTS


def _saved(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Refuses files that lack modules or rows which the configuration calls trained."""
    config = adapter.config
    if isinstance(config.get("modules_to_save"), str):
        verdict.refuse(
            f"modules_to_save must be a list of names, not {config['modules_to_save']!r}",
            f"write {[config['modules_to_save']]!r} into {_WRITE}",
        )
    heads = TASK_HEADS.get(str(config.get("task_type")), ()) if base is not None else ()
    missing = []
    for module in dict.fromkeys((*saved_modules(config), *heads)):
        is_there = base is None or not base.modules or any(n.endswith(module) for n in base.modules)
        if is_there and not any(f"{module}." in name for name in adapter.saved):
            missing.append(module)
    if missing:
        verdict.refuse(
            f"the file has no tensors of {names_in_brief(missing)}, which modules_to_save or the "
            "task names",
            "save the adapter again with them; or remove the names (of a head: task_type, too) "
            f"from {_WRITE}, to use the base's",
        )
    if config.get(TOKEN_INDICES) and not any("trainable_tokens_" in n for n in adapter.others):
        verdict.refuse(
            f"the file has no rows of an embedding, which {TOKEN_INDICES} promises",
            f"save the adapter again with them, or write null into {_WRITE} to use the base's",
        )


def _promised(adapter: StoredAdapter, name: str) -> Fault:
    """The fault of a layer if an option requires a tensor that is missing."""
    layer = adapter.layers[name]
    start = layer.right.name.partition(".lora_")[0]
    for option, tensor in _PROMISED.items():
        on = adapter.config.get(option) not in (None, False)
        if on and not any(n.startswith(f"{start}.{tensor}") for n in adapter.others):
            return Fault(
                f"{option} is on, but its tensor {tensor} is not in the file: PEFT makes it anew",
                f"save the adapter again with it; or, if it was not trained so, correct {_WRITE}",
            )
    return Fault()


def _start(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> Fault:
    """Why the adapter is wrong on the original base; empty if PEFT computes its start again."""
    start = changing_start(adapter.config)
    if adapter.is_start or not start:
        return residual_fault(adapter, base)
    if start.lower() == "corda":
        verdict.refuse(f"init_lora_weights = {start!r} needs the data of the start", CONVERT_START)
        return Fault()
    if not start.lower().startswith(_MADE_AGAIN):
        return residual_fault(adapter, base)
    if "_niter_" in start:
        return Fault(
            f"init_lora_weights = {start!r} draws random numbers: the start that PEFT subtracts "
            "while it loads is not the one of the training",
            CONVERT_START,
        )
    verdict.notes.append(
        f"init_lora_weights = {start!r}: PEFT makes the start again while it loads and subtracts "
        "it. That is right on the original base in the dtype of the training, wrong on the changed "
        f"one, and fails with low_cpu_mem_usage=True. {CONVERT_START}"
    )
    return Fault()


def _tensors(verdict: Verdict, adapter: StoredAdapter) -> None:
    config = adapter.config
    other = []
    for name, layer in adapter.layers.items():
        r = rank_of(config, option_name(config, layer))
        if experts_of(adapter, layer) == 1 and layer.rank != r:
            other.append(f"{name} has {layer.rank} instead of {r}")
    if other:
        verdict.refuse(
            f"the tensors must have the ranks of the configuration: {names_in_brief(other)}",
            "correct r and rank_pattern in adapter_config.json: they are not those of the file",
        )


ENGINE = Engine("peft", "PEFT 0.21.2", judge)
