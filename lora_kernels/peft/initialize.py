"""`initialize`: any start of `lora_kernels.init` for the LoRA layers of a `PeftModel`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor

from .._utils.peft_names import PREFIX, base_changing_start
from ..init import Activations, Initializer, Start, get_initializer
from ..init.base import refuse_implicit
from ..init.sharded.layout import is_sharded
from ..layers.base import BaseLayer, base_of
from ..model.selection import bypassed_layers
from ..model.starts import StartJob, make_starts
from .experts.wrappers import experts_base, in_layout_of, rank_in
from .foreign_kernels import explained, kernels_past
from .layers import (
    DEPTH,
    adapter_of,
    check_model,
    described,
    has_adapter,
    lora_layers,
    original_name,
    pattern_name,
    why_not_startable,
)
from .overrides import install, uninstall
from .variant import (
    drop_start,
    factors_of,
    magnitude_of,
    measure_magnitude,
    set_start,
    start_of,
)

T = TypeVar("T")


@dataclass
class InitializeReport:
    """What `initialize` did; `undo()` reverts it.

    `layers` are the names of the initialized layers. `left` is {name: reason} of the other layers
    that have the adapter. `subtracted` says whether the layers subtract s·B₀A₀. `seconds` is the
    duration.
    """

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
        """Restores A, B, magnitudes and the subtracted factors bit for bit; later training is lost.

        A second call does nothing; neither does a call after the adapter was deleted.

        Raises:
            RuntimeError: the adapter was initialized again since, is merged, or was replaced by
                another one of the same name.

        """
        if self._undone:
            return
        name, depths = self.adapter_name, getattr(self._model, DEPTH)
        if depths[name] != self._depth:
            raise RuntimeError(f"adapter {name!r} was initialized again since: undo that first")
        _refuse_merged(self._model)
        layers = {n: layer for n, layer in lora_layers(self._model).items() if n in self._before}
        layers = {n: layer for n, layer in layers.items() if has_adapter(layer, name)}
        for layer_name, layer in layers.items():
            if not self._before[layer_name].fits(layer, name):
                raise RuntimeError(
                    f"{layer_name}: adapter {name!r} is not the one that was initialized"
                )
        for layer_name, layer in layers.items():
            self._before[layer_name].restore(layer, name)
        depths[name] -= 1
        self._undone = True
        if not any(depths.values()):
            delattr(self._model, DEPTH)
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
    """A copy of one layer's adapter: A [r, in], B [out, r], A₀ and B₀ if the layer has them (all of
    these for experts in PEFT's layout), and the magnitudes [out] of a DoRA adapter.
    """

    lora_A: Tensor
    lora_B: Tensor
    start: tuple[Tensor, Tensor] | None
    magnitude: Tensor | None

    @classmethod
    def of(cls, layer: LoraLayer, adapter: str) -> _Snapshot:
        A, B = _factors(layer, adapter)
        own = magnitude_of(layer, adapter)
        magnitude = None if own is None else own.detach().clone()
        return cls(A.detach().clone(), B.detach().clone(), start_of(layer, adapter), magnitude)

    def fits(self, layer: LoraLayer, adapter: str) -> bool:
        A, B = _factors(layer, adapter)
        same_kind = (magnitude_of(layer, adapter) is None) == (self.magnitude is None)
        return A.shape == self.lora_A.shape and B.shape == self.lora_B.shape and same_kind

    def restore(self, layer: LoraLayer, adapter: str) -> None:
        _write(layer, adapter, self.lora_A, self.lora_B)
        if self.start is None:
            drop_start(layer, adapter)
        else:
            set_start(layer, adapter, *self.start)
        magnitude = magnitude_of(layer, adapter)
        if magnitude is not None and self.magnitude is not None:
            with torch.no_grad():
                magnitude.copy_(self.magnitude)


def initialize(
    peft_model: peft.PeftModel,
    init_lora_weights: str | Initializer = "loram",
    *,
    adapter_name: str | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Activations] | None = None,
    progress: bool = True,
) -> InitializeReport:
    """Gives an adapter of a PEFT model new initial factors. It overwrites `lora_A` [r, in] and
    `lora_B` [out, r] of every linear LoRA layer, `lora_embedding_A` [r, V] and `lora_embedding_B`
    [D, r] of embeddings, and the factors of experts' parameters (PEFT's `target_parameters`), where
    every expert gets a start from its own weight.

    If the initial B₀A₀ is not zero, the layer subtracts it, like `LoRALinear` with
    residual="implicit": while the adapter is active, every forward subtracts the constant s·B₀A₀.
    The base's weights do not change, so that `disable_adapter`, other adapters and quantized bases
    work as before. Merging gives W + s·(BA − B₀A₀).

    `save_pretrained` then writes the portable form, with s in B and at rank 2r if a start is
    subtracted, which plain PEFT and servers load on the original base with the same outputs. On an
    initialized model, `load_adapter` reads such a folder back exactly, at rank r, whichever start
    was used and also in a later process, so that `Trainer` can resume. It also reads folders of
    `lora_kernels.save_adapter`, and `lora_kernels.load_adapter` reads the folders written here.

    The magnitudes of DoRA adapters (PEFT's `use_dora`) are measured again, in float32: they are the
    norms of the rows of W + s·(BA − B₀A₀) with the new start.

    If `add_adapter` is given the configuration object of an adapter that subtracts A₀ and B₀, the
    new adapter gets the same A₀ and B₀, as TRL's reference model needs. `get_peft_model_state_dict`
    returns A and B of rank r, with A₀ and B₀ as additional tensors that plain PEFT ignores; use
    `save_pretrained` instead. If an initialized model loads a state_dict, it takes A₀ and B₀
    together with A and B; if these come without A₀ and B₀, the model warns and no longer subtracts
    anything.

    A₀ and B₀ are buffers. `DistributedDataParallel` broadcasts all buffers before every forward,
    which A₀ and B₀ do not need: set broadcast_buffers=False (`ddp_broadcast_buffers` in
    `TrainingArguments`).

    Fused LoRA kernels, such as Axolotl's and Unsloth's, read a layer's weight, `lora_A` and
    `lora_B` without calling the layer, so that nothing would be subtracted. Models with such
    kernels allow only starts with BA = 0. If the kernels are installed after `initialize`, the
    model raises an error before its first forward and when it is put into training mode, and warns
    when it is saved.

    All starts are computed before anything is changed; after an error the model is unchanged.

    Args:
        peft_model: the result of `get_peft_model`. LoRA layers over `nn.Linear`, GPT-2's `Conv1D`,
            quantized linear layers, embeddings and the floating-point experts of transformers'
            decorated classes are initialized; the report names the others, with reasons.
        init_lora_weights: a name or an object of `lora_kernels.init`. Starts that train an R or a λ
            between A and B, or only one of A and B, are not possible in PEFT's layers.
        adapter_name: the adapter; the active one if None.
        gradients: {layer: ∂loss/∂W [out, in]} from `capture_gradients`, for starts that are
            computed from gradients; for experts {parameter: [E, out, in]}. Layers have their names
            in the base model or in the PEFT model.
        activations: {layer: statistics of its input} from `capture_activations`, for starts that
            are computed from inputs. The adapter's ranks do not change: EVA does not redistribute
            them here.
        progress: whether to show a bar; needs rich, and a terminal as standard error.

    Returns:
        A report, whose `undo()` restores A and B.

    Raises:
        TypeError: the model is not a `PeftModel`, or has adapters other than LoRA, or a weight
            cannot be read.
        ValueError: an unknown adapter or start; a start with an R or a λ; a start that cannot be
            computed (the message names the layer); a base whose weights another adapter has changed
            (PEFT's "pissa", "olora" ...); or a start to subtract in layers that another package's
            kernels compute.
        RuntimeError: an adapter is merged.

    """
    began = time.perf_counter()
    check_model(peft_model)
    initializer = get_initializer(init_lora_weights)
    refuse_implicit(initializer, "implicit")
    _refuse_other_layers(initializer)
    adapter = adapter_of(peft_model, adapter_name)
    _refuse_changed_base(peft_model)
    _refuse_merged(peft_model)
    kernels = kernels_past(peft_model)
    layers, left = _linear_layers(peft_model, adapter, kernels)
    _refuse_kernels(initializer, {name: kernels[name] for name in layers if name in kernels})
    starts = _all_starts(layers, adapter, initializer, gradients, activations, progress)
    before = {name: _Snapshot.of(layer, adapter) for name, layer in layers.items()}
    for name, layer in layers.items():
        start = starts[name]
        _write(layer, adapter, *in_layout_of(layer, start.lora_A, start.lora_B))
        if initializer.changes_base:
            # A₀ and B₀ are A and B as rounded to their dtypes: BA − B₀A₀ is exactly zero at first.
            set_start(layer, adapter, *_factors(layer, adapter))
        else:
            drop_start(layer, adapter)
        measure_magnitude(layer, adapter)
    install(peft_model)
    depths = getattr(peft_model, DEPTH, None)
    if depths is None:
        depths = {}
        setattr(peft_model, DEPTH, depths)
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
    """Raises RuntimeError if an adapter is merged: unmerging would subtract the new A and B."""
    merged = {a for layer in lora_layers(peft_model).values() for a in layer.merged_adapters}
    if merged:
        raise RuntimeError(
            f"merged into the base: {', '.join(sorted(merged))}; call unmerge_adapter() first"
        )


def _refuse_changed_base(peft_model: peft.PeftModel) -> None:
    for name, config in peft_model.peft_config.items():
        method = config.init_lora_weights
        if base_changing_start(method):
            raise ValueError(
                f"adapter {name!r} was made with init_lora_weights={method!r}, for which PEFT has "
                "rewritten the base's weights: load the base again, and make the adapter with "
                "init_lora_weights=True"
            )


def _refuse_kernels(initializer: Initializer, kernels: Mapping[str, str]) -> None:
    if initializer.changes_base and kernels:
        raise ValueError(
            f"{type(initializer).__name__} starts with BA that is not zero: {explained(kernels)}"
        )


def _linear_layers(
    peft_model: peft.PeftModel, adapter: str, kernels: Mapping[str, str]
) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    """The layers to initialize, and {name: reason} of the other layers that have the adapter.

    Layers in `kernels`, {name: kernel}, are initialized although no module calls them: these
    kernels read A and B together with the weight.
    """
    if getattr(peft_model.peft_config[adapter], "target_modules_to_tie", None):
        raise ValueError(f"adapter {adapter!r} ties layers to the embedding's adapter")
    bypassed = bypassed_layers(peft_model.get_base_model())
    layers, left = {}, {}
    for name, layer in lora_layers(peft_model).items():
        if not has_adapter(layer, adapter):
            continue
        reason = why_not_startable(layer, adapter)
        if reason is None and name not in kernels:
            reason = bypassed.get(name)
        if reason is None:
            layers[name] = layer
        else:
            left[name] = reason
    if not layers:
        why = "; ".join(line.strip() for line in described(left))
        raise ValueError(
            f"adapter {adapter!r} has no linear layer to initialize{why and ': '}{why}"
        )
    return layers, left


def _all_starts(
    layers: Mapping[str, LoraLayer],
    adapter: str,
    initializer: Initializer,
    gradients: Mapping[str, Tensor] | None,
    activations: Mapping[str, Activations] | None,
    progress: bool,
) -> dict[str, Start]:
    """The checked start of every layer, by the layer's name."""
    gradients, activations = _by_original_name(gradients), _by_original_name(activations)
    jobs = []
    for name, layer in layers.items():
        base: BaseLayer | None
        if isinstance(layer, ParamWrapper):
            base = experts_base(layer)
        else:
            base = base_of(layer.get_base_layer())
        assert base is not None  # `why_not_startable` has checked it
        A, B = _factors(layer, adapter)
        if A.is_meta or B.is_meta:
            raise ValueError(
                f"{name}: its lora_A and lora_B are on the meta device: load them first"
            )
        original = pattern_name(name, layer)
        base.refuse_sharded(original)
        if base.sharded or is_sharded(A) or is_sharded(B):
            raise ValueError(
                f"{name} is sharded: give PEFT's adapters their start before the model is sharded, "
                "or use lora_kernels.add_lora, which starts adapters on shards"
            )
        # PEFT's hot-swapping changes the rank of A and B, and makes s a tensor.
        r, scaling = rank_in(layer, A), float(layer.scaling[adapter])
        aliases = (original,)
        jobs.append(StartJob(name, base, initializer, r, scaling, aliases=aliases))
    starts = make_starts(jobs, gradients, progress, activations)
    if any(start.lora_R is not None for start in starts.values()):
        raise ValueError(
            f"{type(initializer).__name__} trains an R between a frozen A and B, which PEFT's "
            "layers do not have: use lora_kernels.add_lora"
        )
    return starts


def _by_original_name(given: Mapping[str, T] | None) -> dict[str, T] | None:
    """The given values, by the layers' names in the base model."""
    if given is None:
        return None
    return {original_name(name.removeprefix(PREFIX)): own for name, own in given.items()}


def _refuse_other_layers(initializer: Initializer) -> None:
    """Raises ValueError for starts that PEFT's plain B and A cannot hold."""
    what = "trains a λ between A and B" if initializer.has_diag else ""
    if initializer.trains != "AB":
        what = f"trains only {initializer.trains}"
    if what:
        raise ValueError(
            f"{type(initializer).__name__} {what}, which PEFT's plain LoRA layers do not: use "
            "lora_kernels.add_lora, or PEFT's own layers for it"
        )


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    return factors_of(layer, adapter)


@torch.no_grad()
def _write(layer: LoraLayer, adapter: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Writes A [r, in] and B [out, r] in place, because an optimizer may hold the parameters."""
    for parameter, value in zip(_factors(layer, adapter), (lora_A, lora_B), strict=True):
        parameter.copy_(value)
