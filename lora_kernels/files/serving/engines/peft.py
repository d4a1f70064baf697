"""PEFT's rules, of `PeftModel.from_pretrained`.

They are in PEFT 0.21.2 in `peft_model.py`, `utils/save_and_load.py`, `tuners/lora/layer.py` (s;
starts are made again while an adapter is loaded) and `tuners/tuners_utils.py` (16-bit factors are
cast to float32, unless autocast_adapter_dtype=False).
"""

from __future__ import annotations

import torch

from ...._utils.peft_names import PREFIX
from ...adapter.peft_format.loading import lost_in_peft
from ..stored import StoredAdapter, names_in_brief, plain_name
from ..updates import experts_of, option_name, rank_of, scale_of
from .model import FOUND, RENAMED, SERVED, BaseModel, Place
from .verdict import (
    Applied,
    Engine,
    Ignored,
    Verdict,
    changing_start,
    refuse_shapes,
    residual_fault,
)

# Starts that are computed from the weights alone, and so are made again in loading.
_MADE_AGAIN = ("pissa", "olora", "loftq")
_CONVERT = "lora-kernels convert ADAPTER OUT --start <the adapter saved before training>"


def judge(adapter: StoredAdapter, base: BaseModel | None) -> Verdict:
    """What PEFT does with a folder of its format."""
    config = adapter.config
    verdict = Verdict()
    fault = _start(verdict, adapter, base)
    _tensors(verdict, adapter)
    refuse_shapes(verdict, adapter, base)
    places = _places(adapter, base)
    lost = _lost(base, [name for name, place in places.items() if place.kind == FOUND])
    for name, layer in adapter.layers.items():
        own = option_name(config, layer)
        verdict.rank = max(verdict.rank, rank_of(config, own))
        if base is not None and name in places and not _is_known(base, places[name], name):
            verdict.layers[name] = Ignored("no module has this name", places[name].name)
        elif layer.adapter or not layer.prefixed or layer.style != "lora_A":
            verdict.layers[name] = Ignored(
                "names of tensors must be those of save_pretrained, "
                f"{PREFIX}<layer>.lora_A.weight, not {layer.right.name}"
            )
        elif name in lost and experts_of(adapter, layer) == 1:
            verdict.layers[name] = Ignored(lost[name])
        else:
            verdict.layers[name] = Applied(scale_of(config, own), torch.float32, fault=fault)
    if adapter.layers and all(isinstance(found, Ignored) for found in verdict.layers.values()):
        verdict.notes.append("if no target module is in the base, it is an error")
    if base is None:
        verdict.notes.append("names were not compared with a base (--base)")
    return verdict


def _places(adapter: StoredAdapter, base: BaseModel | None) -> dict[str, Place]:
    """{} if the base's modules are not known, or PEFT will repeat some."""
    if base is None or not base.modules or adapter.config.get("layer_replication"):
        return {}
    return {name: base.place(name) for name in adapter.layers}


def _lost(base: BaseModel | None, layers: list[str]) -> dict[str, str]:
    """The layers that PEFT leaves bare, although they have the names of modules."""
    if base is None or base.architecture is None:
        return {}
    return lost_in_peft(base.architecture.model, layers)


def _is_known(base: BaseModel, place: Place, name: str) -> bool:
    """Whether PEFT finds the module, of which it knows older names."""
    known = place.kind in (FOUND, RENAMED)
    return known or (place.kind == SERVED and plain_name(name) in base.older)


def _start(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> str:
    """Why the adapter is wrong on the original base; "" if PEFT makes its start again."""
    start = changing_start(adapter.config)
    if adapter.is_start or not start:
        return residual_fault(adapter, base)
    if start.lower() == "corda":
        verdict.refuse(f"init_lora_weights = {start!r} needs the data of the start", _CONVERT)
        return ""
    if not start.lower().startswith(_MADE_AGAIN):
        return residual_fault(adapter, base)
    if "_niter_" in start:
        return (
            f"init_lora_weights = {start!r} draws random numbers: the start that PEFT subtracts "
            f"while it loads is not the one of the training. {_CONVERT}"
        )
    verdict.notes.append(
        f"init_lora_weights = {start!r}: PEFT makes the start again while it loads and subtracts "
        "it. That is right on the original base in the dtype of the training, wrong on the changed "
        f"one, and fails with low_cpu_mem_usage=True. {_CONVERT}"
    )
    return ""


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
            "correct r and rank_pattern in adapter_config.json",
        )


ENGINE = Engine("peft", "PEFT 0.21.2", judge)
