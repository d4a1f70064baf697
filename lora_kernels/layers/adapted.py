"""`AdaptedLayer`: the base class of layers with adapters. `transplant`: moves hooks and attributes
from a layer to the one that replaces it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from .._utils.errors import unknown_name
from ..init.sharded.layout import Shards
from .adapter import Adapter
from .options import AdapterOptions
from .state import LayerState

# Until version 0.1 these were entries of the layer itself in a state_dict.
_FACTORS = ("lora_A", "lora_B", "lora_R", "start_A", "start_B", "_extra_state")


def _of_active(name: str) -> Any:
    """A property that reads an attribute of the active adapter."""
    return property(lambda layer: getattr(layer.active(), name))


def _is_property(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(type(module), name, None), property)


class AdaptedLayer(nn.Module):
    """A layer with one or more adapters over the same base; one of them is active.

    The forward uses the adapter named `active_adapter`. If `adapter_enabled` is False, the layer
    computes what its base computes. `lora_A`, `scaling` and the like belong to the active adapter.
    """

    adapters: nn.ModuleDict
    active_adapter: str
    adapter_enabled: bool
    _active: Adapter | None

    lora_A: nn.Parameter = _of_active("lora_A")  # [r, in]
    lora_B: nn.Parameter = _of_active("lora_B")  # [out, r]
    lora_R: nn.Parameter | None = _of_active("lora_R")  # [r, r]
    lora_bias: nn.Parameter | None = _of_active("lora_bias")  # [out]
    lora_diag: nn.Parameter | None = _of_active("lora_diag")  # [r]
    lora_magnitude: nn.Parameter | None = _of_active("lora_magnitude")  # [out]
    start_A: Tensor | None = _of_active("start_A")  # [r, in]
    start_B: Tensor | None = _of_active("start_B")  # [out, r]
    options: AdapterOptions = _of_active("options")
    r: int = _of_active("r")
    scaling: float = _of_active("scaling")
    lora_dropout: float = _of_active("lora_dropout")
    residual: str = _of_active("residual")

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_property(self, name):
            setattr(self.active(), name, value)  # nn.Module would register a parameter here
        else:
            super().__setattr__(name, value)
            if name == "active_adapter":
                self._point_to(value)

    def _point_to(self, name: str) -> None:
        """Makes `active` return the adapter named `name`.

        A compiled forward must not depend on the name: it would be compiled again for every
        adapter. The reference is not in `_modules`, where the adapter would appear twice.
        """
        adapter = self.adapters._modules.get(name)
        object.__setattr__(self, "_active", adapter)

    def _begin(self) -> None:
        """Sets the attributes of a layer that has no adapters yet."""
        self.adapters = nn.ModuleDict()
        self.active_adapter, self.adapter_enabled = "", True

    @property
    def lora_alpha(self) -> float:
        """`lora_alpha` of the active adapter."""
        return self.options.lora_alpha

    @property
    def scaling_rule(self) -> str:
        """The active adapter's rule for s: "lora", "rslora" or "alpha_sqrt"."""
        return self.options.scaling_rule

    @property
    def adapter_names(self) -> list[str]:
        """The adapters' names, in the order in which they were attached."""
        return list(self.adapters)

    def adapter(self, name: str) -> Adapter:
        """The adapter named `name`.

        Raises:
            ValueError: the layer has no adapter of that name.

        """
        if name not in self.adapters:
            raise unknown_name("adapter", name, self.adapter_names)
        adapter: Any = self.adapters[name]  # nn.ModuleDict does not know its modules' type
        return adapter

    def active(self) -> Adapter:
        """The active adapter's module."""
        active = self._active
        return self.adapter(self.active_adapter) if active is None else active

    def use(self, name: str, enabled: bool) -> None:
        """Sets `active_adapter` and `adapter_enabled`. It skips nn.Module's checks, because
        `adapters_per_row` does this in every call of a model.
        """
        object.__setattr__(self, "active_adapter", name)
        object.__setattr__(self, "adapter_enabled", enabled)
        self._point_to(name)

    def attach(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter; the layer's first adapter becomes active."""
        self.adapters[name] = adapter.train(self.training)
        if len(self.adapters) == 1:
            self.active_adapter = name

    def detach(self, name: str) -> None:
        """Removes an adapter that is not active."""
        del self.adapters[name]

    def name_in(self, path: str) -> str:
        """The layer's name, if `path` is the module's path in the model."""
        return path

    @property
    def absorbed(self) -> str | None:
        """The name of the adapter whose initial factors were subtracted from the base's weight."""
        names = (n for n, adapter in self.adapters.items() if adapter.absorbed_scaling is not None)
        return next(names, None)

    def start_factors(self) -> tuple[Tensor, Tensor] | None:
        """`Adapter.start_factors` of the active adapter: A₀ [r, in] and B₀ [out, r], or None."""
        return self.active().start_factors()

    def middle(self) -> Tensor | None:
        """`Adapter.middle` of the active adapter: R or diag(λ) [r, r], or None."""
        return self.active().middle()

    def layer_state(self) -> LayerState:
        """`Adapter.layer_state` of the active adapter."""
        return self.active().layer_state()

    def freeze(self) -> None:
        """Sets the base's `requires_grad` to False."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """A view of the stored weight as [out, in], or [E, out, in] for experts; absorbed initial
        factors are not added back.
        """
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """The W of `matrix` before the layer was adapted: a view, or a copy to which absorbed
        factors were added back.
        """
        if not self.absorbed:
            return self.matrix()
        matrix = self.matrix().detach().clone()
        self.adapter(self.absorbed).add_absorbed_(Shards.of(matrix))
        return matrix

    def base_linear(self) -> nn.Module:
        """The layer before it was adapted; its tensors may be copies."""
        raise NotImplementedError

    def restore_(self) -> nn.Module:
        """The original layer, with this layer's own parameters, not copies of them. If they are
        sharded, the original layer is this module, with its former class.
        """
        raise NotImplementedError

    def merged(self, shared: bool = False) -> nn.Module:
        """`to_linear()`; if the layer's parameters are sharded, this module, merged in place. If
        other modules have its weight too (`shared`), it gets its own weight.
        """
        return self.to_linear()

    def check_mergeable(self, adapter: Adapter, shared: bool) -> None:
        """Raises ValueError if an adapter cannot be merged into the layer's weight; `shared` says
        whether other modules have this weight too.
        """

    def check_restorable(self) -> None:
        """Raises ValueError if `restore_` cannot restore the original layer."""

    def to_linear(self) -> nn.Module:
        """A new layer without adapters, whose weight is W + s·(BA − B₀A₀)."""
        raise NotImplementedError

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        object.__setattr__(replica, "_active", None)  # `active` then finds the replica's
        return replica

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in _FACTORS if self.adapters else ():
            if prefix + name in state_dict:
                new = f"{prefix}adapters.{self.adapter_names[0]}.{name}"
                state_dict[new] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def exchange_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the module's class in place. Its names, parameters and hooks stay, and all references
    to the module stay valid, such as those of FSDP2's parameter groups. A module to which
    `fully_shard` was applied keeps the methods that `fully_shard` has added.
    """
    old: Any = type(module)
    new: Any = cls  # type checkers see no Hashable, by nn.Module's annotations
    module.__class__ = _sharded_class(old, new) if class_of(module) is not old else new
    if getattr(vars(module).get("_old_forward"), "__self__", None) is module:  # accelerate's hook
        bound: Any = cls.forward
        object.__setattr__(module, "_old_forward", bound.__get__(module))


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the one that `fully_shard` has derived from it."""
    cls: Any = type(module)
    first = cls.__bases__[0]
    if any(base.__name__ == "FSDPModule" for base in first.__mro__):  # or derived from it
        found: type[nn.Module] = cls.__bases__[1]
        return found
    return cls


@cache
def _sharded_class(like: Any, cls: Any) -> Any:
    """The class that `fully_shard` derives from `cls`, as it derived `like` from another class."""
    own = {name: value for name, value in vars(like).items() if name == "__deepcopy__"}
    return type(f"FSDP{cls.__name__}", (like.__bases__[0], cls), own)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
FOREIGN = "_lora_foreign"  # names of the attributes that were copied to an adapted layer
CLASS = "_lora_class"  # the class of the layer that the adapted layer replaced
# Attributes bound to the old module's forward, by accelerate's hook or `module.compile()`.
_BOUND = ("_hf_hook", "_old_forward", "forward", "_compiled_call_impl")


def transplant(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the hooks of `old` and the attributes that others have set on `old` (`_hf_*`).

    `new` shares the dicts of hooks, so that existing handles still remove them. accelerate's hook,
    which wraps a module's forward, is added to `new` and wraps its forward.

    If `old` is an adapted layer, `new` gets the attributes that were once copied to `old`, and the
    class of the layer that `old` had replaced, which may be a subclass of `nn.Linear`.
    """
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    foreign = vars(old).get(FOREIGN)
    if foreign is None:
        own = {*vars(new), *_BOUND}
        foreign = [n for n in vars(old) if n not in own and not _is_property(new, n)]
        object.__setattr__(new, FOREIGN, foreign)
        object.__setattr__(new, CLASS, type(old))
    else:
        new.__class__ = vars(old)[CLASS]
    for name in foreign:
        object.__setattr__(new, name, vars(old)[name])
    if "_hf_hook" in vars(old):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
