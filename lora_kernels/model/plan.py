"""What is to be done to each layer, worked out and checked before the first one is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._utils.checks import factor_dtype, overlaps
from .._utils.names import nearest, without_wrappers
from ..init import Initializer, LoftQ
from ..init.start import Start, subtract_start_
from ..layers import kinds
from ..layers.adapter import stand_alone
from ..layers.base import ABSORBED, AdaptedLayer, AdaptedMatrix
from ..layers.kinds import FLOAT_KINDS
from ..layers.linear import LoRAConv1D, LoRALinear
from ..layers.options import AdapterOptions
from ..layers.state import LayerState
from ..layers.wrapper import LoRAWrapper
from .config import AdapterState, LoRAConfig
from .originals import OriginalWeights
from .selection import Selection, find_candidates


@dataclass
class LayerPlan:
    """One layer: what it is, what it is to become, and its start once that is made.

    `note` says why its start is not absorbed, `kind` is `kinds.kind_of`'s; `initializer` makes the
    start, unless it comes from a file: then `trained` are A, B and R.
    """

    name: str
    module: nn.Module
    options: AdapterOptions
    kind: str
    aliases: list[str] = field(default_factory=list)
    note: str = ""
    changes_base: bool = False
    initializer: Initializer | None = None
    start: Start | None = None
    trained: tuple[Tensor, Tensor, Tensor | None] | None = None
    taken_out: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return _shape(self.module)

    def matrix(self) -> Tensor:
        """W [out, in] without other adapters' updates: a view, or dequantised."""
        if isinstance(self.module, AdaptedMatrix):
            return self.module._matrix().detach()
        return kinds.dequantized_weight(_base(self.module))

    def built(self, adapter_name: str) -> AdaptedLayer:
        """The layer with its adapter, its base still as it was."""
        if isinstance(self.module, AdaptedLayer):
            adapter = stand_alone(self.options, self.start, self.changes_base)
        else:
            layer_class = {"linear": LoRALinear, "conv1d": LoRAConv1D}.get(self.kind, LoRAWrapper)
            adapter = layer_class.from_start(
                self.module, self.start, self.options, self.changes_base, adapter_name
            )
        if self.trained is not None:
            adapter.load_factors(*self.trained)
        if isinstance(adapter, AdaptedLayer):
            return adapter
        self.module.attach(adapter_name, adapter)
        return self.module

    def take_out_(self) -> None:
        """Takes the start out of the base, if it is to be absorbed."""
        if self.changes_base and self.options.residual == "absorb":
            take_out = subtract_start_ if self.initializer is None else self.initializer.take_out_
            take_out(self.matrix(), self.start, self.options.scaling)
            self.taken_out = True

    def undo_(self, layer: AdaptedLayer, adapter_name: str) -> None:
        """Takes the adapter off the layer that was `built`, and puts back what was taken out."""
        if layer is self.module:
            layer.detach(adapter_name)
        elif self.taken_out:
            layer.restore_()


def plan_layers(
    model: nn.Module,
    selection: Selection,
    config: LoRAConfig,
    originals: OriginalWeights | None = None,
) -> list[LayerPlan]:
    """A plan for each selected layer, without its start.

    Raises:
        ValueError: a rank is too large, or the residual cannot be had, or a layer has no original
            weight; the layer is named.

    """
    owners = _owners(model)
    plans = []
    for name, module in selection.layers.items():
        kind = _checked_kind(name, module)
        rows, cols = _shape(module)
        r = config.layer_rank(name)
        if r > min(rows, cols):
            raise ValueError(
                f"r = {r} is larger than min(out, in) = {min(rows, cols)} of {name} [{rows}, "
                f"{cols}]: give it a smaller one in rank_pattern, or leave it out with "
                "exclude_modules"
            )
        residual, note = _residual(name, module, kind, config.residual, owners)
        initializer = _initializer(name, module, kind, config.initializer, originals)
        with _naming(name):
            options = AdapterOptions.checked(
                initializer,
                r,
                config.layer_alpha(name),
                config.use_rslora,
                config.scaling,
                config.lora_dropout,
                residual,
            )
        plan = LayerPlan(name, module, options, kind, selection.aliases[name], note)
        plan.changes_base, plan.initializer = initializer.changes_base, initializer
        plans.append(plan)
    if originals is not None and not any(plan.kind not in FLOAT_KINDS for plan in plans):
        raise ValueError("original_weights are for quantised layers, of which there are none here")
    return plans


def plan_states(
    model: nn.Module, state: AdapterState, adaptable: Callable[[nn.Module], bool]
) -> tuple[list[LayerPlan], Selection]:
    """A plan for each layer of a saved adapter, with its start.

    Raises:
        ValueError: the model has no such layer, or one of another shape.

    """
    candidates, aliases = find_candidates(model, adaptable)
    places = {without_wrappers(name): name for name in candidates}
    for name in state.layers:
        if name not in places:
            raise ValueError(
                f"the adapter has a layer {name!r}, which is no linear layer of this "
                f"{type(model).__name__}{nearest(name, places)}"
            )
    layers = {places[name]: layer for name, layer in state.layers.items()}
    skipped = {n: "not in the adapter" for n in candidates if n not in layers}
    selection = Selection({n: candidates[n] for n in layers}, aliases, skipped)
    owners = _owners(model)
    plans = []
    for name, layer in layers.items():
        module = candidates[name]
        kind = _checked_kind(name, module)
        rows, cols = _shape(module)
        if layer.lora_B.shape[0] != rows or layer.lora_A.shape[1] != cols:
            raise ValueError(
                f"the adapter's {name} is for a weight [{layer.lora_B.shape[0]}, "
                f"{layer.lora_A.shape[1]}], this model has [{rows}, {cols}]"
            )
        wanted = "auto" if layer.residual == "absorb" else layer.residual
        residual, note = _residual(name, module, kind, wanted, owners)
        options = AdapterOptions(
            layer.r,
            layer.lora_alpha,
            state.config.scaling_rule,
            state.config.lora_dropout,
            residual,
        )
        plan = LayerPlan(name, module, options, kind, selection.aliases[name], note)
        plan.changes_base = layer.changes_base
        plan.start, plan.trained = _start_of(layer, _base(module), kind)
        plans.append(plan)
    return plans, selection


def _initializer(
    name: str,
    module: nn.Module,
    kind: str,
    initializer: Initializer,
    originals: OriginalWeights | None,
) -> Initializer:
    """The layer's own: LoftQ's of a quantised base makes up for what the original lost."""
    if originals is not None and not isinstance(initializer, LoftQ):
        raise ValueError(f"{type(initializer).__name__} has no use for original_weights")
    if kind in FLOAT_KINDS or not isinstance(initializer, LoftQ):
        return initializer
    if originals is None:
        raise ValueError(
            f"{name} is quantised already ({kind}): without the weight that it was made from there "
            "is no error for LoftQ to make up for. Pass original_weights=, the folder or the "
            "state_dict of the model that was quantised, or adapt that model"
        )
    originals.find(name)
    return initializer.toward(lambda: originals.weight(name, _base(module)))


def _checked_kind(name: str, module: nn.Module) -> str:
    base = _base(module)
    if isinstance(module, AdaptedMatrix):
        return "conv1d" if isinstance(module, LoRAConv1D) else "linear"
    kinds.refuse_sharded(name, base)
    return kinds.kind_of(base)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    if isinstance(module, AdaptedMatrix):
        return tuple(module._matrix().shape)
    return kinds.linear_shape(_base(module))


def _base(module: nn.Module) -> nn.Module:
    """Of a wrapped layer, the layer."""
    return module.base_layer if isinstance(module, LoRAWrapper) else module


def _residual(
    name: str, module: nn.Module, kind: str, wanted: str, owners: Mapping[object, list[str]]
) -> tuple[str, str]:
    """The residual of a layer, and why it is not absorbed."""
    if kind not in ("linear", "conv1d"):
        reason = f"its base ({kind}) cannot be rewritten"
    elif isinstance(module, AdaptedLayer):
        if module.absorbed:
            raise ValueError(
                f"the base of {name} lacks the start of adapter {module.adapter_name!r}, which "
                "absorbed it: add that one with residual='implicit', so that several adapters "
                "can share the base"
            )
        reason = "its base has other adapters"
    elif len(owners[_memory(module.weight)]) > 1:
        others = [n for n in owners[_memory(module.weight)] if n != f"{name}.weight"]
        reason = f"its weight is {others[0]} too"
    elif getattr(module.weight, ABSORBED, False):
        raise ValueError(f"the weight of {name} lacks the start of another adapter")
    elif overlaps(module.weight):
        reason = "its weight is an expanded or overlapping view"
    else:
        return ("implicit" if wanted == "implicit" else "absorb"), ""
    if wanted == "absorb":
        raise ValueError(
            f"{name} cannot absorb its start, {reason}: take residual='implicit' or 'auto'"
        )
    return "implicit", reason


def _owners(model: nn.Module) -> dict[object, list[str]]:
    """The names under which each parameter is found in different modules, by `_memory`."""
    owners: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(f"{name}.{key}" if name else key)
    return owners


def _memory(parameter: nn.Parameter) -> object:
    """The same for parameters that are one, or two over the same memory (`a.data = b.data`)."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _start_of(
    layer: LayerState, base: nn.Module, kind: str
) -> tuple[Start, tuple[Tensor, Tensor, Tensor | None]]:
    """What is to be taken out of the base, and the trained factors: on the layer's device, in the
    dtype that goes with it.
    """
    weight = base.weight if kind in ("linear", "conv1d") else None
    dtype = factor_dtype(kinds.compute_dtype(base) if weight is None else weight.dtype)
    device = kinds.device_of(base) if weight is None else weight.device

    def placed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, dtype, copy=True).contiguous()

    trained = tuple(placed(t) for t in (layer.lora_A, layer.lora_B, layer.lora_R))
    if not layer.changes_base:
        return Start(*trained[:2], lora_R=trained[2]), trained
    numbers = [
        None if value is None else torch.tensor(value, dtype=torch.float64, device=device)
        for value in (layer.beta, layer.weight_norm)
    ]
    A0, B0 = (placed(factor) for factor in layer.start_factors())
    return Start(A0, B0, numbers[0], weight_norm=numbers[1]), trained


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Puts the layer's name before an error."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{layer}: {error}") from error
