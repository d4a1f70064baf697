"""PEFT's names, as of PEFT 0.21: files, tensors and the options of `LoraConfig`."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any

from .names import without_wrappers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
# Precedes the base model's names, because the model is inside a LoraModel inside a PeftModel.
PREFIX = "base_model.model."

BIASES = ("none", "all", "lora_only")
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
# The heads that PEFT trains in full for these tasks; it cannot load an adapter without them.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Options of `LoraConfig` that `LoRAConfig` does not have. These have no effect on a trained
# adapter: they say where it came from or how it was initialized.
OPTIONS_WITHOUT_EFFECT = (
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
# These select variants of LoRA. What each does that plain LoRA does not:
VARIANTS = {
    "alora_invocation_tokens": "aLoRA, whose update begins at these tokens",
    "arrow_config": "Arrow, which routes each token to some of several adapters",
    "kasa_config": "KaSA, which truncates the base and trains a diagonal between A and B",
    "layer_replication": "layers of the base that are repeated, each with its own adapter",
    "lora_bias": "a bias of lora_B",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA, which adds sampled noise to A",
    "trainable_token_indices": "rows of an embedding that are trained",
    "use_bdlora": "BD-LoRA, whose A or B is block-diagonal",
    "use_dora": "DoRA, which trains the norms of the adapted weight's rows",
    "use_qalora": "QA-LoRA, which averages groups of the input before A",
    "velora_config": "VeLoRA, which trains with compressed inputs",
}
# The variants that can be loaded from PEFT's files. `add_lora` itself creates only DORA.
TOKEN_INDICES, BIAS_OF_B = "trainable_token_indices", "lora_bias"
REPLICATION, TARGET_PARAMETERS = "layer_replication", "target_parameters"
DORA = "use_dora"
READ = (TOKEN_INDICES, BIAS_OF_B, REPLICATION, DORA)
# PEFT builds an object for each of these options even from {}: only None turns the option off.
GROUPS_OF_OPTIONS = (
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "velora_config",
)
# Values of `init_lora_weights`, or their beginnings, for which PEFT subtracts the initial factors
# from the base's weights; "loftq" also rounds the weights.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Gives the input embedding and the modules that share its weight one adapter or saved module. PEFT
# ties them only if the configuration names one of these modules.
TIE = "ensure_weight_tying"
TIED_MODULES = ("embed_tokens", "lm_head")
OPTIONS_OF_VARIANTS = tuple(option for option in VARIANTS if option != DORA)
# Options of old versions of PEFT, of Swift and of Unsloth that PEFT ignores, and rightly so.
OPTIONS_OF_OTHERS = (
    "merge_weights",
    "lora_dtype",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "unsloth_fixed",
    "lora_B_layout",
)

# A and B of a linear layer or embedding. Groups: the layer's name, "A" or "B", and the adapter's
# name, which a model's state_dict has and `save_pretrained` leaves out.
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_FACTOR_OF_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
# The names of other tensors of an adapted layer or embedding, after the layer's own name.
_TENSORS_OF_VARIANTS = {
    r"lora_magnitude_vector": VARIANTS["use_dora"],
    r"lora_diag": VARIANTS["kasa_config"],
    r"lora_monteclora_sampler": VARIANTS["monteclora_config"],
    r"lora_velora_\w+": VARIANTS["velora_config"],
    r"lora_arrow": VARIANTS["arrow_config"],
    r"lora_E|lora_ranknum": "AdaLoRA",
    r"token_adapter\.trainable_tokens_\w+": VARIANTS["trainable_token_indices"],
}


def base_changing_start(init_lora_weights: object) -> str | None:
    """The entry of `BASE_CHANGING_STARTS` that an option names, such as "pissa" for
    "pissa_niter_4"; None for other values.
    """
    if not isinstance(init_lora_weights, str):
        return None
    given = init_lora_weights.lower()
    return next((start for start in BASE_CHANGING_STARTS if given.startswith(start)), None)


@dataclass(frozen=True)
class Factor:
    """The name of A or B of a layer. `adapter` is None where the adapter's name is left out."""

    layer: str
    half: str
    adapter: str | None
    embedding: bool = False


def factor_key(layer: str, half: str, adapter: str = "", embedding: bool = False) -> str:
    """The name of A or B of a linear layer or embedding: as in a model's state_dict if `adapter` is
    given, else as in a file.
    """
    name = f"{PREFIX}{layer}.lora_{'embedding_' if embedding else ''}{half}"
    return f"{name}{adapter and f'.{adapter}'}{'' if embedding else '.weight'}"


def factor_keys(layer: str, tensors: Container[str]) -> tuple[str, str]:
    """The names in a file of a layer's A and B; those of an embedding if the file has such
    names.
    """
    embedding = factor_key(layer, "A", embedding=True) in tensors
    key_A, key_B = (factor_key(layer, half, embedding=embedding) for half in "AB")
    return key_A, key_B


def as_factor(name: str) -> Factor | None:
    """The parts of a tensor's name if it is that of A or B; else None."""
    for pattern, embedding in ((_FACTOR, False), (_FACTOR_OF_EMBEDDING, True)):
        if found := pattern.fullmatch(name):
            return Factor(found[1], found[2], found[3], embedding)
    return None


def split_by_layer(
    pattern: re.Pattern[str], tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the tensors of a file: those whose names in the model match a pattern, by the
    pattern's first group (the layer's name), and all others, by their own names.
    """
    found, others = {}, {}
    for key, tensor in tensors.items():
        match = pattern.fullmatch(without_wrappers(key).removeprefix(PREFIX))
        if match is None:
            others[key] = tensor
        else:
            found[match[1]] = tensor
    return found, others


def variant_of(name: str, layers: Container[str]) -> str | None:
    """The variant of LoRA that a tensor other than A and B belongs to; None if it belongs to the
    base. `layers` are the layers that have A and B.
    """
    for layer, rest in _splits(name):
        for pattern, variant in _TENSORS_OF_VARIANTS.items():
            if re.fullmatch(rf"(?:{pattern})(\..+)?", rest):
                return variant
        if layer in layers and rest.startswith("lora_"):
            return VARIANTS["lora_bias"] if rest.endswith(".bias") else "an unknown variant of LoRA"
    return None


def base_names(
    names: Collection[str],
    layers: Container[str],
    adapters: Container[str | None],
    modules_to_save: Collection[str],
) -> dict[str, str | None]:
    """The names that the base itself gives to tensors other than A and B; None for the original
    copies of saved modules, which PEFT writes with bias="all" but does not train.

    PEFT's parts of a name (base_layer, modules_to_save, original_module) are recognized by their
    positions and by each other, because a module of the base may have such a name too.

    Args:
        names: the tensors' names.
        layers: the layers that have A and B.
        adapters: the adapters' names within the names of A and B.
        modules_to_save: PEFT's option of this name.

    """
    found: dict[str, str | None] = {name: name for name in names}
    saved = tuple(modules_to_save)
    for name in names:
        for module, rest in _splits(name):
            part, _, inner = rest.partition(".")
            if part == "base_layer" and inner and module in layers:
                found[name] = f"{module}.{inner}"
            elif part == "modules_to_save" and module.endswith(saved):
                adapter, _, last = inner.partition(".")
                for tail in (inner, last):
                    original = f"{module}.original_module.{tail}"
                    if original in found or (tail and tail == last and adapter in adapters):
                        found[name] = f"{module}.{tail}"
                        if original in found:
                            found[original] = None
    return found


def _splits(name: str) -> list[tuple[str, str]]:
    """(a module's name, the rest of the name), for each module that the name may belong to."""
    parts = name.split(".")
    return [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, len(parts))]
