"""Reads PEFT's adapter format, `adapter_config.json` and named tensors, into an `AdapterState`.

The rules are those of `LoraConfig`, `LoraModel` and `save_pretrained` of PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...._utils.checks import FLOATS
from ...._utils.errors import unknown_name
from ...._utils.names import without_wrappers
from ...._utils.peft_names import (
    ADAPTER_CONFIG,
    BIAS_OF_B,
    BIASES,
    DORA,
    GROUPS_OF_OPTIONS,
    OPTIONS_OF_OTHERS,
    OPTIONS_WITHOUT_EFFECT,
    PREFIX,
    READ,
    REPLICATION,
    TARGET_PARAMETERS,
    TASK_HEADS,
    TASK_TYPES,
    TIE,
    TIED_MODULES,
    VARIANTS,
    Factor,
    as_factor,
    base_changing_start,
    base_names,
    variant_of,
)
from ....layers.options import lora_scaling
from ....layers.state import LayerState
from ....model.config import AdapterState, LoRAConfig, Replication
from .biases import check_biases, split_biases
from .converted import with_starts
from .experts.reading import unstacked_experts, wrapped_parameters
from .magnitudes import checked_magnitudes, split_magnitudes
from .shapes import (
    LAST_TWICE,
    TWICE,
    Geometry,
    attention_of,
    flattened,
    geometry,
    own_names,
    own_tensors,
)
from .tokens import split_rows

# Options of `LoRAConfig` that have the same meaning in PEFT's `LoraConfig`.
_SHARED = tuple(
    f.name
    for f in dataclasses.fields(LoRAConfig)
    if f.name not in ("scaling", "residual", "init_lora_weights")
)
# Options that determine s, the magnitudes and the names of the tensors.
DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", DORA)
_INITS = ("gaussian", "eva", "orthogonal", "mica")


def from_peft(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    residual_base: bool = False,
    expert_order: str = "auto",
) -> AdapterState:
    """An adapter that PEFT wrote. `residual_base`: whether it may belong to a base that PEFT
    changed. For `expert_order` see `column_order`.

    Raises:
        ValueError: an option is not implemented here, the adapter belongs to a changed base, or the
            configuration and the tensors do not fit each other.

    """
    check_options(values, residual_base)
    rows, others = split_rows(values, tensors)
    biases, others = split_biases(values, others)
    magnitudes, others = split_magnitudes(values, others)
    halves, extra = split_tensors(others, values.get("modules_to_save") or ())
    shapes = convolutions(others)
    if not halves:
        raise ValueError("it has no lora_A and lora_B of a linear layer or embedding")
    parameters = {
        name: parameter
        for name, parameter in wrapped_parameters(values, halves).items()
        if not parameter.endswith(".weight")  # this is a linear layer
    }
    linear = {name: pair for name, pair in halves.items() if name not in parameters}
    config = config_from_peft(values, tuple(linear), tuple(parameters.values()))
    pairs = {parameters[name]: halves[name] for name in halves if name in parameters}
    ranks = {name: config.layer_rank(name) for name in pairs}
    stacks, experts = unstacked_experts(values, pairs, ranks, expert_order)
    layers = {}
    for name, pair in (linear | stacks).items():
        shape = shapes.get(name, Geometry())
        layers[name] = _layer(name, *pair, config, shape.groups, attention_of(name, linear))
        layers[name].kernel, layers[name].groups = shape
        layers[name].trains = config.initializer.trains
    for name in embeddings(tensors) & layers.keys():
        layers[name].embedding = True
    _once_if_later(values, [layers[n] for n in linear if attention_of(n, linear)], linear)
    biases, magnitudes = own_names(biases, linear), own_names(magnitudes, linear)
    if values.get(BIAS_OF_B):
        check_biases(biases, {n: len(layers[n].lora_B) for n in linear}, linear)
    attentions = {attention_of(name, linear) for name in linear}
    for name, bias in biases.items():
        if name not in attentions:  # PEFT writes one of their in_proj too, but never adds it
            layers[name].lora_bias = bias
    if values.get(DORA):
        rows_of = {n: len(layers[n].lora_B) for n in linear}
        for name, magnitude in checked_magnitudes(magnitudes, rows_of, linear).items():
            if layers[name].groups > 1:
                raise ValueError(
                    f"{name!r} is a convolution with {layers[name].groups} groups, of which PEFT's "
                    f"DoRA ({DORA}) measures another weight: it cannot be read"
                )
            layers[name].lora_magnitude = magnitude
    _check_saved(config, extra)
    _warn_of_base([name for name, layer in layers.items() if not layer.embedding], extra)
    config = with_own_ranks(config, layers)
    base_model = values.get("base_model_name_or_path")
    state = AdapterState(config, layers, extra, base_model, rows, replication(values), experts)
    changed = base_changing_start(values.get("init_lora_weights"))
    return state if changed else with_starts(state)


def _once_if_later(
    values: Mapping[str, Any], projections: Collection[LayerState], names: Collection[str]
) -> None:
    """Halves B of the attentions' `out_proj` again, with a warning, if the version of PEFT that
    wrote the adapter may add its update only once.
    """
    version = str(values.get("peft_version", ""))
    known, found = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (LAST_TWICE, version))
    if not projections or found <= known:
        return
    for layer in projections:
        layer.lora_B = layer.lora_B / TWICE
    name = next(n for n in names if attention_of(n, names))
    warnings.warn(
        f"PEFT {version} wrote the adapter of {name}: it is read as an update that is added once; "
        f"versions up to {LAST_TWICE} add it twice (pull request 3774 of PEFT)",
        stacklevel=3,
    )


def replication(values: Mapping[str, Any]) -> Replication:
    """The blocks that a configuration repeats; raises ValueError unless it lists pairs."""
    pairs = values.get(REPLICATION) or ()
    try:
        found = tuple((start, end) for start, end in pairs)
        valid = all(type(n) is int for pair in found for n in pair)
    except (TypeError, ValueError):
        valid = False
    if not valid or not all(0 <= start < end for start, end in found):
        raise ValueError(f"{REPLICATION} = {pairs!r} is no list of [start, end] of blocks")
    return found


def _check_saved(config: LoRAConfig, extra: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the file lacks a saved module, as files of PEFT's conversion of PiSSA
    do. PEFT itself names two heads for a classifier, of which a model has only one.
    """
    heads = TASK_HEADS.get(config.task_type or "", ())
    owners = [key.rpartition(".")[0] for key in extra]
    for module in config.modules_to_save or ():
        if module not in heads and not any(saved_module(o, [module], True) for o in owners):
            raise ValueError(
                f"modules_to_save names {module!r}, but the file has no tensor of it: save the "
                "adapter again, or remove the name to use the base's"
            )


def _layer(
    name: str,
    lora_A: Tensor,
    lora_B: Tensor,
    config: LoRAConfig,
    groups: int = 1,
    attention: str | None = None,
) -> LayerState:
    """The layer with these factors: for a convolution with `groups`, the factors of one group; for
    the `out_proj` of an attention, with the attention's r and lora_alpha.

    PEFT's starts by an SVD or a QR have at most min(out, in) rows even if r is larger; s is still
    computed from the configuration's r.
    """
    check_pair(name, lora_A, lora_B, lora_A.dim() == 3)
    r, alpha = config.layer_rank(attention or name), config.layer_alpha(attention or name)
    scaling = lora_scaling(alpha, r, config.scaling_rule)
    rows, full = lora_A.shape[-2], min(lora_B.shape[-2], lora_A.shape[-1])
    if rows == r:
        return LayerState(lora_A, lora_B, scaling, alpha)
    if rows * groups != min(r, full if groups == 1 else r):
        raise _other_rank(name, rows * groups, r)
    divisor = rows if config.scaling_rule == "lora" else math.sqrt(rows)
    return LayerState(lora_A, lora_B, scaling, scaling * divisor)


def _other_rank(name: str, rows: int, r: int) -> ValueError:
    """The error for a rank that is not r. With `target_parameters`, A is [experts · r, in]."""
    several = rows > r and rows % r == 0
    return ValueError(
        f"lora_A of {name!r} has rank {rows}, the configuration says {r}: they belong to different "
        "adapters"
        + (
            f", or it is one of {rows // r} experts in one tensor: write the name of the parameter "
            f"into {TARGET_PARAMETERS} of {ADAPTER_CONFIG}, such as "
            f"{[name.removesuffix('.base_layer').rpartition('.')[2] + '.down_proj']}"
            if several
            else ""
        )
    )


def with_own_ranks(config: LoRAConfig, layers: Mapping[str, LayerState]) -> LoRAConfig:
    """The configuration with patterns for the layers whose rank differs from what it says."""
    other = {n: layer for n, layer in layers.items() if layer.r != config.layer_rank(n)}
    if not other:
        return config
    ranks = {f"^{re.escape(name)}": layer.r for name, layer in other.items()}
    alphas = {f"^{re.escape(name)}": layer.lora_alpha for name, layer in other.items()}
    return dataclasses.replace(
        config,
        rank_pattern={**ranks, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
    )


def split_tensors(
    tensors: Mapping[str, Tensor],
    modules_to_save: Collection[str] = (),
    layers: Collection[str] | None = None,
    by_peft: bool = True,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A [r, in] and B [out, r] of each layer, and all other tensors, by their names in the base
    model. PEFT's stacked experts are returned as they are.

    Args:
        tensors: the tensors by PEFT's names, with or without the adapter's name.
        modules_to_save: the saved modules, whose tensors may have any name.
        layers: the names of the layers, if they are known.
        by_peft: whether the tensors of saved modules may have PEFT's own parts in their names.

    Raises:
        ValueError: A or B is missing, there are several adapters, or a tensor belongs to another
            kind of adapter.

    """
    halves: dict[str, dict[str, Tensor]] = {}
    of_embedding: dict[str, bool] = {}
    others: dict[str, Tensor] = {}
    adapters: set[str | None] = set()
    for key, tensor in tensors.items():
        name = without_wrappers(key).removeprefix(PREFIX)
        factor = as_factor(name)
        if factor is None or not _is_of_layer(factor, name, modules_to_save, layers):
            others[name] = tensor
            continue
        adapters.add(factor.adapter)
        named = sorted(adapter for adapter in adapters if adapter)
        if len(named) > 1:
            raise ValueError(f"it has the tensors of {' and '.join(named)}: keep one adapter")
        if of_embedding.setdefault(factor.layer, factor.embedding) != factor.embedding:
            raise ValueError(f"{factor.layer!r} has factors of a linear layer and of an embedding")
        if factor.half in halves.setdefault(factor.layer, {}):
            raise ValueError(f"lora_{factor.half} of {factor.layer!r} exists twice")
        halves[factor.layer][factor.half] = tensor
    for name, found in halves.items():
        for half in "AB":
            if half not in found:
                raise ValueError(f"lora_{half} of {name!r} is missing")
    pairs = {name: (found["A"], found["B"]) for name, found in halves.items()}
    names = base_names(others, pairs, adapters, modules_to_save if by_peft else ())
    extra = _base_tensors(others, names, pairs, modules_to_save)
    return flattened(pairs), own_tensors(extra, pairs)


def embeddings(tensors: Collection[str]) -> set[str]:
    """The names in the base model of the embeddings whose A and B are among these PEFT tensors."""
    names = (without_wrappers(key).removeprefix(PREFIX) for key in tensors)
    factors = (as_factor(name) for name in names)
    return {factor.layer for factor in factors if factor is not None and factor.embedding}


def convolutions(tensors: Mapping[str, Tensor]) -> dict[str, Geometry]:
    """{name in the base model: geometry} of the convolutions whose A and B are among these PEFT
    tensors.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        factor = as_factor(without_wrappers(key).removeprefix(PREFIX))
        if factor is not None and tensor.dim() > 2:
            halves.setdefault(factor.layer, {})[factor.half] = tensor
    pairs = {n: (own["A"], own["B"]) for n, own in halves.items() if len(own) == 2}
    return {name: geometry(name, pair) for name, pair in pairs.items()}


def _is_of_layer(
    factor: Factor, name: str, modules_to_save: Collection[str], layers: Collection[str] | None
) -> bool:
    """Whether a tensor is A or B of a layer, not a saved module's tensor with such a name."""
    if layers is None:  # PEFT adapts nothing in saved modules
        return saved_module(factor.layer, modules_to_save) is None
    return factor.layer in layers or saved_module(name.rpartition(".")[0], modules_to_save) is None


def _base_tensors(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str | None],
    layers: Collection[str],
    modules_to_save: Collection[str],
) -> dict[str, Tensor]:
    """All tensors except A and B, by their names in the base model (the values of `names`).

    Raises:
        ValueError: a tensor belongs to another kind of adapter.

    """
    found = {}
    for name, tensor in tensors.items():
        variant = variant_of(name, layers)
        if variant and saved_module(name.rpartition(".")[0], modules_to_save) is None:
            why = "which is not implemented here"
            if variant == VARIANTS[DORA]:
                why = f"but {ADAPTER_CONFIG} does not say {DORA} = true"
            raise ValueError(
                f"{name!r} is not A or B of a linear layer or embedding: it belongs to {variant}, "
                f"{why}"
            )
        base = names[name]
        if base is not None:
            found[base] = tensor
    return found


def check_pair(name: str, lora_A: Tensor, lora_B: Tensor, of_experts: bool = False) -> None:
    """Raises ValueError unless the two are floating-point A [r, in] and B [out, r]; with
    `of_experts`, [E, r, in] and [E, out, r].
    """
    for half, factor in (("A", lora_A), ("B", lora_B)):
        if factor.dtype not in FLOATS:
            raise ValueError(
                f"lora_{half} of {name!r} is {factor.dtype}, not a floating-point type"
            )
    shapes = f"lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} of {name!r}"
    if {lora_A.dim(), lora_B.dim()} != {3 if of_experts else 2}:
        raise ValueError(
            f"{shapes} are not those of {'experts' if of_experts else 'a linear layer'}"
        )
    if lora_A.shape[:-2] != lora_B.shape[:-2]:
        raise ValueError(f"{shapes} are of different numbers of experts")
    if lora_A.shape[-2] != lora_B.shape[-1] or 0 in (*lora_A.shape, *lora_B.shape):
        raise ValueError(f"{shapes} do not fit each other; expected [r, in] and [out, r]")


def check_options(values: Mapping[str, Any], residual_base: bool = False) -> None:
    """Raises ValueError if PEFT's configuration has an option that is not implemented here."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r}: only 'LORA' adapters can be read")
    for option, variant in VARIANTS.items():
        value = None if option in READ else values.get(option)
        if value or (option in GROUPS_OF_OPTIONS and value not in (None, False)):
            raise ValueError(f"{option} = {value!r} is not implemented here: {variant}")
    if not isinstance(values.get(DORA) or False, bool):
        raise ValueError(f"{DORA} must be true or false, got {values[DORA]!r}")
    if values.get(DORA) and values.get(BIAS_OF_B):
        raise ValueError(f"{DORA} and {BIAS_OF_B} exclude each other")
    if not isinstance(values.get(TIE) or False, bool):
        raise ValueError(f"{TIE} must be true or false, got {values[TIE]!r}")
    _warn_of_unknown(values)
    init = values.get("init_lora_weights", True)
    changed = base_changing_start(init)
    if changed and not residual_base:
        raise ValueError(
            f"init_lora_weights = {init!r}: its factors belong to a base that PEFT changed, which "
            "is not in the folder; load it onto that base with load_adapter(..., "
            "residual_base=True), or make it an adapter of the original base with lora-kernels "
            "convert --start FOLDER, where FOLDER is the adapter as PEFT saved it before training"
        )
    if isinstance(init, str) and not changed and init not in _INITS:
        raise unknown_name("init_lora_weights of PEFT", init, _INITS)


def _warn_of_base(layers: Collection[str], extra: Mapping[str, Tensor]) -> None:
    """Warns of adapted layers' weights, which PEFT itself writes only for embeddings and heads."""
    whole = [name for name in layers if name.rpartition(".")[2] not in TIED_MODULES]
    if any(f"{name}.weight" in extra for name in whole):
        warnings.warn(
            f"the adapter's file is that of a whole model: its {len(extra)} tensors of the base "
            "are part of the adapter, and further training here trains them too; PEFT's "
            "save_pretrained leaves them out",
            stacklevel=2,
        )


def _warn_of_unknown(values: Mapping[str, Any]) -> None:
    known = {*_SHARED, "init_lora_weights", *OPTIONS_WITHOUT_EFFECT, *VARIANTS}
    known.update(OPTIONS_OF_OTHERS)
    unknown = [option for option, value in values.items() if value and option not in known]
    if unknown:
        version = values.get("peft_version")
        written = f" (it was written by PEFT {version})" if version else ""
        warnings.warn(
            f"the adapter's configuration has options that PEFT 0.21 does not know and ignores, "
            f"and so does this package: {', '.join(unknown)}{written}",
            stacklevel=2,
        )


def config_from_peft(
    values: Mapping[str, Any], names: tuple[str, ...], parameters: tuple[str, ...] = ()
) -> LoRAConfig:
    """Our configuration for a PEFT adapter with layers and experts' parameters of these names."""
    given = {key: values[key] for key in _SHARED if values.get(key) not in (None, [], {}, "")}
    if given.get("task_type") not in TASK_TYPES:
        given.pop("task_type", None)  # it has no effect
    if "layers_to_transform" not in given:
        given.pop("layers_pattern", None)
    if given.get("bias", "none") not in BIASES:
        raise unknown_name("bias", given["bias"], BIASES)
    for key in ("target_modules", "layers_to_transform", "modules_to_save", "layers_pattern"):
        if isinstance(given.get(key), list):
            given[key] = tuple(given[key])
    given.setdefault("target_modules", names)
    if parameters:
        given.setdefault(TARGET_PARAMETERS, parameters)
    given.setdefault("lora_alpha", 8)
    init = values.get("init_lora_weights")
    given["init_lora_weights"] = init if init in ("gaussian", "mica") else "lora"
    if not isinstance(given.get("use_rslora", False), bool):
        raise ValueError(f"use_rslora must be true or false, got {given['use_rslora']!r}")
    try:
        return LoRAConfig(**given)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def saved_module(owner: str, modules_to_save: Collection[str], loosely: bool = False) -> str | None:
    """The module in `modules_to_save` that is, or contains, `owner`, the module of a tensor.

    `loosely`: as in PEFT, "norm" matches "input_layernorm" too.
    """
    parts = owner.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        for saved in modules_to_save:
            if name == saved or name.endswith(saved if loosely else f".{saved}"):
                return name
    return None
