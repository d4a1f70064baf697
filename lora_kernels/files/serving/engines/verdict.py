"""What an engine does with an adapter: the types that all engines' rules use."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...._utils.peft_names import ADAPTER_FILE
from ....init import get_initializer, initializer_names
from ...checkpoint.residual import ADAPTER as RESIDUAL_ADAPTER
from ...checkpoint.residual import find_base, is_start
from ..remedies import (
    OTHER_BASE,
    SERVE_MADE_BASE,
    changing_start,
    merging,
    portable,
    start_remedy,
    variants,
)
from ..stored import CONVOLUTION, StoredAdapter, names_in_brief
from .model import BaseModel

Factors = tuple[Tensor, Tensor]

RIGHT, WRONG, REFUSED = "right", "wrong", "refused"


@dataclass(frozen=True)
class Refusal:
    """Why an engine refuses an adapter, and what to do."""

    rule: str
    remedy: str


class Fault(NamedTuple):
    """Why an update is not the trained one, and what to do; empty if it is the trained one."""

    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Applied:
    """How an engine applies a layer.

    Attributes:
        scale: the factor of B·A.
        dtype: the dtype of the factors in the engine.
        folded: whether the engine multiplies B by `scale` and rounds the product to `dtype`.
        fault: why the result is not the trained one, if scale and dtype do not show it.
        remedy: what to do about the fault.
        change: what else the engine does to A and B, so that its error can be measured.

    """

    scale: float
    dtype: torch.dtype
    folded: bool = False
    fault: str = ""
    remedy: str = ""
    change: Callable[[Factors], Factors] | None = None

    def factors(self, factors: Factors) -> tuple[Tensor, Tensor, float]:
        """A, B and s as the engine uses them."""
        right, left = self.change(factors) if self.change else factors
        right, left = right.to(self.dtype), left.to(self.dtype)
        if not self.folded or self.scale == 1:  # nothing is rounded again
            return right, left, self.scale
        return right, (left * self.scale).to(self.dtype), 1.0


@dataclass(frozen=True)
class Ignored:
    """Why an engine silently leaves out a layer, the name that would match, and what to do."""

    reason: str
    name: str | None = None
    remedy: str = ""


@dataclass
class Verdict:
    """What an engine does with an adapter.

    Attributes:
        refusals: why the adapter does not load; empty if it loads.
        layers: {name: what the engine does with the layer}.
        dropped: {tensor: reason} of other trained tensors that the engine silently leaves out.
        notes: what the user should know that depends on versions or on the server's options.
        flags: options that the server needs.
        rank: the adapter's rank as the engine counts it.
        limit: the highest rank that the engine allows; None if there is none.
        portable: how to make the configuration harmless to this engine, where that is possible.
        merge: what to do if nothing else helps.
        is_old: whether the files are in this package's older form, whose factors cancel.

    """

    refusals: list[Refusal] = field(default_factory=list)
    layers: dict[str, Applied | Ignored] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    rank: int = 0
    limit: int | None = None
    portable: str = ""
    merge: str = ""
    is_old: bool = False

    @classmethod
    def of(cls, adapter: StoredAdapter, limit: int | None = None) -> Verdict:
        """An empty verdict with the remedies that work for this adapter."""
        is_old = (adapter.recipe or {}).get("version") == 1
        return cls(
            [], limit=limit, portable=portable(adapter), merge=merging(adapter), is_old=is_old
        )

    def refuse(self, rule: str, remedy: str) -> None:
        self.refusals.append(Refusal(rule, remedy))


Judge = Callable[[StoredAdapter, BaseModel | None], Verdict]


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        name: the engine's name, as users write it.
        as_of: the version whose source was read.
        judge: the engine's rules.

    """

    name: str
    as_of: str
    judge: Judge


def refuse_shapes(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Refuses layers that have another shape in the base; this is a rule of all engines."""
    if base is None:
        return
    wrong = []
    for name, layer in adapter.layers.items():
        there = base.shape(name)
        if there is not None and there != layer.shape and layer.kind != CONVOLUTION:
            wrong.append(f"{name} {list(layer.shape)} instead of {list(there)}")
    if wrong:
        verdict.refuse(
            f"the base has other shapes ([out, in]): {names_in_brief(wrong)}",
            f"{OTHER_BASE}; if its vocabulary was resized, serve the resized model",
        )


def refuse_convolutions(verdict: Verdict, adapter: StoredAdapter) -> None:
    """Refuses convolutions, for an engine that adapts only linear layers."""
    found = [name for name, layer in adapter.layers.items() if layer.kind == CONVOLUTION]
    if found:
        verdict.refuse(f"convolutions cannot be adapted: {names_in_brief(found)}", verdict.merge)


def refuse_missing(verdict: Verdict, config: Mapping[str, Any], *options: str) -> None:
    """Refuses a configuration without these numbers; null is not a default either."""
    missing = [option for option in options if config.get(option) is None]
    if missing:
        verdict.refuse(
            f"adapter_config.json must have {' and '.join(missing)}, which is missing or null",
            "write the numbers of the training into adapter_config.json; r is the rank of the "
            "tensors",
        )


def note_other_files(verdict: Verdict, adapter: StoredAdapter) -> None:
    """Notes other files, for an engine that reads all .safetensors files of a folder."""
    others = sorted(
        name for name in adapter.files if name.endswith(".safetensors") and name != ADAPTER_FILE
    )
    if others:
        verdict.notes.append(
            "it reads all .safetensors files of the folder as parts of the adapter: move "
            f"{names_in_brief(others)} elsewhere"
        )


def fault_of(adapter: StoredAdapter, base: BaseModel | None, known: Container[str] = ()) -> Fault:
    """Why an engine's update is not the trained one, for any scale and dtype: the base is another
    one, or the engine ignores options that are not in `known`. Empty if the update is right.
    """
    fault = residual_fault(adapter, base)
    ignored = [what for option, what in variants(adapter.config).items() if option not in known]
    if ignored and not fault.reason:
        return Fault(f"it ignores {names_in_brief(ignored)}", merging(adapter))
    return fault


def residual_fault(adapter: StoredAdapter, base: BaseModel | None) -> Fault:
    """Why the adapter is wrong on the base: its start was subtracted from another base, or LoftQ
    made another base. Empty if the adapter is right.
    """
    if adapter.is_start:
        model = (adapter.recipe or {}).get("base_model")
        if _is_same(base, model, adapter):
            return Fault()
        return Fault(
            f"it is the start of {model}, which was subtracted from those weights: wrong on the "
            "original model",
            "train it there with PEFT, and convert the result with lora-kernels convert TRAINED "
            f"OUT --start {adapter.path}",
        )
    rewritten = _rewritten_base(adapter, base)
    if rewritten.reason:
        return rewritten
    name = adapter.config.get("base_model_name_or_path")
    trained_on = find_base(name, adapter.path) if isinstance(name, str) else None
    if trained_on is not None and is_start(trained_on / RESIDUAL_ADAPTER):
        if _is_same(base, name, adapter):
            return Fault()
        return Fault(
            f"it was trained on {trained_on}, from whose weights a start was subtracted: wrong on "
            "another model",
            f"lora-kernels convert ADAPTER OUT --start {trained_on / RESIDUAL_ADAPTER}",
        )
    start = changing_start(adapter.config)
    if not start:
        return Fault()
    return Fault(
        f"init_lora_weights = {start!r}: its factors belong to weights from which PEFT subtracted "
        "the start, and are wrong on the original model",
        start_remedy(start),
    )


def _rewritten_base(adapter: StoredAdapter, base: BaseModel | None) -> Fault:
    """The fault of an adapter of this package whose initializer rounds the base (LoftQ)."""
    method = _rewriting_method(adapter)
    model = (adapter.recipe or {}).get("base_model")
    if not method or not (base is None or _is_same(base, model, adapter)):
        return Fault()
    return Fault(
        f"it was trained with {method!r}, which replaced the weights of the base by rounded ones: "
        "wrong on the original model",
        SERVE_MADE_BASE,
    )


def _rewriting_method(adapter: StoredAdapter) -> str:
    """The initializer in the recipe, if it replaces the base; else ""."""
    config = (adapter.recipe or {}).get("config")
    method = config.get("init_lora_weights") if isinstance(config, Mapping) else None
    name = method.get("name") if isinstance(method, Mapping) else method
    if not isinstance(name, str) or name not in initializer_names():
        return ""
    return name if get_initializer(name).rewrites_base else ""


def base_notes(adapter: StoredAdapter, base: BaseModel | None) -> list[str]:
    """Notes on what is unknown about the base that the adapter was trained on."""
    notes = []
    method = _rewriting_method(adapter)
    if method and not _rewritten_base(adapter, base).reason:
        notes.append(
            f"it was trained with {method!r}, which replaced the weights of the base: right only "
            "on the base that it made, which the configuration does not tell from the original"
        )
    name = adapter.config.get("base_model_name_or_path")
    if isinstance(name, str) and find_base(name, adapter.path) is None:
        folders = (Path.cwd(), adapter.path.absolute(), *adapter.path.absolute().parents)
        first = Path(name).parts[0] if Path(name).parts else ""
        is_local = (
            Path(name).is_absolute()
            or name.startswith((".", "~"))
            or "\\" in name
            or name.count("/") > 1
            or ("/" in name and any((folder / first).is_dir() for folder in folders))
        )
        if is_local:
            notes.append(
                f"it was trained on {name}, a folder that is not here: whether a start was "
                "subtracted from its weights, which makes the adapter wrong on another model, is "
                "not known"
            )
    return notes


def _is_same(base: BaseModel | None, model: Any, adapter: StoredAdapter) -> bool:
    """Whether the base is the model in the folder `model`."""
    there = find_base(model, adapter.path) if isinstance(model, str) else None
    if base is None or there is None:
        return False
    folder = base.path if base.path.is_dir() else base.path.parent
    return folder.samefile(there)
