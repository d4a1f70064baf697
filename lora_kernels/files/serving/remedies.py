"""What a user can do about an adapter that an engine refuses or applies wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._utils.peft_names import READ, TARGET_PARAMETERS, VARIANTS, base_changing_start
from ..adapter.peft_format.experts.reading import wrapped_parameters
from .stored import LINEAR, StoredAdapter, plain_name

_FORM = "writes the form that all engines read alike"
GGUF = "lora-kernels convert ADAPTER OUT.gguf --to gguf --base BASE"
TO_EACH = "lora-kernels convert ADAPTER OUT --experts each --base BASE"
TO_STACKED = "lora-kernels convert ADAPTER OUT --experts stacked --base BASE"
WHOLE = "lora-kernels convert ADAPTER OUT --base BASE, which adds factors of zeros for the others"
OTHER_BASE = "use the base that the adapter was trained on"
CONVERT_START = "lora-kernels convert ADAPTER OUT --start <the adapter saved before training>"
SERVE_MADE_BASE = (
    "serve the base that LoftQ made, and give it as --base: save it with model.save_pretrained "
    "before the training"
)
# Options of PEFT that change what a trained adapter computes.
_DECISIVE = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "trainable_token_indices",
)


def changing_start(config: Mapping[str, Any]) -> str:
    """The option `init_lora_weights`, if that start makes PEFT change the base; else ""."""
    start = config.get("init_lora_weights")
    return str(start) if base_changing_start(start) else ""


def variants(config: Mapping[str, Any]) -> dict[str, str]:
    """{option: what it does} for the variants of LoRA that the configuration turns on."""
    return {option: VARIANTS[option] for option in _DECISIVE if config.get(option)}


def start_remedy(start: str) -> str:
    """What to do about an adapter whose start changed the base."""
    if base_changing_start(start) == "loftq":  # its update cannot move to the original base
        return SERVE_MADE_BASE
    return f"{CONVERT_START}; or serve the changed base"


def is_readable(adapter: StoredAdapter) -> bool:
    """Whether `lora-kernels convert` can read the adapter: only linear layers and experts."""
    config = adapter.config
    linear = all(layer.kind == LINEAR for layer in adapter.layers.values())
    nested = {name for name in adapter.layers if plain_name(name) != name}
    targets = config.get(TARGET_PARAMETERS) or []
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        return False
    strange = nested - wrapped_parameters(config, adapter.layers).keys()
    return linear and not strange and not set(variants(config)) - set(READ)


def portable(adapter: StoredAdapter) -> str:
    """How to write the adapter so that all engines apply it alike, or else how to merge it."""
    if not is_readable(adapter):
        return merging(adapter)
    if changing_start(adapter.config):
        return start_remedy(changing_start(adapter.config))
    tensors = (t for layer in adapter.layers.values() for t in (layer.right, layer.left))
    wide = " --dtype float32" if any(t.entry.dtype == "F64" for t in tensors) else ""
    return f"lora-kernels convert ADAPTER OUT{wide} {_FORM}"


def merging(adapter: StoredAdapter) -> str:
    """How to merge the adapter."""
    own = "lora-kernels merge BASE ADAPTER OUT, or " if is_readable(adapter) else ""
    return f"merge it into the model ({own}PEFT's merge_and_unload) and serve that"


def is_gguf(adapter: StoredAdapter) -> bool:
    """Whether `lora-kernels convert --to gguf` accepts the adapter, if the base has its layers."""
    extra = any(adapter.config.get(option) for option in READ)
    changed = changing_start(adapter.config) or adapter.is_start
    experts = any(is_expert(name) for name in adapter.layers)
    readable = is_readable(adapter) and not experts
    return readable and not adapter.others and not extra and not changed


def is_expert(name: str) -> bool:
    """Whether the layer of that name is an expert of a mixture, or stands for all experts."""
    return "experts" in name.split(".")


def beginnings(name: str, matching: str | None) -> tuple[str, str] | None:
    """(the beginning that would match, the beginning of this name); None if another beginning does
    not help, or means another block.
    """
    if matching is None:
        return None
    there, here = matching.split("."), name.split(".")
    while there and here and there[-1] == here[-1]:
        there.pop()
        here.pop()
    if any(part.isdecimal() for part in (*there, *here)) or there == here:
        return None
    return "".join(f"{part}." for part in there), "".join(f"{part}." for part in here)


def renaming(name: str, matching: str | None) -> str:
    """The remedy for a name with a wrong beginning; "" if that is not what is wrong."""
    change = beginnings(name, matching)
    if change is None:
        return ""
    new, old = (part or "''" for part in change)
    return f"lora-kernels convert ADAPTER OUT --rename {old} {new}"


def renaming_of(names: Mapping[str, str | None]) -> str:
    """The remedy for {name: matching name}: one renaming for all names, or else another base."""
    found = {renaming(name, matching) for name, matching in names.items()}
    return found.pop() if len(found) == 1 and "" not in found else OTHER_BASE
