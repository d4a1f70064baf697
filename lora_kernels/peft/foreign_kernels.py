"""Kernels of other packages that compute PEFT's layers without calling them.

Axolotl and Unsloth replace `mlp.forward`, `self_attn.apply_qkv` and `self_attn.apply_o` (Unsloth
also the forward of whole classes) by functions that read the base's weight and the adapter's
`lora_A` and `lora_B`. Such a function ignores a `LoraVariant`: it computes W + s·BA, without
− s·B₀A₀.

The functions are recognized by their compiled code, which exists even without a source: code from
outside PEFT and torch that a module computes with, and that reads `lora_A`, `lora_B`, `scaling` and
a weight, directly or in a function that it calls. Code that only looks at a factor, to print its
norm or to cast to its dtype, does not read all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .._utils.source import is_trusted
from .layers import lora_layers
from .variant import start_of

_READ, _VARIANT = frozenset(("lora_A", "lora_B", "scaling", "weight")), "lora_variant"
_DEPTH = 8  # how deep calls of functions are followed
# Methods that prepare, save or change a model, but do not compute its output.
_PREPARING = ("__init__", "for_", "from_", "get_", "load_", "patch_", "push_", "save_", "set_")
_SHOWN = 3  # names of layers in a message

# How to turn off each package's kernels. For other packages, the message has no such advice.
_OFF = {
    "axolotl": "in Axolotl's configuration lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel: "
    "false",
    "unsloth": "with Unsloth, load the model with transformers and PEFT in a process that has not "
    "called FastLanguageModel",
}


def kernels_past(model: nn.Module, layers: Mapping[str, LoraLayer] | None = None) -> dict[str, str]:
    """{name: "module.function"} of the LoRA layers that another package's code computes without
    calling them.

    Args:
        model: a `PeftModel` or the model inside it.
        layers: the LoRA layers to check, by name; all if None.

    """
    layers = lora_layers(model) if layers is None else layers
    names = {id(layer): name for name, layer in layers.items()}
    cache: dict[FunctionType, frozenset[str] | None] = {}
    found: dict[str, str] = {}
    for module in model.modules():
        if id(module) in names:
            kernel = _ignores_variants(module)
            if kernel is not None:
                found.setdefault(names[id(module)], kernel)
            continue
        for function, owner in _functions(module, names):
            if function not in cache:
                cache[function] = _names_read(function)
            read = cache[function]
            if read is not None:
                for name in _layers_read(owner, read, names):
                    found.setdefault(name, _full_name(function))
    return found


def without_start(model: nn.Module) -> dict[str, str]:
    """`kernels_past` for the layers that should subtract B₀A₀ for an adapter."""
    started = {
        name: layer
        for name, layer in lora_layers(model).items()
        if any(start_of(layer, adapter) is not None for adapter in layer.lora_A)
    }
    return kernels_past(model, started) if started else {}


def explained(kernels: Mapping[str, str]) -> str:
    """A message about the layers, {name: kernel}, that says what to do."""
    layers = list(kernels)
    shown = ", ".join(layers[:_SHOWN]) + (" ..." if len(layers) > _SHOWN else "")
    used = sorted(set(kernels.values()))
    packages = {name.partition(".")[0].partition("_")[0] for name in used}
    advice = [_OFF[package] for package in sorted(packages) if package in _OFF]
    off = f" ({'; '.join(advice)})" if advice else ""
    count = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    return (
        f"{', '.join(used)} compute{'s' if len(used) == 1 else ''} {count} ({shown}) "
        "from the base's weight, lora_A and lora_B, without calling the layers, and would lose "
        f"− s·B₀A₀. Turn these kernels off{off}; or use a start with BA = 0, such as "
        "'lora'; or write a base without B₀A₀ and a plain adapter for it with the command "
        "`lora-kernels init`"
    )


def _functions(
    module: nn.Module, names: Mapping[int, str]
) -> Iterator[tuple[FunctionType, nn.Module]]:
    """The functions from untrusted packages with which a module may compute its output, each with
    the module that is its first argument.

    For a module with LoRA layers as children these are all its functions, for others only the
    forward.
    """
    values = {"forward": vars(module).get("forward", type(module).forward)}
    if any(id(child) in names for child in module.children()) or _holds_lists(module, names):
        values = _attributes(module)
    for name, value in values.items():
        if name.startswith(_PREPARING):
            continue
        owner = value.__self__ if isinstance(value, MethodType) else None
        for function in _foreign(value):
            yield function, owner if isinstance(owner, nn.Module) else module


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that do not come from a trusted package, and its forward. The
    module's own attributes hide those of its class, and these hide those of the base classes.
    """
    found: dict[str, Any] = {}
    for base in reversed(type(module).__mro__):
        own = vars(base)
        if is_trusted(base.__module__):
            found |= {name: own[name] for name in own.keys() & {*found, "forward"}}
        else:
            found |= own
    return found | vars(module)


def _holds_lists(module: nn.Module, names: Mapping[int, str]) -> bool:
    """Whether a child that is a plain list or dictionary of modules holds LoRA layers."""
    return any(
        id(layer) in names
        for child in module.children()
        if isinstance(child, (nn.ModuleList, nn.ModuleDict))
        for layer in child.children()
    )


def _foreign(value: object) -> list[FunctionType]:
    """The Python functions from untrusted packages in an attribute, including functions that others
    wrap.
    """
    found: list[FunctionType] = []
    for _ in range(_DEPTH):
        if value is None or isinstance(value, (nn.Module, type)):
            break
        for part in ("fget", "func", "__func__"):  # of properties, partial functions, methods
            value = getattr(value, part, None) or value
        called = value if isinstance(value, FunctionType) else _call_of(value)
        # Where the code was written: functools.wraps gives a function another one's __module__.
        if isinstance(called, FunctionType) and not is_trusted(_written_in(called)):
            found.append(called)
        inner = getattr(value, "_torchdynamo_orig_callable", None)
        value = inner or getattr(value, "__wrapped__", None)
    return found


def _call_of(value: object) -> object:
    """What a callable object runs."""
    return next((vars(base)["__call__"] for base in type(value).__mro__
                 if "__call__" in vars(base)), None)  # fmt: skip


def _written_in(function: FunctionType) -> str:
    """The name of the module that contains a function's code."""
    return str(function.__globals__.get("__name__", ""))


def _names_read(function: FunctionType) -> frozenset[str] | None:
    """All names in the code of a function and of the functions that it calls; None if the code does
    not read all of `_READ`.
    """
    seen: set[FunctionType] = set()
    names: set[str] = set()
    pending = [(function, 0)]
    while pending:
        current, depth = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        own = _names(current.__code__)
        names |= own
        if depth < _DEPTH:
            pending += [(called, depth + 1) for called in _called(current, own)]
    return frozenset(names) if names >= _READ else None


def _names(code: CodeType) -> set[str]:
    """The attributes, globals and string constants in the code and in its inner functions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return names


def _called(function: FunctionType, names: Iterable[str]) -> Iterator[FunctionType]:
    """The functions that these names may mean in the code of a function."""
    scope = function.__globals__
    values = [scope.get(name) for name in names]
    values += [vars(module).get(name) for module in _modules(values) for name in names]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # the variable is not assigned yet
            continue
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for value in values:
        yield from _foreign(value)


def _modules(values: Iterable[object]) -> list[Any]:
    """The modules among these values, except trusted packages."""
    return [
        value
        for value in values
        if isinstance(value, ModuleType) and not is_trusted(value.__name__)
    ]


def _layers_read(owner: nn.Module, read: frozenset[str], names: Mapping[int, str]) -> Iterator[str]:
    """The LoRA layers below a module that code with these names reads; all if no name matches."""
    below = {path: names[id(m)] for path, m in owner.named_modules() if id(m) in names}
    named = [name for path, name in below.items() if _attribute(path) in read]
    yield from named or below.values()


def _attribute(path: str) -> str:
    """The last attribute in a path of names and indices: "experts.up.0" -> "up"."""
    return next((part for part in reversed(path.split(".")) if not part.isdecimal()), "")


def _ignores_variants(layer: nn.Module) -> str | None:
    """The function that replaces a LoRA layer's forward and ignores its `LoraVariant`, or None."""
    for function in _foreign(vars(layer).get("forward", type(layer).forward)):
        names = _names_read(function)
        if names is not None and _VARIANT not in names:
            return _full_name(function)
    return None


def _full_name(function: FunctionType) -> str:
    return f"{_written_in(function)}.{function.__name__}"
