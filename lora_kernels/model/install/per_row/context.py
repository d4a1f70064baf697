"""`adapters_per_row`: a context in which each row of a batch has an adapter of its own."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from ...._utils.errors import unknown_name
from ....init.sharded.layout import is_sharded
from ....layers.adapted import AdaptedLayer
from ....layers.adapter import Adapter
from ..layers import adapted_layers, unwrapped
from ..record import ModelAdapters, check_started, needed_record
from .arguments import Call, SplitCall, named_arguments, row_count
from .modules import IMPL, Taken, has_adapters, is_batch_first, is_compiled
from .rows import NotRowsError, Rows, WrongCountError

Names = tuple[str | None, ...]

BASE = "__base__"  # PEFT's name for rows without an adapter
_OPEN: WeakSet[Any] = WeakSet()  # the models that are in a context


@contextmanager
def adapters_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """A context for inference in which each row of a batch has its own adapter. `names` has the
    adapter of each row of the first dimension; None, or PEFT's "__base__", means the base.

    A call of the model runs once for each of these adapters, with that adapter's rows. Each row's
    results are bit for bit those of a batch of that adapter's rows alone, including saved modules,
    biases and DoRA. A call takes as long as these smaller batches, and hooks are called for each of
    them. transformers' key-value caches are split and joined. In `generate`, a name applies to all
    beams and returned sequences of its row; with a static cache, the masks are those of the whole
    batch. While adapters are disabled, all rows get the base.

    If an argument cannot be split into rows (the images of a vision model), the module that gets it
    runs once for the whole batch, and the adapted modules inside it run for each adapter. The same
    holds for caches that cannot be split, such as quantized ones, and for a two-dimensional `mask`
    that may be [rows, L] or [L, S]. What such a module itself computes may differ by rounding from
    the result of a separate batch.

    Args:
        model: a model with adapters by `add_lora` or `load_adapter`, in evaluation mode; it may be
            compiled.
        names: the name of each row's adapter, or None for the base.

    Raises:
        ValueError: the model has no adapters or none of that name, is in training mode, is sharded,
            or is in such a context already. In a call: there are not as many rows as names, or the
            results of the rows cannot be joined (such as a loss of all rows); the error names the
            module.
        TypeError: `names` is not a list of strings and None.

    """
    context = _Context(model, _checked_names(needed_record(model), names))
    inner = unwrapped(model)
    if inner in _OPEN:
        raise ValueError(
            "the model is in a context of adapters_per_row already: leave it, or give it the names "
            "of all rows"
        )
    with ExitStack() as stack:
        _OPEN.add(inner)
        stack.callback(_OPEN.discard, inner)
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
    can be split into rows runs once for each adapter; the calls inside it run as usual.
    """

    def __init__(self, model: nn.Module, names: Names) -> None:
        self._model, self._names = model, names
        # Adapters are not called: the layers read their tensors.
        modules = {m: path for path, m in model.named_modules() if not isinstance(m, Adapter)}
        self._modules, self._paths = list(modules), {id(m): path for m, path in modules.items()}
        self._lock = threading.Lock()  # a layer has one active adapter for all threads
        self._owner: int | None = None  # the thread that runs a group
        self._local = threading.local()
        self._layers: list[AdaptedLayer] = []
        self._known: tuple[str, ...] = ()  # the adapters, when the layers were listed
        self._compiled: list[Taken] = []  # those of modules inside compiled ones

    def enter(self, stack: ExitStack) -> None:
        """Intercepts the calls of all modules, until the stack is closed."""
        self._check_model()
        record = needed_record(self._model)
        for name in {name for name in self._names if name is not None}:
            check_started(self._model, name)
        self._list_layers(record)
        calls = {id(module): self._taken(module) for module in self._modules}
        for module in filter(is_compiled, self._modules):
            inside = [id(part) for part in module.modules() if part is not module]
            self._compiled += [calls[part] for part in inside if part in calls]
        for call in calls.values():
            call.put()
            stack.callback(call.remove)

    def _check_model(self) -> None:
        """Raises ValueError if the model is in training mode or sharded."""
        if self._model.training:
            raise ValueError(
                "adapters_per_row is for inference, and the model is in training mode: call "
                "model.eval() first"
            )
        for module in self._modules:
            for key, parameter in module._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    name = ".".join(filter(None, (self._paths[id(module)], key)))
                    raise ValueError(
                        f"adapters_per_row cannot run a sharded model, and {name} is sharded: the "
                        "processes would have to run the same adapters at the same time"
                    )

    def _list_layers(self, record: ModelAdapters) -> None:
        self._layers = list(adapted_layers(self._model).values())
        self._known = tuple(record.configs)

    def _taken(self, module: nn.Module) -> Taken:
        former = vars(module).get(IMPL) or module._call_impl

        def taken(*args: Any, **kwargs: Any) -> Any:
            own = self._owner
            if own is not None and (is_dynamo_compiling() or own == threading.get_ident()):
                return former(*args, **kwargs)
            return self._run(module, former, (args, kwargs))

        return Taken(module, taken)

    @property
    def _depth(self) -> int:
        """The number of calls that run as a whole and that this thread is inside of."""
        return getattr(self._local, "depth", 0)

    @contextmanager
    def _whole_call(self) -> Iterator[None]:
        self._local.depth = self._depth + 1
        try:
            yield
        finally:
            self._local.depth -= 1

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
            split = SplitCall(unwrapped(module), call, rows) if len(own) > 1 else None
        except NotRowsError as error:
            self._check_whole(module, error)
            with self._whole_call():
                return former(*call[0], **call[1])
        with self._lock, self._exclusive(), self._unchanged(record):
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
        """The name of each row of the call. A name has several rows in `generate`'s beams, and in
        an adapted layer that a model calls with rows and positions in one dimension.

        Raises:
            NotRowsError: the call has no rows, or a number of rows that does not fit the names.

        """
        inner = unwrapped(module)
        if not is_batch_first(inner):
            raise NotRowsError("its rows are in dimension 1 (batch_first=False)")
        rows = row_count(named_arguments(inner, call))
        times, rest = divmod(rows, len(names))
        if rest or times == 0 or (times > 1 and not self._may_repeat(module)):
            raise WrongCountError(
                f"its first dimension is {rows}, adapters_per_row got {len(names)} names"
            )
        return tuple(name for name in names for _ in range(times))

    def _may_repeat(self, module: nn.Module) -> bool:
        """Whether a call may have several rows for each name."""
        return bool(self._depth and has_adapters(module)) or self._is_generating()

    def _is_generating(self) -> bool:
        """Whether the caller is a method `generate` of the model or of a model in it."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_name == "generate" and id(frame.f_locals.get("self")) in self._paths:
                return True
            frame = frame.f_back
        return False

    def _check_whole(self, module: nn.Module, error: NotRowsError) -> None:
        """Raises ValueError if the module cannot run as a whole: it is adapted itself; or it
        contains adapted modules and is the model (whose batch does not have one row for each name)
        or has its rows in dimension 1.
        """
        wrong = not self._depth and isinstance(error, WrongCountError)
        wrong = wrong or not is_batch_first(unwrapped(module))
        if any(map(self._is_adapted, module.modules() if wrong else (module,))):
            raise ValueError(f"{self._name(module)} cannot have an adapter for each row: {error}")

    def _is_adapted(self, module: nn.Module) -> bool:
        """Whether the module itself has adapters, or tensors that an adapter trains in full."""
        saved = needed_record(self._model).saved
        return has_adapters(module) or any(saved.module(n) is module for n in saved.names)

    def _name(self, module: nn.Module) -> str:
        return self._paths.get(id(module)) or type(unwrapped(module)).__name__

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """In the context, this thread runs groups, and its calls are not intercepted. The modules
        inside compiled modules are as they were when these were compiled.
        """
        self._owner = threading.get_ident()
        try:
            for call in self._compiled:
                call.remove()
            yield
        finally:
            for call in self._compiled:
                call.put()
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
