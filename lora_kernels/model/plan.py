"""`LayerPlan`: what `add_lora` and `load_adapter` will do to a layer. All plans are checked before
the first layer is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import factor_dtype, overlaps
from .._utils.names import nearest, without_wrappers
from ..init import Initializer
from ..init.fused import Parts
from ..init.sharded.agree import shared
from ..init.sharded.subtract import subtract_start_here_
from ..init.sharded.sums import sums_of
from ..init.start import Start, subtract_start_, subtract_starts_
from ..layers.adapted import AdaptedLayer
from ..layers.adapter import Adapter
from ..layers.base import BaseLayer
from ..layers.kinds import ATTENTION, EMBEDDING, OUT_PROJECTION
from ..layers.linear import ABSORBED
from ..layers.options import AdapterOptions
from ..layers.state import TRAINED, LayerState
from .config import AdapterState, LoRAConfig
from .originals import OriginalWeights
from .selection import Selection, find_candidates, without_named
from .starts import (
    StartJob,
    WaitingAdapter,
    first_rank_loads,
    lacks_weights,
    layer_parts,
    loaded_device,
    make_starts,
    naming,
    part_names,
    refuse_parts,
    starts_of_first_rank,
)

# Rounding to 4 bits changes a norm by less than 1 %; subtracting s·B₀A₀, by more than 2 %.
_NORM_TOLERANCE = 0.02


Trained = dict[str, Tensor]  # by the names in `layers.state.TRAINED`


@dataclass
class LayerPlan:
    """The plan for one layer: the base, the adapter's options and, once computed, its start.

    `note` says why the initial factors are not absorbed. `initializer` computes the start; if the
    adapter comes from a file, `initializer` is None and `trained` holds its trained tensors.
    `changes_base` says whether s·B₀A₀ is subtracted; `subtracted`, whether `subtract_` has run.
    If the plan `waits`, the weight is on the meta device, and `start_adapters` computes the start.
    """

    name: str
    base: BaseLayer
    options: AdapterOptions
    aliases: list[str] = field(default_factory=list)
    note: str = ""
    changes_base: bool = False
    initializer: Initializer | None = None
    start: Start | None = None
    trained: Trained | None = None
    subtracted: bool = False
    was_adapted: bool = False
    waits: bool = False

    @property
    def absorbs(self) -> bool:
        """Whether s·B₀A₀ will be subtracted from the weight."""
        return self.changes_base and self.options.residual == "absorb"

    def computed_start(self) -> Start:
        """The start, once `plan_starts` has computed it."""
        if self.start is None:
            raise RuntimeError(f"the start of {self.name} is not computed yet")
        return self.start

    def adapted(self, adapter_name: str) -> AdaptedLayer:
        """The layer with its adapter; its weight is not changed yet."""
        adapter: Adapter
        if self.waits and self.initializer is not None:
            adapter = WaitingAdapter.of(self.base, self.options, self.initializer)
        else:
            adapter = Adapter(self.options, self.computed_start(), self.changes_base)
        if self.trained is not None:
            adapter.load_factors(self.trained)
        self.was_adapted = isinstance(self.base.module, AdaptedLayer)
        return self.base.adapted(adapter, adapter_name)

    def subtract_(self) -> None:
        """If the plan absorbs, subtracts s·B₀A₀ from the weight, or rewrites it as LoftQ does."""
        if not self.absorbs or self.waits or self.base.local.is_meta:
            return
        start, scaling = self.computed_start(), self.options.scaling
        if self.base.sharded:
            subtract_start_here_(self.base.shards(), start, scaling)
        elif self.base.num_experts is None:
            subtract = subtract_start_ if self.initializer is None else self.initializer.take_out_
            self.base.change_(lambda weight: subtract(weight, start, scaling))
        elif self.initializer is None:
            subtract_starts_(self.base.matrices(), start, scaling)
        else:
            self.initializer.take_out_each_(self.base.matrices(), start, scaling)
        self.subtracted = True

    def measure_(self, adapter: Adapter) -> None:
        """Gives a new DoRA adapter the magnitudes of the weight that `subtract_` has left. On a
        process without the weight, they are placeholders until accelerate copies weight and
        magnitudes from the first process.

        Raises:
            ValueError: as `Adapter.measure_`, with the layer's name.

        """
        if not self.options.use_dora or self.trained is not None:
            return
        if lacks_weights([self.base]):
            adapter.lora_magnitude = nn.Parameter(torch.ones_like(adapter.lora_B[:, 0]))
            return
        with naming(self.name):
            adapter.measure_(self.base.weight())

    def undo_(self, layer: AdaptedLayer, adapter_name: str) -> None:
        """Removes the adapter from the layer that `adapted` returned, and restores the weight."""
        if self.was_adapted:
            layer.detach(adapter_name)
        elif self.subtracted:
            layer.restore_()


def plan_layers(
    model: nn.Module,
    selection: Selection,
    config: LoRAConfig,
    originals: OriginalWeights | None = None,
) -> list[LayerPlan]:
    """A plan for each selected layer, without its start.

    Raises:
        ValueError: a rank is too large, a layer does not support the wanted residual, or a layer's
            original weight is missing; the layer is named.

    """
    owners = _owners(model)
    bases = selection.layers.values()
    waits = _are_on_meta(bases)
    if first_rank_loads(bases):
        waits = shared(0, lambda: waits)
    is_here = not lacks_weights(bases)
    plans = []
    for name, base in selection.layers.items():
        if is_here and not waits:
            base.refuse_sharded(name)
        parts = layer_parts(name, base, config, config.initializer, waits)
        _check_rank(name, base, config.layer_rank(base.pattern_name(name)), parts)
        residual, note = _residual(name, base, config.residual, owners)
        initializer = _initializer(name, base, config.initializer, originals)
        if waits and initializer.needs_activations:
            raise ValueError(
                f"{name} is on the meta device, and {type(initializer).__name__} starts from its "
                "inputs: adapt the model once its weights are loaded"
            )
        if (base.sharded or waits) and (initializer.rewrites_base or not initializer.subtracts):
            kind = type(initializer).__name__
            what, when = (
                ("on the meta device", "once its weights are loaded")
                if waits
                else ("sharded", "before it is sharded")
            )
            raise ValueError(
                f"{name} is {what}, and {kind} rewrites the whole weight: adapt the model {when}"
            )
        if config.use_dora:
            refuse_dora(name, base, is_here, waits)
        with naming(name):
            options = config.layer_options(base.pattern_name(name), initializer, residual)
        options = options.fused(parts) if parts else options
        plan = LayerPlan(name, base, options, selection.aliases[name], note, waits=waits)
        plan.changes_base, plan.initializer = initializer.changes_base, initializer
        plans.append(plan)
    if originals is not None and all(plan.base.rewritable for plan in plans):
        raise ValueError("original_weights are for quantized layers, of which there are none here")
    return plans


def _check_rank(name: str, base: BaseLayer, r: int, parts: Parts) -> None:
    """Raises ValueError if the rank is too large for the layer, or for one of its parts."""
    cols = base.shape[1]
    for own, rows in part_names(name, parts, base.shape[0]).items():
        if r > min(rows, cols):
            raise ValueError(
                f"r = {r} is larger than min(out, in) = {min(rows, cols)} of {own} [{rows}, "
                f"{cols}]: give it a smaller one in rank_pattern, or leave it out with "
                "exclude_modules"
            )


def check_still_absorbing(model: nn.Module, plans: Sequence[LayerPlan]) -> None:
    """Raises ValueError if s·B₀A₀ is to be subtracted from a weight that was shared, or adapted
    elsewhere, after the plan was made.
    """
    owners = _owners(model)
    for plan in plans:
        weight = plan.base.stored_weight
        names = owners[_memory(weight)]
        if plan.absorbs and (len(names) > 1 or getattr(weight, ABSORBED, False)):
            raise ValueError(
                f"{plan.name} cannot absorb its start any more, its weight is shared or adapted "
                f"elsewhere ({', '.join(names)}): add the adapter with residual='implicit'"
            )


def plan_starts(
    plans: Sequence[LayerPlan],
    initializer: Initializer,
    gradients: Mapping[str, Tensor] | None,
    progress: bool,
    activations: Mapping[str, Any] | None = None,
) -> None:
    """Computes the start of every plan; no weight is changed.

    If only the first process has the weights, it computes the starts for all processes. Plans that
    wait get no start.

    Raises:
        ValueError: a gradient is missing, gradients are not used, or a start cannot be computed
            from a weight; the layer is named.

    """
    if any(plan.waits for plan in plans):
        if activations is not None:
            raise ValueError(
                "the weights are on the meta device: add an adapter whose start is made from "
                "activations once they are loaded"
            )
        if gradients is not None:
            raise ValueError(
                "the weights are on the meta device: pass gradients= to start_adapters, which "
                "computes the starts once they are loaded"
            )
        return
    jobs = [
        StartJob(
            plan.name,
            plan.base,
            plan.initializer or initializer,
            plan.options.r,
            plan.options.scaling,
            plan.absorbs,
            plan.aliases,
            plan.options.parts,
        )
        for plan in plans
    ]

    def make() -> dict[str, Start]:
        return make_starts(jobs, gradients, progress, activations)

    bases = [plan.base for plan in plans]
    if first_rank_loads(bases):
        starts = starts_of_first_rank(make, {plan.name: plan.base.device for plan in plans})
    else:
        starts = make()
    for plan in plans:
        plan.start = starts[plan.name]


def plan_states(model: nn.Module, state: AdapterState) -> tuple[list[LayerPlan], Selection]:
    """A plan for each layer of a saved adapter, with its start.

    Raises:
        ValueError: the model has no such layer, or one of another shape.

    """
    candidates, aliases = find_candidates(model)
    places = {without_wrappers(name): name for name in candidates}
    for name in state.layers:
        if name not in places:
            raise ValueError(
                f"the adapter contains a layer {name!r}, which is no linear layer of this "
                f"{type(model).__name__}{nearest(name, without_named(candidates))}"
            )
    layers = {places[name]: layer for name, layer in state.layers.items()}
    others = (n for n in without_named(candidates) if n not in layers)
    skipped = dict.fromkeys(others, "not in the adapter")
    selection = Selection({n: candidates[n] for n in layers}, aliases, skipped)
    owners = _owners(model)
    plans = []
    lacks = lacks_weights(candidates[name] for name in layers)
    for name, layer in layers.items():
        base = candidates[name]
        if not lacks:
            base.refuse_sharded(name)
        _check_embedding(name, layer, base)
        _check_convolution(name, layer, base)
        found = _sizes(layer.experts, layer.shape)
        expected = _sizes(base.num_experts, base.shape)
        if found != expected:
            raise ValueError(
                f"the adapter's {name} is for a weight {found}, this model has {expected}"
            )
        if layer.parts:
            refuse_parts(name, base)
        if layer.lora_magnitude is not None:
            refuse_dora(name, base, measured=False)
        wanted = "auto" if layer.residual == "absorb" else layer.residual
        if without_wrappers(base.parameter_name(name)) in state.extra:
            # The adapter replaces this model's weight by its own.
            wanted, layer = "implicit", replace(layer, weight_norm=None)
        residual, note = _residual(name, base, wanted, owners)
        rule, dropout = state.config.scaling_rule, state.config.lora_dropout
        options = layer.options(rule, dropout, residual)
        plan = LayerPlan(name, base, options, selection.aliases[name], note)
        plan.changes_base = layer.changes_base
        plan.start, plan.trained = _placed(layer, base)
        plans.append(plan)
    return plans, selection


def refuse_dora(name: str, base: BaseLayer, measured: bool, waits: bool = False) -> None:
    """Raises ValueError if the layer cannot have a DoRA adapter: `measured` says whether its
    magnitudes are measured now, and `waits` whether the model is on the meta device.
    """
    reason = None
    if base.num_experts is not None:
        reason = "is a parameter of experts: leave it out of target_parameters"
    elif base.kind in (ATTENTION, OUT_PROJECTION):
        reason = "is an nn.MultiheadAttention, for which PEFT has no DoRA either: leave it out"
    elif getattr(base.layer, "groups", 1) != 1:
        reason = (
            "is a convolution with groups, of which PEFT's DoRA measures another weight: leave it "
            "out"
        )
    elif base.sharded:
        reason = "is sharded: adapt the model before it is sharded"
    elif waits or (measured and base.rewritable and base.local.is_meta):
        reason = "is on the meta device: adapt the model once its weights are loaded"
    if reason is not None:
        raise ValueError(f"use_dora=True is not possible: {name} {reason}")


def _check_embedding(name: str, layer: LayerState, base: BaseLayer) -> None:
    """Raises ValueError unless both or neither are embeddings, with the same number of tokens."""
    if layer.embedding != (base.kind == EMBEDDING):
        kinds = ("an embedding", "a linear layer")
        theirs, ours = kinds if layer.embedding else kinds[::-1]
        raise ValueError(f"the adapter's {name} is {theirs}, this model's is {ours}")
    if layer.embedding and layer.lora_bias is not None:
        raise ValueError(f"the adapter of the embedding {name} cannot have a bias of lora_B")
    (rows, tokens), (known_rows, known_tokens) = layer.shape, base.shape
    if layer.embedding and rows == known_rows and tokens != known_tokens:
        raise ValueError(
            f"the adapter's {name} is for {tokens} tokens, this model has {known_tokens}: "
            f"model.resize_token_embeddings({tokens}) first"
        )


def _check_convolution(name: str, layer: LayerState, base: BaseLayer) -> None:
    """Raises ValueError unless both are convolutions with the same kernels and groups, or neither
    is a convolution.
    """
    if (layer.kernel, layer.groups) != base.geometry:
        theirs, ours = (
            f"a convolution with kernels {list(kernel)} and groups = {groups}"
            if kernel
            else "no convolution"
            for kernel, groups in ((layer.kernel, layer.groups), base.geometry)
        )
        raise ValueError(f"the adapter's {name} is {theirs}, this model's is {ours}")


def _sizes(experts: int | None, shape: tuple[int, int]) -> list[int]:
    """The sizes of a weight; for experts, their number comes first."""
    return [*shape] if experts is None else [experts, *shape]


def check_norms(plans: Sequence[LayerPlan]) -> None:
    """Warns if a weight's norm shows that an adapter was trained on another base."""
    if lacks_weights(plan.base for plan in plans):
        return
    measured = [plan for plan in plans if plan.start and plan.start.weight_norm is not None]
    sharded = [plan for plan in measured if plan.base.sharded]
    sums_of_all = sums_of([plan.base.shards() for plan in sharded])
    known = {plan.name: sums for plan, sums in zip(sharded, sums_of_all, strict=True)}
    for plan in measured:
        expected = None if plan.start is None else plan.start.weight_norm
        if expected is None:
            continue
        sums = known.get(plan.name)
        if sums is None:
            sums = torch.ops.lora.frobenius_stats(plan.base.matrices())
        # For experts, this is the norm of all of them together.
        wanted = float(expected.double().norm())
        found = float(sums[:, 1].sum().sqrt())
        if wanted and abs(found / wanted - 1) > _NORM_TOLERANCE:
            warnings.warn(
                f"the norm of {plan.name} is {found:.4g}, but {wanted:.4g} where this "
                "adapter was made: another base, or one from which a start was subtracted already? "
                "The adapter's update is added to this base without a correction",
                stacklevel=4,
            )
            return


def _initializer(
    name: str, base: BaseLayer, initializer: Initializer, originals: OriginalWeights | None
) -> Initializer:
    """The initializer for this layer: on a quantized base, LoftQ or QERA gets the original weight,
    so that it can approximate the quantization error.
    """
    if originals is not None and not initializer.compensates:
        raise ValueError(f"{type(initializer).__name__} does not use original_weights")
    if base.rewritable or not initializer.compensates:
        return initializer
    if originals is None:
        raise ValueError(
            f"{name} is quantized already ({base.kind}): without the weight that it was made from, "
            f"{type(initializer).__name__} has no quantization error to compensate for. Pass "
            "original_weights=, the folder or the state_dict of the model that was quantized, or "
            "adapt that model"
        )
    originals.find(name)
    return initializer.toward(lambda: originals.weight(name, base))


def _are_on_meta(bases: Collection[BaseLayer]) -> bool:
    """Whether all weights are on the meta device and will be loaded later. Weights that accelerate
    has offloaded do not count, because their layers' hooks load them in every forward.
    """
    return bool(bases) and all(
        base.rewritable and base.local.is_meta and not hasattr(base.layer, "_hf_hook")
        for base in bases
    )


def _residual(
    name: str, base: BaseLayer, wanted: str, owners: Mapping[object, list[str]]
) -> tuple[str, str]:
    """The layer's residual, and why its initial factors are not absorbed ("" if they are)."""
    reason = _why_not_absorbed(name, base, owners)
    if reason is None:
        return ("implicit" if wanted == "implicit" else "absorb"), ""
    if wanted == "absorb":
        raise ValueError(
            f"{name} cannot absorb its start, {reason}: set residual='implicit' or 'auto'"
        )
    return "implicit", reason


def _why_not_absorbed(name: str, base: BaseLayer, owners: Mapping[object, list[str]]) -> str | None:
    if not base.rewritable:
        return f"its base ({base.kind}) cannot be rewritten"
    if isinstance(base.module, AdaptedLayer):
        if base.module.absorbed:
            raise ValueError(
                f"adapter {base.module.absorbed!r} of {name} was added with residual='absorb': its "
                "start was subtracted from the weight. To attach several adapters to one base, "
                "set residual='implicit' for all of them, including the first"
            )
        return "its base has other adapters"
    weight = base.stored_weight
    names = owners[_memory(weight)]
    if len(names) > 1:
        own = base.parameter_name(name)
        return f"its weight is {next(n for n in names if n != own)} too"
    if getattr(weight, ABSORBED, False):
        raise ValueError(
            f"another adapter's initial factors were already subtracted from the weight of {name} "
            "(residual='absorb')"
        )
    overlapping = not base.sharded and overlaps(base.local)
    return "its weight is an expanded or overlapping view" if overlapping else None


def _owners(model: nn.Module) -> dict[object, list[str]]:
    """For each `_memory` key, the names of the parameters that use this memory."""
    owners: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(f"{name}.{key}" if name else key)
    return owners


def _memory(parameter: Tensor) -> object:
    """A key; parameters that are identical or share memory (`a.data = b.data`) have equal keys."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _placed(layer: LayerState, base: BaseLayer) -> tuple[Start, Trained]:
    """The start to subtract and the trained tensors, on the layer's device and in the dtype of its
    factors.
    """
    dtype, device = factor_dtype(base.dtype), loaded_device(base.device)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype, copy=True).contiguous()

    def number(value: float | Tensor | None) -> Tensor | None:
        return None if value is None else torch.as_tensor(value, dtype=torch.float64, device=device)

    found = {name: getattr(layer, name) for name in TRAINED}
    trained = {name: placed(tensor) for name, tensor in found.items() if tensor is not None}
    subtracted = layer.start_factors()
    if subtracted is None:
        return Start(trained["lora_A"], trained["lora_B"]), trained
    A0, B0 = map(placed, subtracted)
    return Start(A0, B0, number(layer.beta), weight_norm=number(layer.weight_norm)), trained
