"""`SavedTensors`: the base's tensors that adapters train in full (`modules_to_save`, biases)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..._utils.names import nearest, without_wrappers
from ...init.sharded.layout import copied_like, full_shape, is_dtensor, is_flattened
from ...init.sharded.zero3 import gathered, is_partitioned, is_zero3
from ...layers.adapted import AdaptedLayer
from ...layers.base import base_of
from ...layers.wrapper import LoRAWrapper
from ..config import AdapterState, TokenRows
from ..plan import LayerPlan
from ..selection import input_embeddings, match_modules, output_head, without_adapters
from .sharded.copies import are_equal, sharded_from_first

Place = tuple[nn.Module, str]  # a module, and the name of its attribute that holds the tensor


class SavedTensors:
    """Each adapter's trained copies of some of the model's tensors, and the untrained originals.

    The modules hold either the active adapter's copies or the originals; the others are stored
    here. The module structure does not change. Tied weights are tied again when the originals are
    restored.

    Copies of float16 Parameters are float32, because `GradScaler` rejects float16 gradients.
    Modules that hold such copies read them in float16 in their forward.
    """

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._base: dict[str, Tensor] = {}
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._frozen: dict[str, frozenset[str]] = {}  # names of copies that are never trained
        self._dtypes: dict[str, torch.dtype] = {}  # dtypes last seen in the modules
        self._active: str | None = None

    def add(
        self,
        adapter: str,
        places: Mapping[str, Place],
        values: Mapping[str, Tensor] | None = None,
        frozen: Collection[str] = (),
        tied: bool = False,
    ) -> None:
        """Makes an adapter's copies from `values`, or from the originals if None. The modules must
        hold the originals. `frozen` names copies that are not trained. Frozen copies of one tied
        tensor stay tied if they have the same values; if `tied`, so do all copies.
        """
        copies: dict[str, Tensor] = {}
        by_original: dict[int, list[Tensor]] = {}  # copies that may be tied
        for name, (module, key) in places.items():
            base = getattr(module, key)
            value = values[name] if values else (gathered(base) if is_partitioned(base) else base)
            is_parameter = isinstance(base, nn.Parameter)
            copy = copied_like(value, base, copy_dtype(base))
            same = by_original.setdefault(id(base), []) if tied or name in frozen else []
            equal = next((other for other in same if are_equal(other, copy)), None)
            if equal is None:
                equal = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                same.append(equal)
            copies[name] = equal
        self._collect()
        for name, (module, key) in places.items():
            self._places.setdefault(name, (module, key))
            self._base.setdefault(name, getattr(module, key))
            self._dtypes.setdefault(name, self._base[name].dtype)
        self._copies[adapter] = copies
        self._frozen[adapter] = frozenset(frozen)

    def activate(self, adapter: str | None) -> None:
        """Puts an adapter's tensors into the modules, or the originals if `adapter` is None.
        Tensors that were stored before the model was sharded are sharded first.

        Raises:
            ValueError: FSDP1 or DeepSpeed's engine manages a tensor, which cannot be exchanged
            then.

        """
        self._collect()
        own = {} if adapter is None else self._copies.get(adapter, {})
        for name, (module, key) in self._places.items():
            original = self._base[name]
            _check_exchangeable(name, getattr(module, key), own.get(name, original), original)
        for name, (module, key) in self._places.items():
            current, wanted = getattr(module, key), own.get(name, self._base[name])
            if wanted is not current:
                # Stored tensors do not follow the model to another device.
                wanted = self._fitted(wanted, current)
                setattr(module, key, wanted)
                self._dtypes[name] = wanted.dtype
            base = self._base[name].dtype
            if base == torch.float16 and wanted.dtype == torch.float32:
                _read_as(base, module, key)
            else:
                _read_as_it_is(module, key)
        self._active = adapter

    def settle(self) -> None:
        """Casts the active adapter's float32 copies to float16, before they stay in the model."""
        own = {} if self._active is None else self._copies.get(self._active, {})
        for name, tensor in own.items():
            module, key = self._places[name]
            if key in vars(module).get(_CAST, ()):
                _read_as_it_is(module, key)
                self._cast(tensor, self._base[name].dtype)

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Sets `requires_grad` of an adapter's parameters."""
        self._collect()
        for name, tensor in self._copies.get(adapter, {}).items():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.requires_grad_(trainable and name not in self._frozen[adapter])

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """An adapter's tensors by name."""
        self._collect()
        return dict(self._copies.get(adapter, {}))

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors of which adapters have, or had, copies."""
        return self._places.keys()

    def module(self, name: str) -> nn.Module:
        """The module that holds a tensor, or an adapter's copy in its place."""
        return self._places[name][0]

    def original(self, name: str) -> Tensor:
        """The base's tensor of which adapters have copies."""
        self._collect()
        return self._base[name]

    def remove(self, adapter: str) -> None:
        """Removes an adapter that is not active."""
        self._copies.pop(adapter, None)
        self._frozen.pop(adapter, None)

    def moved(self, old: nn.Module, new: nn.Module) -> None:
        """Records that the module `new` has replaced `old` and holds its tensors."""
        self._places = {n: (new if m is old else m, key) for n, (m, key) in self._places.items()}

    def owner(self, module: nn.Module, key: str) -> str | None:
        """The first adapter that trains this tensor in full; None if there is none."""
        names = {name for name, (m, k) in self._places.items() if m is module and k == key}
        return next((a for a, copies in self._copies.items() if names & copies.keys()), None)

    def _collect(self) -> None:
        """Stores the modules' current tensors, because `.to(dtype)` replaces buffers and
        `load_state_dict(assign=True)` replaces parameters. Stored copies follow the model to a new
        dtype, except float32, to which trainers convert only the tensors that they train.
        """
        own = {} if self._active is None else self._copies.get(self._active, {})
        for name, (module, key) in self._places.items():
            _forget_cast(module, key)
            current = getattr(module, key)
            (own if name in own else self._base)[name] = current
            if current.dtype not in (self._dtypes[name], torch.float32):
                for tensors in (self._base, *self._copies.values()):
                    if name in tensors:
                        self._cast(tensors[name], current.dtype)
            self._dtypes[name] = current.dtype
            if key in vars(module).get(_CAST, ()):
                self._cast(self._base[name], getattr(module, _MARK).dtype)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> None:
        """Casts a tensor in place; a DTensor cannot be, and is replaced wherever it is held."""
        if not is_dtensor(tensor):
            tensor.data = tensor.data.to(dtype)
        elif tensor.dtype != dtype:
            self._replace(tensor, tensor.detach().to(dtype))

    def _fitted(self, tensor: Tensor, current: Tensor) -> Tensor:
        """The stored tensor, with the device and the sharding of the one that it replaces."""
        if is_dtensor(current) and not is_dtensor(tensor):
            return self._replace(tensor, sharded_from_first(tensor, current))
        if not is_dtensor(current):
            tensor.data = tensor.data.to(current.device)
        elif tensor.device != current.device:
            return self._replace(tensor, tensor.detach().to(current.device))
        return tensor

    def _replace(self, old: Tensor, new: Tensor) -> Tensor:
        """Puts `new` wherever `old` is stored or held, as a Parameter if `old` is one."""
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        for tensors in (self._base, *self._copies.values()):
            for name in [name for name, tensor in tensors.items() if tensor is old]:
                tensors[name] = new
        for module, key in self._places.values():
            if getattr(module, key) is old:
                setattr(module, key, new)
        return new


def copy_dtype(original: Tensor) -> torch.dtype:
    """The dtype of the copies of a tensor."""
    half = isinstance(original, nn.Parameter) and original.dtype == torch.float16
    return torch.float32 if half else original.dtype


def _check_exchangeable(name: str, current: Tensor, wanted: Tensor, original: Tensor) -> None:
    """Raises ValueError if `wanted` cannot take the place of `current` in its module."""
    # Copies of a partitioned original are plain tensors until deepspeed.initialize.
    unknown = is_zero3(current) and not is_zero3(wanted) and current is not original
    if wanted is not current and (is_flattened(current) or unknown):
        holder = "FullyShardedDataParallel" if is_flattened(current) else "DeepSpeed's engine"
        raise ValueError(
            f"an adapter trains {name} in full (modules_to_save or bias), and {holder} holds its "
            "copy, which the original cannot replace here: save_adapter, and load it into a model "
            "that is not wrapped"
        )


# An empty buffer of a module, whose dtype is that of the model, also after `.to(dtype)`.
_MARK = "_lora_dtype"
_CAST = "_lora_cast"  # the names of the module's tensors that its forward reads in that dtype
_HANDLES = "_lora_cast_handles"


def _read_as(dtype: torch.dtype, module: nn.Module, key: str) -> None:
    """Lets the module's forward read the tensor `key` in this dtype, or in the one that the model
    is cast to later.
    """
    keys = vars(module).setdefault(_CAST, [])
    if key in keys:
        return
    keys.append(key)
    if len(keys) == 1:
        module.register_buffer(_MARK, torch.empty(0, dtype=dtype), persistent=False)
        vars(module)[_HANDLES] = (
            module.register_forward_pre_hook(_cast),
            module.register_forward_hook(_uncast),
        )


def _read_as_it_is(module: nn.Module, key: str) -> None:
    """Undoes `_read_as`."""
    keys = vars(module).get(_CAST, [])
    if key not in keys:
        return
    _forget_cast(module, key)
    keys.remove(key)
    if not keys:
        for handle in vars(module).pop(_HANDLES):
            handle.remove()
        del module._buffers[_MARK], vars(module)[_CAST]


def _cast(module: nn.Module, args: object) -> None:
    """Sets casts of the tensors as attributes of the module, which shadow its own tensors."""
    dtype = getattr(module, _MARK).dtype
    for key in vars(module)[_CAST]:
        _forget_cast(module, key)
        vars(module)[key] = getattr(module, key).to(dtype)


def _uncast(module: nn.Module, args: object, output: object) -> None:
    for key in vars(module)[_CAST]:
        _forget_cast(module, key)


def _forget_cast(module: nn.Module, key: str) -> None:
    if key in vars(module) and key in module._parameters:
        del vars(module)[key]


def module_places(name: str, module: nn.Module) -> dict[str, Place]:
    """The places of a module's parameters and buffers, by their names in the model's state_dict.

    `name` is the module's name in the model.
    """
    # Some wrappers do not add their own names to the state_dict.
    saved = {without_wrappers(key) for key in module.state_dict()}
    places: dict[str, Place] = {}
    for prefix, part in module.named_modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                path = f"{prefix}.{key}" if prefix else key
                if tensor is not None and without_wrappers(path) in saved:
                    places[f"{name}.{path}" if name else path] = (part, key)
    return places


def bias_places(modules: Mapping[str, nn.Module]) -> dict[str, Place]:
    """The places of these modules' biases: parameters with "bias" in their names, as in PEFT."""
    places: dict[str, Place] = {}
    for name, module in modules.items():
        for key, tensor in module._parameters.items():
            if tensor is not None and "bias" in key and "lora_" not in key:
                places[f"{name}.{key}" if name else key] = (module, key)
    return places


def saved_places(model: nn.Module, modules_to_save: Sequence[str] | None) -> dict[str, Place]:
    """The places of the tensors of `modules_to_save`, by name.

    Raises:
        ValueError: a name matches no module, or a module has no tensors, is adapted or quantized.

    """
    if not modules_to_save:
        return {}
    modules = {name: module for name, module in without_adapters(model).items() if name}
    places: dict[str, Place] = {}
    for name, module in match_modules(modules, modules_to_save, "modules_to_save").items():
        for path, part in module.named_modules(prefix=name):
            _check_saved(path, part)
        places |= module_places(name, module)
    if not places:
        raise ValueError(
            f"modules_to_save names {', '.join(modules_to_save)}, which has no tensors"
        )
    return _trainable(places)


def _check_saved(name: str, module: nn.Module) -> None:
    """Raises ValueError for a module whose tensors cannot be trained in full."""
    if isinstance(module, AdaptedLayer):
        raise ValueError(
            f"modules_to_save: {name} has adapter {module.adapter_names[0]!r}; a layer is adapted "
            "by some adapters or trained in full by others"
        )
    base = base_of(module)
    if base is not None and not base.rewritable:
        raise ValueError(
            f"modules_to_save: {name} is quantized ({base.kind}) and cannot be trained"
        )


def trained_biases(model: nn.Module, bias: str, plans: Sequence[LayerPlan]) -> dict[str, Place]:
    """The places of the biases that are trained, by their names in the base model."""
    if bias == "none":
        return {}
    modules = dict(model.named_modules())
    if bias == "lora_only":
        names = {plan.name for plan in plans}
        names |= {f"{name}.base_layer" for name in names}
        modules = {n: m for n, m in modules.items() if n in names}
    return _trainable(_in_base(model, bias_places(modules)))


def _trainable(places: dict[str, Place]) -> dict[str, Place]:
    """The places; raises ValueError for a tensor that is stored in float8."""
    for name, (module, key) in places.items():
        dtype = getattr(module, key).dtype
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise ValueError(
                f"{name} is stored in {dtype}, to which every forward would round it: it cannot be "
                "trained in full (modules_to_save, bias)"
            )
    return places


def _in_base(model: nn.Module, places: Mapping[str, Place]) -> dict[str, Place]:
    """The places by the tensors' names in the base model, without the wrappers' parts."""
    wrappers = tuple(name for name, m in model.named_modules() if isinstance(m, LoRAWrapper))
    inside = tuple(f"{name}.base_layer." for name in wrappers)
    named = {}
    for name, place in places.items():
        if inside and name.startswith(inside):
            owner = next(w for w in wrappers if name.startswith(f"{w}.base_layer."))
            name = owner + name.removeprefix(f"{owner}.base_layer")
        named[name] = place
    return named


def extra_places(model: nn.Module, state: AdapterState) -> dict[str, Place]:
    """The places of a saved adapter's tensors that are trained in full, by name.

    Raises:
        ValueError: the model does not have such a tensor, or has it in another shape, or the
            tensor's layer is adapted.

    """
    found: dict[str, Place] = {}
    if not state.extra:
        return found
    known = known_places(model)
    for name, value in state.extra.items():
        module, key = _known_place(known, name)
        shape = full_shape(getattr(module, key))
        if shape != tuple(value.shape):
            resized = module in (input_embeddings(model), output_head(model))
            hint = f": model.resize_token_embeddings({len(value)}) first" if resized else ""
            raise ValueError(
                f"the adapter's {name} has shape {list(value.shape)}, this model's {list(shape)}"
                f"{hint}"
            )
        found[name] = known[name]
    return _trainable(found)


def known_places(model: nn.Module) -> dict[str, Place]:
    """The places of all tensors of the base model, by their names in its state_dict."""
    places = _in_base(model, module_places("", model))
    return {without_wrappers(name): place for name, place in places.items()}


def _known_place(known: Mapping[str, Place], name: str) -> Place:
    """The place of a tensor that an adapter replaces; raises ValueError if it cannot."""
    if name not in known:
        raise ValueError(
            f"the adapter contains a tensor {name!r} that this model does not have"
            f"{nearest(name, known)}"
        )
    module, key = known[name]
    if isinstance(module, AdaptedLayer) and key != "bias":
        raise ValueError(
            f"the adapter trains {name} in full, but adapter {module.adapter_names[0]!r} has "
            "adapted that layer: unload_lora first"
        )
    return module, key


def row_places(
    model: nn.Module, state: AdapterState
) -> tuple[dict[str, Place], dict[str, TokenRows]]:
    """The places of the weights of which a saved adapter has some rows, and these rows, by name;
    including modules that are tied to the input embedding.

    Raises:
        ValueError: the model has no such weight or row, or the weight's layer is adapted.

    """
    known = known_places(model) if state.rows else {}
    rows = dict(state.rows)
    for name in state.rows:
        module, key = _known_place(known, name)
        if module is input_embeddings(model):
            shared = getattr(module, key)
            tied = (n for n, (other, k) in known.items() if getattr(other, k) is shared)
            rows = {n: state.rows[name] for n in tied} | rows
    places = {name: _known_place(known, name) for name in rows}
    for name, (module, key) in places.items():
        if name in state.extra or name.rpartition(".")[0] in state.layers:
            raise ValueError(f"the adapter has rows of {name!r} and trains all of it too")
        rows[name].check(name, full_shape(getattr(module, key)))
    return _trainable(places), rows


def frozen_places(
    model: nn.Module, places: Mapping[str, Place], modules_to_save: Sequence[str] | None
) -> set[str]:
    """The names of the places in embeddings that `modules_to_save` does not name. An adapter has
    their tensors because the vocabulary was resized; as in PEFT, it does not train them.
    """
    embeddings = (input_embeddings(model), output_head(model))
    pattern = "|".join(rf"(.*\.)?{re.escape(saved)}(\..*)?" for saved in modules_to_save or ())
    return {
        name
        for name, (module, _) in places.items()
        if module in embeddings and not (pattern and re.fullmatch(pattern, name))
    }
