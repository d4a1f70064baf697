"""Checks how serving engines would load an adapter, without running them: what they refuse, which
layers they leave out, and how far the updates that they apply are from the trained ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..._utils.errors import did_you_mean
from .engines import ENGINES
from .engines.experts import judge_layouts
from .engines.model import BaseModel, read_base
from .engines.ollama import takes
from .engines.verdict import (
    REFUSED,
    RIGHT,
    WRONG,
    Applied,
    Engine,
    Ignored,
    Refusal,
    Verdict,
    base_notes,
)
from .remedies import OTHER_BASE, renaming
from .stored import DIFFUSERS, NATIVE, PEFT, StoredAdapter, StoredLayer, read_stored
from .updates import Update, relative_error, trained_scale, trained_update

TOLERANCE = 0.005  # relative to ‖ΔW‖_F of each layer; a cast to bfloat16 takes half of it
_PIPELINE = ("down_blocks", "up_blocks", "mid_block", "transformer_blocks",
             "single_transformer_blocks", "double_blocks", "single_blocks")  # fmt: skip
_TEXT_ENGINES = ("vllm", "sglang", "llama.cpp", "peft")


@dataclass(frozen=True)
class LayerResult:
    """What an engine does with one layer.

    Attributes:
        name: the module's name without "base_model.model.".
        effect: whether the layer is applied at all.
        reason: why it is not applied, or why the update is not the trained one; "" if right.
        matching_name: the name with which it would have an effect; None if there is none.
        scale: the s that the engine applies; None without effect.
        trained_scale: the s of the training.
        dtype: the dtype of the factors in the engine; None without effect.
        error: ‖ΔW − ΔW_trained‖_F / ‖ΔW_trained‖_F; None if it cannot be computed, 1 without
            effect.
        remedy: what to do; "" if the layer is right.

    """

    name: str
    effect: bool
    reason: str
    matching_name: str | None
    scale: float | None
    trained_scale: float
    dtype: torch.dtype | None
    error: float | None
    remedy: str = ""

    @property
    def strength(self) -> float:
        """The applied s relative to the trained s: 1 if right, 0 without effect."""
        if self.scale is None:
            return 0.0
        if self.trained_scale:
            return self.scale / self.trained_scale
        return math.inf if self.scale else 1.0

    @property
    def is_right(self) -> bool:
        known = self.error is not None and self.error <= TOLERANCE
        return known and not self.reason and self.effect


@dataclass(frozen=True)
class Result:
    """What an engine does with an adapter.

    Attributes:
        engine: the engine's name.
        as_of: the version whose rules these are.
        layers: all layers of the adapter; empty if the engine cannot read its files at all.
        verdict: refusals, notes and similar.
        names_compared: whether the names of the base's modules are known.

    """

    engine: str
    as_of: str
    layers: list[LayerResult]
    verdict: Verdict
    names_compared: bool

    @property
    def outcome(self) -> str:
        """RIGHT: all layers are applied as trained. WRONG: it loads, but differs. Or REFUSED."""
        if self.verdict.refusals:
            return REFUSED
        right = all(layer.is_right for layer in self.layers) and not self.verdict.dropped
        return RIGHT if right else WRONG

    @property
    def remedies(self) -> list[str]:
        """What to do, without repetitions; empty if nothing is wrong."""
        found = [refusal.remedy for refusal in self.verdict.refusals]
        found += [layer.remedy for layer in self.layers]
        found += [self.verdict.merge] if self.verdict.dropped else []
        return [remedy for remedy in dict.fromkeys(found) if remedy]

    @property
    def worst_error(self) -> float | None:
        """The largest error of all layers; None if no error is known."""
        errors = [layer.error for layer in self.layers if layer.error is not None]
        return max(errors, default=None)


def check(
    adapter: Path, base: Path | None = None, engines: Sequence[str] | None = None
) -> list[Result]:
    """Checks how engines would load an adapter.

    Args:
        adapter: a folder of PEFT, Axolotl, Unsloth or this package, or a file or folder of
            diffusers.
        base: the base's folder, or its `config.json`. Names and shapes are compared with the model
            that transformers builds from it, and factors are cast to its dtype. Without a base,
            names are not compared, and engines that cast are assumed to cast to bfloat16.
        engines: names in `ENGINES`; by default those of `engines_for`.

    Raises:
        FileNotFoundError: there is no adapter, or no configuration of the base.
        ValueError: an engine is unknown, or files are damaged or hold something other than LoRA.

    """
    chosen = None if engines is None else [_engine(name) for name in dict.fromkeys(engines)]
    stored = read_stored(adapter)
    model = None if base is None else read_base(base, stored.layers)
    if chosen is None:
        chosen = [ENGINES[name] for name in engines_for(stored, model)]
    return judged(stored, model, chosen)


def engines_for(adapter: StoredAdapter, base: BaseModel | None) -> list[str]:
    """The engines that may support this kind of adapter.

    A diffusers file: diffusers. A PEFT folder whose layers are those of a pipeline's model:
    diffusers and PEFT. Other folders: vLLM, SGLang, llama.cpp and PEFT, and Ollama if the base has
    one of the two architectures whose adapters Ollama converts.
    """
    if adapter.kind == DIFFUSERS:
        return ["diffusers"]
    pipeline = any(part in _PIPELINE for name in adapter.layers for part in name.split("."))
    if adapter.kind == PEFT and pipeline:
        return ["diffusers", "peft"]
    chosen = set(_TEXT_ENGINES) | ({"ollama"} if takes(base) else set())
    return [name for name in ENGINES if name in chosen]


def judged(
    adapter: StoredAdapter, base: BaseModel | None, engines: Sequence[Engine]
) -> list[Result]:
    """The results of these engines. The factors of each layer are loaded once."""
    for layer in adapter.layers.values():  # wrong options are an error before any rule reads them
        trained_scale(adapter, layer)
    verdicts = [_verdict(adapter, base, engine) for engine in engines]
    rows: list[list[LayerResult]] = [[] for _ in engines]
    for name, layer in adapter.layers.items():
        trained = trained_update(adapter, layer)
        measured: dict[Applied, float] = {}
        for verdict, results in zip(verdicts, rows, strict=True):
            found = verdict.layers.get(name)
            if isinstance(found, Applied):
                folded = found.folded and found.scale != 1
                key = replace(found, fault="", remedy="", folded=folded)
                if key not in measured:
                    measured[key] = _error(key, trained)
                result = _applied(layer, found, trained, measured[key])
                if not result.is_right and not result.remedy:
                    result = replace(result, remedy=_remedy(verdict, result, key, trained))
                results.append(result)
            elif isinstance(found, Ignored):
                remedy = found.remedy or renaming(name, found.name) or OTHER_BASE
                results.append(LayerResult(name, False, found.reason, found.name, None,
                                           trained.scale, None, 1.0, remedy))  # fmt: skip
    compared = base is not None and base.architecture is not None
    for verdict in verdicts:
        if verdict.portable:  # the engine's own rules have judged
            verdict.notes += base_notes(adapter, base)
        if base is not None and not compared:
            verdict.notes.append(f"names were not compared with the base: {base.unknown}")
        if base is not None and base.assumed:
            verdict.notes.append(
                f"{base.path} names no class (architectures): {base.assumed} is assumed"
            )
    return [
        Result(engine.name, engine.as_of, results, verdict, compared)
        for engine, results, verdict in zip(engines, rows, verdicts, strict=True)
    ]


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise ValueError(
            f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}"
            f"{did_you_mean(name.lower(), ENGINES)}"
        )
    return ENGINES[name]


def _verdict(adapter: StoredAdapter, base: BaseModel | None, engine: Engine) -> Verdict:
    """The engine's verdict; a refusal, without the engine's rules, if the files are not for it."""
    if adapter.kind == NATIVE:
        rule = "the native format of lora_kernels is read by no engine"
        remedy = "lora-kernels convert ADAPTER OUT --to peft"
    elif adapter.kind == DIFFUSERS and engine.name != "diffusers":
        rule = "it needs a folder of PEFT, with adapter_config.json and adapter_model.safetensors"
        remedy = "use diffusers, or save the adapter from PEFT"
    else:
        verdict = engine.judge(adapter, base)
        judge_layouts(verdict, adapter, base)
        return verdict
    return Verdict([Refusal(rule, remedy)])


def _error(applied: Applied, trained: Update) -> float:
    right, left, scale = applied.factors((trained.right, trained.left))
    return relative_error(Update(right, left, scale), trained)


def _applied(layer: StoredLayer, found: Applied, trained: Update, error: float) -> LayerResult:
    # The factors do not show what a fault does, except a change that was measured.
    known = None if found.fault and found.change is None else error
    result = LayerResult(layer.name, True, found.fault, None, found.scale, trained.scale,
                         found.dtype, known)  # fmt: skip
    return result if result.is_right else replace(result, remedy=found.remedy)


def _remedy(verdict: Verdict, result: LayerResult, applied: Applied, trained: Update) -> str:
    """What to do about a layer whose scale or dtype is wrong."""
    if not (trained.right.isfinite().all() and trained.left.isfinite().all()):
        return "the file has values that are not finite: save or train the adapter again"
    if not math.isclose(result.strength, 1, rel_tol=TOLERANCE):
        return verdict.portable
    for dtype in (torch.bfloat16, torch.float16):
        if _error(replace(applied, dtype=dtype), trained) <= TOLERANCE:
            name = str(dtype).removeprefix("torch.")
            return f"serve the model in {name} (--dtype {name}, or torch_dtype of diffusers)"
    return verdict.portable if verdict.is_old else verdict.merge
