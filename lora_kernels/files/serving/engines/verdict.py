"""What an engine does with an adapter: the words in which all engines' rules are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...._utils.peft_names import ADAPTER_FILE, VARIANTS, base_changing_start
from ...checkpoint.residual import ADAPTER as RESIDUAL_ADAPTER
from ...checkpoint.residual import is_start
from ..stored import StoredAdapter, names_in_brief
from .model import BaseModel

Factors = tuple[Tensor, Tensor]

RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
PORTABLE = "lora-kernels convert ADAPTER OUT writes the form that all engines read alike"
MERGE = (
    "merge it into the model (lora-kernels merge BASE ADAPTER OUT, or PEFT's merge_and_unload) and "
    "serve that"
)


@dataclass(frozen=True)
class Refusal:
    """Why an engine does not load an adapter, and what to do."""

    rule: str
    remedy: str


@dataclass(frozen=True)
class Applied:
    """How an engine applies a layer.

    Attributes:
        scale: what it multiplies B·A with.
        dtype: that of the factors in the engine.
        folded: whether the engine multiplies B with `scale` and rounds the product to `dtype`.
        fault: why the result is another one than was trained, if scale and dtype do not show it.
        change: what else it does to A and B, so that its error is measured.

    """

    scale: float
    dtype: torch.dtype
    folded: bool = False
    fault: str = ""
    change: Callable[[Factors], Factors] | None = None

    def factors(self, factors: Factors) -> tuple[Tensor, Tensor, float]:
        """A, B and s with which the engine computes."""
        right, left = self.change(factors) if self.change else factors
        right, left = right.to(self.dtype), left.to(self.dtype)
        if not self.folded or self.scale == 1:  # then nothing is rounded again
            return right, left, self.scale
        return right, (left * self.scale).to(self.dtype), 1.0


@dataclass(frozen=True)
class Ignored:
    """Why an engine silently leaves a layer out, and the name by which it would not."""

    reason: str
    name: str | None = None


@dataclass
class Verdict:
    """What an engine does with an adapter.

    Attributes:
        refusals: why it does not load; empty if it does.
        layers: what it does with each layer, by name.
        dropped: other trained tensors that it silently leaves out, and why.
        notes: what the user should know, that depends on versions or on how the server is started.
        flags: options that the server needs.
        rank: what it calls the rank of the adapter.
        limit: the highest rank that it takes; None if there is none.

    """

    refusals: list[Refusal] = field(default_factory=list)
    layers: dict[str, Applied | Ignored] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    rank: int = 0
    limit: int | None = None

    def refuse(self, rule: str, remedy: str) -> None:
        self.refusals.append(Refusal(rule, remedy))


Judge = Callable[[StoredAdapter, BaseModel | None], Verdict]


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        name: as users write it.
        as_of: the version whose source was read.
        judge: its rules.

    """

    name: str
    as_of: str
    judge: Judge


def refuse_shapes(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Refuses layers that have another shape in the base, with any engine."""
    if base is None:
        return
    wrong = []
    for name, layer in adapter.layers.items():
        there = base.shape(name)
        if there is not None and there != layer.shape and layer.kind != "convolution":
            wrong.append(f"{name} {list(layer.shape)} instead of {list(there)}")
    if wrong:
        verdict.refuse(
            f"the base has other shapes ([out, in]): {names_in_brief(wrong)}",
            "use the base that the adapter was trained on; if its vocabulary was resized, serve "
            "the resized model",
        )


def note_other_files(verdict: Verdict, adapter: StoredAdapter) -> None:
    """Notes files that an engine reads which takes all .safetensors files of a folder."""
    others = sorted(
        name for name in adapter.files if name.endswith(".safetensors") and name != ADAPTER_FILE
    )
    if others:
        verdict.notes.append(
            "it reads all .safetensors files of the folder as parts of the adapter: move "
            f"{names_in_brief(others)} elsewhere"
        )


def residual_fault(adapter: StoredAdapter, base: BaseModel | None) -> str:
    """Why the adapter is wrong on the base: its start was subtracted from another one; "" if it is
    right.
    """
    if adapter.is_start:
        model = (adapter.recipe or {}).get("base_model")
        if _is_same(base, model):
            return ""
        return (
            f"it is the start of {model}, which was subtracted from those weights: wrong on the "
            "original model. Train it there with PEFT, and convert the result with lora-kernels "
            f"convert TRAINED OUT --start {adapter.path}"
        )
    trained_on = adapter.config.get("base_model_name_or_path")
    if isinstance(trained_on, str) and is_start(Path(trained_on) / RESIDUAL_ADAPTER):
        if _is_same(base, trained_on):
            return ""
        return (
            f"it was trained on {trained_on}, from whose weights a start was subtracted: wrong on "
            "another model. Convert it with lora-kernels convert ADAPTER OUT --start "
            f"{Path(trained_on) / RESIDUAL_ADAPTER}"
        )
    start = changing_start(adapter.config)
    if not start:
        return ""
    return (
        f"init_lora_weights = {start!r}: its factors belong to weights from which PEFT subtracted "
        "the start, and are wrong on the original model. Convert it with lora-kernels convert "
        "ADAPTER OUT --start <the adapter saved before training>, or serve the changed base"
    )


def _is_same(base: BaseModel | None, model: Any) -> bool:
    """Whether the base is the folder `model`."""
    if base is None or not isinstance(model, str) or not Path(model).is_dir():
        return False
    folder = base.path if base.path.is_dir() else base.path.parent
    return folder.samefile(model)


def changing_start(config: Mapping[str, Any]) -> str:
    """The option `init_lora_weights`, if PEFT changed the base for it; else ""."""
    start = config.get("init_lora_weights")
    return str(start) if base_changing_start(start) else ""


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


def variants(config: Mapping[str, Any]) -> dict[str, str]:
    """{option: what it does} of the variants of LoRA that the configuration turns on."""
    return {option: VARIANTS[option] for option in _DECISIVE if config.get(option)}
