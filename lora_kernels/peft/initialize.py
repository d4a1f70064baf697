"""`initialize`: any start of ours for the LoRA layers of a `PeftModel`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from .._utils.peft_names import PREFIX
from ..init import Initializer, Start, get_initializer
from ..init.base import refuse_implicit
from ..layers.base import base_of
from ..model.starts import StartJob, make_starts, matched_gradients, naming
from .layers import (
    adapter_of,
    check_model,
    described,
    has_adapter,
    lora_layers,
    why_not_linear,
)
from .overrides import install, uninstall
from .variant import drop_start, set_start, start_of

# PEFT's own starts that are taken out of the base's weights when the adapter is made.
_REWRITE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# On the PeftModel: how often each adapter was initialised and not undone.
_DEPTH = "_lora_kernels_depth"


@dataclass
class InitializeReport:
    """What `initialize` did. `undo()` takes it back."""

    method: str
    adapter_name: str
    layers: list[str]
    subtracted: bool
    left: dict[str, str]
    seconds: float
    _model: peft.PeftModel = field(repr=False)
    _before: dict[str, _Snapshot] = field(repr=False)
    _depth: int = field(repr=False)
    _undone: bool = field(default=False, repr=False)

    def undo(self) -> None:
        """A, B and what was subtracted as they were before, bit for bit, training since included.

        A second call does nothing, nor does it after the adapter was deleted.

        Raises:
            RuntimeError: the adapter was initialised again since, or is merged, or was replaced by
                another of its name.

        """
        if self._undone:
            return
        name, depths = self.adapter_name, getattr(self._model, _DEPTH)
        if depths[name] != self._depth:
            raise RuntimeError(f"adapter {name!r} was initialised again since: undo that first")
        _refuse_merged(self._model)
        layers = {n: layer for n, layer in lora_layers(self._model).items() if n in self._before}
        layers = {n: layer for n, layer in layers.items() if name in layer.lora_A}
        for layer_name, layer in layers.items():
            if not self._before[layer_name].fits(layer, name):
                raise RuntimeError(
                    f"{layer_name}: adapter {name!r} is not the one that was initialised"
                )
        for layer_name, layer in layers.items():
            self._before[layer_name].restore(layer, name)
        depths[name] -= 1
        self._undone = True
        if not any(depths.values()):
            delattr(self._model, _DEPTH)
            uninstall(self._model)

    def __str__(self) -> str:
        how = ", s·B₀A₀ subtracted by the layers" if self.subtracted else ""
        lines = [
            f"{self.method} start of adapter {self.adapter_name!r}: {len(self.layers)} layers"
            f"{how}, {self.seconds:.2f} s"
        ]
        return "\n".join(lines + described(self.left))


@dataclass
class _Snapshot:
    """A layer's adapter."""

    lora_A: Tensor
    lora_B: Tensor
    start: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, layer: LoraLayer, adapter: str) -> _Snapshot:
        A, B = _factors(layer, adapter)
        return cls(A.detach().clone(), B.detach().clone(), start_of(layer, adapter))

    def fits(self, layer: LoraLayer, adapter: str) -> bool:
        A, B = _factors(layer, adapter)
        return A.shape == self.lora_A.shape and B.shape == self.lora_B.shape

    def restore(self, layer: LoraLayer, adapter: str) -> None:
        _write(layer, adapter, self.lora_A, self.lora_B)
        if self.start is None:
            drop_start(layer, adapter)
        else:
            set_start(layer, adapter, *self.start)


def initialize(
    peft_model: peft.PeftModel,
    init_lora_weights: str | Initializer = "loram",
    *,
    adapter_name: str | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> InitializeReport:
    """Starts an adapter of a PEFT model anew: `lora_A` and `lora_B` of every linear LoRA layer.

    A start that is not zero is taken out of the layer, as `LoRALinear` does with
    residual="implicit": the layer subtracts the constant s·B₀A₀ while the adapter is active, and
    the base's weights stay as they are, bit for bit, for `disable_adapter`, for other adapters and
    if they are quantised. Merging gives W + s·(BA − B₀A₀).

    `save_pretrained` then writes an adapter of rank 2r, [A; A₀] and [B, −B₀], which plain PEFT
    loads on the original base with the same outputs. `load_adapter` on a model that was
    initialised, in this or a later process and by any method, takes such a folder back at rank r
    and exactly: so `Trainer` resumes. It takes one of `lora_kernels.save_adapter` too, and
    `lora_kernels.load_adapter` takes this one.

    `add_adapter` with the configuration object of an adapter that has a start gives the new one
    that start: TRL makes its reference model so. `get_peft_model_state_dict` gives A and B at rank
    r with A₀ and B₀ beside them, which plain PEFT passes over: use `save_pretrained`.

    A₀ and B₀ are buffers. `DistributedDataParallel` sends buffers around before every forward
    unless it is told broadcast_buffers=False (`ddp_broadcast_buffers` of `TrainingArguments`): here
    it can be.

    All starts are computed before anything is changed; an error leaves the model as it was.

    Args:
        peft_model: what `get_peft_model` gave. LoRA layers over `nn.Linear`, GPT-2's `Conv1D` and
            their quantised kin are initialised; the report says which were left, and why.
        init_lora_weights: a name or an object of `lora_kernels.init`. Those that train an R between
            A and B do not fit PEFT's layers.
        adapter_name: None, the active adapter.
        gradients: {layer: G [out, in]}, for starts from the loss gradient; layers by their names in
            the base model or in the PEFT model, as `capture_gradients` gives them.
        progress: a bar, where rich is installed and standard error is a terminal.

    Returns:
        The report, whose `undo()` gives A and B back.

    Raises:
        TypeError: not a `PeftModel`, or not of LoRA adapters; a weight that cannot be read.
        ValueError: an unknown adapter or method; a method with an R; a start that cannot be
            computed, with the layer's name; a base that another adapter of the model has changed
            ("pissa", "olora" ... of PEFT).
        RuntimeError: an adapter is merged.

    """
    began = time.perf_counter()
    check_model(peft_model)
    initializer = get_initializer(init_lora_weights)
    refuse_implicit(initializer, "implicit")
    adapter = adapter_of(peft_model, adapter_name)
    _refuse_changed_base(peft_model)
    _refuse_merged(peft_model)
    layers, left = _linear_layers(peft_model, adapter)
    starts = _all_starts(layers, adapter, initializer, gradients, progress)
    before = {name: _Snapshot.of(layer, adapter) for name, layer in layers.items()}
    for name, layer in layers.items():
        _write(layer, adapter, starts[name].lora_A, starts[name].lora_B)
        if initializer.changes_base:
            # What A and B hold, in their dtypes: the forward's two parts cancel then.
            set_start(layer, adapter, *_factors(layer, adapter))
        else:
            drop_start(layer, adapter)
    install(peft_model)
    depths = getattr(peft_model, _DEPTH, None)
    if depths is None:
        depths = {}
        setattr(peft_model, _DEPTH, depths)
    depths[adapter] = depths.get(adapter, 0) + 1
    return InitializeReport(
        method=type(initializer).__name__,
        adapter_name=adapter,
        layers=list(layers),
        subtracted=initializer.changes_base,
        left=left,
        seconds=time.perf_counter() - began,
        _model=peft_model,
        _before=before,
        _depth=depths[adapter],
    )


def _refuse_merged(peft_model: peft.PeftModel) -> None:
    """Raises RuntimeError if A and B are in the base's weights, from which PEFT will take them."""
    merged = {a for layer in lora_layers(peft_model).values() for a in layer.merged_adapters}
    if merged:
        raise RuntimeError(
            f"merged into the base: {', '.join(sorted(merged))}; call unmerge_adapter() first"
        )


def _refuse_changed_base(peft_model: peft.PeftModel) -> None:
    for name, config in peft_model.peft_config.items():
        method = config.init_lora_weights
        if isinstance(method, str) and method.lower().startswith(_REWRITE_BASE):
            raise ValueError(
                f"adapter {name!r} was made with init_lora_weights={method!r}, for which PEFT has "
                "rewritten the base's weights: make it with init_lora_weights=True, on a fresh base"
            )


def _linear_layers(
    peft_model: peft.PeftModel, adapter: str
) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    """The layers to initialise, and why others that have the adapter are left."""
    if getattr(peft_model.peft_config[adapter], "target_modules_to_tie", None):
        raise ValueError(f"adapter {adapter!r} ties layers to the embedding's adapter")
    layers, left = {}, {}
    for name, layer in lora_layers(peft_model).items():
        if not has_adapter(layer, adapter):
            continue
        reason = why_not_linear(layer, adapter)
        if reason is None:
            layers[name] = layer
        else:
            left[name] = reason
    if not layers:
        why = "; ".join(line.strip() for line in described(left))
        raise ValueError(
            f"adapter {adapter!r} has no linear layer to initialise{why and ': '}{why}"
        )
    return layers, left


def _all_starts(
    layers: Mapping[str, LoraLayer],
    adapter: str,
    initializer: Initializer,
    gradients: Mapping[str, Tensor] | None,
    progress: bool,
) -> dict[str, Start]:
    """Every layer's start, checked."""
    if gradients is not None:
        gradients = {
            name.removeprefix(PREFIX).removesuffix(".base_layer"): gradient
            for name, gradient in gradients.items()
        }
    matched = matched_gradients(dict.fromkeys(layers, ()), initializer, gradients)
    jobs = []
    for name, layer in layers.items():
        base = base_of(layer.get_base_layer())
        with naming(name):
            if base is None:
                kind = type(layer.get_base_layer()).__name__
                raise TypeError(f"{kind} is no linear layer that can be adapted")
            if any(factor.is_meta for factor in _factors(layer, adapter)):
                raise ValueError("its lora_A and lora_B are on the meta device: load them first")
        base.refuse_sharded(name)
        r, scaling = layer.r[adapter], layer.scaling[adapter]
        jobs.append(StartJob(name, base, initializer, r, scaling, gradient=matched[name]))
    starts = make_starts(jobs, progress)
    if any(start.lora_R is not None for start in starts.values()):
        raise ValueError(
            f"{type(initializer).__name__} trains an R between a frozen A and B, for which PEFT's "
            "layer has no place: use lora_kernels.add_lora"
        )
    return starts


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


@torch.no_grad()
def _write(layer: LoraLayer, adapter: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """In place: an optimiser may know the parameters already."""
    for parameter, value in zip(_factors(layer, adapter), (lora_A, lora_B), strict=True):
        parameter.copy_(value)
