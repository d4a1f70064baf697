"""`adapters_per_row`: a context in which each row of a batch has an adapter of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from ...._utils.errors import unknown_name
from ....init.sharded.layout import is_sharded
from ....layers.adapted import AdaptedLayer
from ...experts.module import stacks_of
from ..layers import adapted_layers, unwrapped
from ..record import ModelAdapters, check_started, needed_record
from .arguments import Call, SplitCall, named_arguments, row_count
from .rows import NotRowsError, Rows, WrongCountError

Names = tuple[str | None, ...]

BASE = "__base__"  # PEFT's name for rows without an adapter
_IMPL = "_compiled_call_impl"  # what torch calls in place of a module's hooks and forward
_CONTEXT = "_lora_adapters_per_row"


@contextmanager
def adapters_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """In the context, each row of a batch has its own adapter, in inference: `names` has that of
    each row of the first dimension, or None (PEFT's "__base__" too) for the base.

    A call of the model is run once for each of these adapters, with their rows: each row's results
    are bit for bit those of a batch of that adapter's rows alone, with whatever the adapter has
    (saved modules, biases, DoRA). The time is that of these smaller batches. transformers'
    key-value caches are cut and joined; in `generate`, the names hold for all beams and returned
    sequences of a row. Where adapters are disabled, all rows get the base.

    If an argument is not of the rows (the images of a vision model), the module that gets it runs
    as a whole, and the modules inside it, with their adapters, are run for each adapter. The same
    holds for caches that cannot be cut, such as quantized ones. What such a module computes itself
    may differ from a batch of its own by rounding.

    Args:
        model: a model with adapters by `add_lora` or `load_adapter`, in evaluation mode; it may be
            compiled.
        names: the adapters' names.

    Raises:
        ValueError: the model has no adapters, no adapter of that name, is in training mode, is
            sharded, or has such a context already. In a call: there are not as many rows as names,
            or the results of the rows cannot be joined (a loss of all rows). The error names the
            module.
        TypeError: `names` is not a list of strings and None.

    """
    context = _Context(model, _checked_names(needed_record(model), names))
    inner = unwrapped(model)
    if _CONTEXT in vars(inner):
        raise ValueError(
            "the model is in a context of adapters_per_row already: leave it, or give it the names "
            "of all rows"
        )
    with ExitStack() as stack:
        object.__setattr__(inner, _CONTEXT, context)
        stack.callback(vars(inner).pop, _CONTEXT)
        context.enter(stack)
        yield


def _checked_names(record: ModelAdapters, names: Sequence[str | None]) -> Names:
    """The names, with None for the base."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"names must be a list with a name or None for each row, got {type(names).__name__}"
        )
    if not names:
        raise ValueError("names is empty: give the name of an adapter, or None, for each row")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names must be strings or None, got {name!r}")
        if name not in (None, BASE, *record.configs):
            raise unknown_name("adapter", name, list(record.configs))
    return tuple(None if name == BASE and name not in record.configs else name for name in names)


class _Context:
    """The names of a batch's rows, and the calls of the model's modules. The outermost call that
    can be cut into rows is run for each adapter; the calls inside it run as ever.
    """

    def __init__(self, model: nn.Module, names: Names) -> None:
        self._model, self._names = model, names
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._lock = threading.Lock()  # a layer has one active adapter for all threads
        self._owner: int | None = None  # the thread that runs a group
        self._local = threading.local()  # how deep this thread is in `generate`, and in whole calls
        self._layers: list[AdaptedLayer] = []
        self._known: tuple[str, ...] = ()  # the adapters, when the layers were listed

    def enter(self, stack: ExitStack) -> None:
        """Takes the calls of all modules, until the stack is closed."""
        self._check_model()
        record = needed_record(self._model)
        for name in {name for name in self._names if name is not None}:
            check_started(self._model, name)
        self._list_layers(record)
        for module in self._model.modules():
            self._replace(stack, module, _IMPL, self._taken(module))
            generate: Any = getattr(module, "generate", None)
            if callable(generate):
                self._replace(stack, module, "generate", self._generating(generate))

    def _check_model(self) -> None:
        """Raises ValueError if the model is in training mode or sharded."""
        if self._model.training:
            raise ValueError(
                "adapters_per_row is for inference, and the model is in training mode: call "
                "model.eval() first"
            )
        for name, parameter in self._model.named_parameters():
            if is_sharded(parameter):
                raise ValueError(
                    f"adapters_per_row cannot run a sharded model, and {name} is sharded: the "
                    "processes would have to run the same adapters at the same time"
                )

    def _list_layers(self, record: ModelAdapters) -> None:
        self._layers = list(adapted_layers(self._model).values())
        self._known = tuple(record.configs)

    @staticmethod
    def _replace(stack: ExitStack, module: nn.Module, name: str, value: object) -> None:
        """Sets an attribute of the instance, until the stack is closed."""
        own = vars(module)
        had, old = name in own, own.get(name)
        own[name] = value

        def restore() -> None:
            if own.get(name) is not value:
                return  # somebody has set another one
            if had:
                own[name] = old
            else:
                del own[name]

        stack.callback(restore)

    def _taken(self, module: nn.Module) -> Callable[..., Any]:
        """What torch is to call for a call of the module."""
        former = vars(module).get(_IMPL) or module._call_impl

        def taken(*args: Any, **kwargs: Any) -> Any:
            if self._owner == threading.get_ident():
                return former(*args, **kwargs)
            return self._run(module, former, (args, kwargs))

        return taken

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            with self._within("generating"):
                return generate(*args, **kwargs)

        return generating

    @contextmanager
    def _within(self, what: str) -> Iterator[None]:
        depth = getattr(self._local, what, 0)
        setattr(self._local, what, depth + 1)
        try:
            yield
        finally:
            setattr(self._local, what, depth)

    def _is_within(self, what: str) -> bool:
        return getattr(self._local, what, 0) > 0

    @torch.compiler.disable(recursive=False)
    def _run(self, module: nn.Module, former: Callable[..., Any], call: Call) -> Any:
        """The module's result for the call of all rows."""
        self._check_model_mode()
        record = needed_record(self._model)
        names = self._names if record.enabled else (None,) * len(self._names)
        try:
            names = self._repeated(module, names, call)
            own = list(dict.fromkeys(names))
            rows = Rows([[row for row, n in enumerate(names) if n == name] for name in own])
            split = SplitCall(module, call, rows) if len(own) > 1 else None
        except NotRowsError as error:
            self._check_whole(module, error)
            with self._within("whole call"):
                return former(*call[0], **call[1])
        with self._lock, self._exclusive(module), self._unchanged(record):
            if split is None:
                self._use(record, own[0])
                return former(*call[0], **call[1])
            results = []
            for name, (args, kwargs) in zip(own, split.calls, strict=True):
                self._use(record, name)
                results.append(former(*args, **kwargs))
        try:
            return split.joined(results)
        except NotRowsError as error:
            raise ValueError(
                f"{self._name(module)}: {error}; compute what is one value for all rows from what "
                "each row has"
            ) from None

    def _check_model_mode(self) -> None:
        if self._model.training:
            raise ValueError("adapters_per_row is for inference: call model.eval() first")

    def _repeated(self, module: nn.Module, names: Names, call: Call) -> Names:
        """The name of each row of the call, which has several for each name in `generate`'s beams,
        and in an adapted layer that a model calls with rows and positions in one dimension.

        Raises:
            NotRowsError: it has no rows, or other ones.

        """
        inner = unwrapped(module)
        if getattr(inner, "batch_first", True) is False:
            raise NotRowsError("its rows are in dimension 1 (batch_first=False)")
        rows = row_count(named_arguments(inner, call))
        times, rest = divmod(rows, len(names))
        if self._is_within("generating"):
            several = True
        else:
            several = self._is_within("whole call") and _has_adapters(module)
        if rest or times == 0 or (times > 1 and not several):
            raise WrongCountError(
                f"its first dimension is {rows}, adapters_per_row got {len(names)} names"
            )
        return tuple(name for name in names for _ in range(times))

    def _check_whole(self, module: nn.Module, error: NotRowsError) -> None:
        """Raises ValueError if the module cannot run as a whole: it has adapters or saved tensors
        itself, or it is the model, whose batch has other rows than there are names.
        """
        record = needed_record(self._model)
        holders = {id(record.saved.module(name)) for name in record.saved.names}
        own = _has_adapters(module) or id(module) in holders
        inside = any(_has_adapters(part) or id(part) in holders for part in module.modules())
        outermost = not self._is_within("whole call")
        if own or (inside and outermost and isinstance(error, WrongCountError)):
            raise ValueError(f"{self._name(module)} cannot have an adapter for each row: {error}")

    def _name(self, module: nn.Module) -> str:
        return self._paths.get(id(module)) or type(unwrapped(module)).__name__

    @contextmanager
    def _exclusive(self, module: nn.Module) -> Iterator[None]:
        """In the context, this thread runs groups, and its calls are not taken. A compiled module
        finds the one inside it as it was compiled.
        """
        self._owner = threading.get_ident()
        inner = vars(getattr(module, "_orig_mod", module))
        taken = inner.get(_IMPL) if inner is not vars(module) else None
        try:
            if taken is not None:
                del inner[_IMPL]
            yield
        finally:
            if taken is not None:
                inner[_IMPL] = taken
            self._owner = None

    @contextmanager
    def _unchanged(self, record: ModelAdapters) -> Iterator[None]:
        """Afterwards the model uses the adapter that it used before."""
        if self._known != tuple(record.configs):
            self._list_layers(record)
        before = [(layer, layer.active_adapter, layer.adapter_enabled) for layer in self._layers]
        try:
            yield
        finally:
            for layer, name, enabled in before:
                layer.use(name, enabled)
            if record.saved.names:
                record.saved.activate(record.active if record.enabled else None)

    def _use(self, record: ModelAdapters, name: str | None) -> None:
        """Activates an adapter, or none, for the calls of a group."""
        if record.saved.names:
            record.saved.activate(name)
        for layer in self._layers:
            has_it = name in layer.adapters._modules
            layer.use(name if has_it and name is not None else layer.active_adapter, has_it)


def _has_adapters(module: nn.Module) -> bool:
    """Whether the module itself has adapters, in one of its parameters or all."""
    return isinstance(module, AdaptedLayer) or bool(stacks_of(module))
