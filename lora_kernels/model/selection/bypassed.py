"""Layers whose adapter would have no effect, because the model does not call the layer under its
name.

Mamba's mixers and WavLM's attention compute with `self.out_proj.weight` and do not call the layer.
No list of classes can name them all: the source of each module's class is read instead, once per
class. A read that only asks for the dtype, device or shape does not count. OneFormer's heads call a
layer from a list, where PEFT does not replace it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from ..._utils.source import WEIGHT, SourceFile, definition, is_trusted, undecorated

# From a module to another one inside it: names of attributes; ANY for each child, DEEP for each
# module below.
Path = tuple[str, ...]
Class = Any  # a class of modules; type checkers see no Hashable, by nn.Module's annotations
ANY, DEEP = "*", "**"

# Methods that prepare, save or change a model, but compute nothing of its output.
_PREPARING = (
    *("__init__", "__repr__", "extra_repr", "get_input_embeddings", "get_output_embeddings"),
    *("post_init", "prune_heads", "reset_parameters", "resize_token_embeddings"),
    *("set_input_embeddings", "set_output_embeddings", "tie_weights"),
)
_PREPARING_PREFIXES = (
    *("_init", "init_", "_load", "load_", "_prune", "_resize", "_tie", "from_"),
    *("fuse_", "unfuse_"),  # diffusers' way to join projections, before or after a run
)
_ITERATING = ("enumerate", "iter", "list", "reversed", "sorted", "tuple", "zip")
_ITERATING_METHODS = ("children", "items", "named_children", "values")
_DEPTH = 3  # of functions that are given a module
# Attributes of every module: its submodules, and hooks, which others add.
_OWN = tuple(vars(nn.Module()))


def bypassed_layers(model: nn.Module) -> dict[str, str]:
    """{name: reason} of the modules whose weight another module of the model reads directly, or
    that a module also keeps in an attribute that is not a submodule.

    A layer has an entry under each of its names. Code without a source cannot be read; Python
    functions that get a layer as an argument are followed.
    """
    reasons: dict[int, str] = {}
    reads: dict[Class, set[Path]] = {}
    for module in model.modules():
        cls: Class = type(module)
        for attribute, value in vars(module).items():
            if attribute in _OWN:
                continue
            for layer in _held(value):
                if layer is not module:
                    reasons[id(layer)] = (
                        f"its {cls.__name__} keeps the layer in {attribute!r} too, where it cannot "
                        "be replaced"
                    )
        if cls not in reads:
            reads[cls] = reads_of(cls)
        for path in reads[cls] | _reads_of_instance(module):
            for layer in _resolved(module, path):
                if layer is not module:
                    reasons.setdefault(
                        id(layer),
                        f"its {type(module).__name__} reads the weight directly, without calling "
                        "the layer",
                    )
    if not reasons:
        return {}
    named = model.named_modules(remove_duplicate=False)
    return {name: reasons[id(module)] for name, module in named if id(module) in reasons}


def _held(value: object, depth: int = 3) -> Iterator[nn.Module]:
    """The modules in an attribute: itself, in a container, or as the owner of a method."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, MethodType):
        yield from _held(value.__self__, 0)
    elif isinstance(value, partial):
        yield from _held([value.func, *value.args, *value.keywords.values()], depth)
    elif isinstance(value, (list, tuple, set, dict)) and depth:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _held(part, depth - 1)


def _resolved(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules at the end of the path, which starts at `module`."""
    if not path:
        yield module
        return
    step, rest = path[0], path[1:]
    found: Iterable[object] = [module._modules.get(step, vars(module).get(step))]
    if step == ANY:
        found = module._modules.values()
    elif step == DEEP:
        found = module.modules()
    for child in found:
        if isinstance(child, nn.Module):
            yield from _resolved(child, rest)


def reads_of(cls: Class) -> set[Path]:
    """The paths to the modules whose weights the methods of a class read."""
    # Not cached for the class, whose methods others may replace; each function's reads are.
    found: set[Path] = set()
    for base in cls.__mro__:
        if is_trusted(base.__module__):
            continue
        for name, value in vars(base).items():
            if name not in _PREPARING and not name.startswith(_PREPARING_PREFIXES):
                found |= _reads_of_method(cls, value)
    return found


def _reads_of_instance(module: nn.Module) -> frozenset[Path]:
    """The same for a forward that replaces the class's forward in this module only."""
    if "forward" not in vars(module):
        return frozenset()
    return _reads_of_method(type(module), vars(module)["forward"])


def _reads_of_method(cls: Class, method: object) -> frozenset[Path]:
    function = undecorated(method)
    if function is None or not function.__code__.co_argcount:
        return frozenset()
    return _reads_of_call(cls, function, ((function.__code__.co_varnames[0], frozenset({()})),))


@lru_cache(maxsize=16384)
def _reads_of_call(
    cls: Class,
    function: FunctionType,
    arguments: tuple[tuple[str, frozenset[Path]], ...],
    depth: int = 0,
) -> frozenset[Path]:
    """The paths to the modules whose weights a function reads, if it gets these modules as
    arguments (by parameter name). The paths start at the module of the class `cls`.
    """
    found = None if is_trusted(function.__module__ or "") else definition(function)
    if found is None:
        return frozenset()
    file, node = found
    return frozenset(_Reader(cls, function, file, node, dict(arguments), depth).reads())


class _Reader:
    """Reads one function. What a name may stand for is collected over the whole function, whatever
    the order of its statements.
    """

    def __init__(
        self,
        cls: Class,
        function: FunctionType,
        file: SourceFile,
        node: ast.FunctionDef,
        arguments: dict[str, frozenset[Path]],
        depth: int,
    ) -> None:
        self.cls, self.function, self.file, self.depth = cls, function, file, depth
        self.names: dict[str, set[Path]] = {name: set(paths) for name, paths in arguments.items()}
        self.nodes = [part for statement in node.body for part in ast.walk(statement)]
        for _ in range(2):  # a name may stand for another one that is bound further below
            for part in self.nodes:
                self._bind(part)

    def reads(self) -> set[Path]:
        """The paths to the modules whose weights are read."""
        found: set[Path] = set()
        for node in self.nodes:
            owner = _owner_of_weight(node)
            if owner is not None and not self.file.is_metadata(node):
                found |= self._paths(owner)
            if isinstance(node, ast.Call) and self.depth < _DEPTH:
                found |= self._followed(node)
        return found - {()}

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._assign_all(node.target, self._elements(node.iter))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        values = value.elts if isinstance(value, ast.Tuple) else [value]
        if len(parts) != len(values) or parts == [target]:
            self._assign_all(target, self._paths(value))
            return
        for part, its_value in zip(parts, values, strict=True):
            self._assign(part, its_value)

    def _assign_all(self, target: ast.expr, paths: set[Path]) -> None:
        if isinstance(target, ast.Name):
            self.names.setdefault(target.id, set()).update(paths)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._assign_all(part, paths)

    def _paths(self, node: ast.expr) -> set[Path]:
        """The paths to the modules that an expression may stand for."""
        if isinstance(node, ast.Name):
            return set(self.names.get(node.id, ()))
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self._paths(node.value)}
        if isinstance(node, ast.Subscript):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            fixed = isinstance(index, str) or (type(index) is int and index >= 0)
            return {(*path, str(index) if fixed else ANY) for path in self._paths(node.value)}
        if isinstance(node, ast.IfExp):
            return self._paths(node.body) | self._paths(node.orelse)
        if isinstance(node, (ast.BoolOp, ast.Tuple, ast.List)):
            parts = node.values if isinstance(node, ast.BoolOp) else node.elts
            return {path for part in parts for path in self._paths(part)}
        if isinstance(node, ast.NamedExpr):
            return self._paths(node.value)
        if isinstance(node, ast.Call) and _called(node) == "getattr" and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ANY
            return {(*path, str(name)) for path in self._paths(node.args[0])}
        return set()

    def _elements(self, node: ast.expr) -> set[Path]:
        """The paths to the modules that iterating over an expression may give."""
        if isinstance(node, (ast.Tuple, ast.List)):
            return self._paths(node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            return self._elements(node.value)
        if not isinstance(node, ast.Call):
            return {(*path, ANY) for path in self._paths(node)}
        if isinstance(node.func, ast.Attribute):
            step = DEEP if node.func.attr in ("modules", "named_modules") else ANY
            iterates = step == DEEP or node.func.attr in _ITERATING_METHODS
            return {(*p, step) for p in self._paths(node.func.value)} if iterates else set()
        if _called(node) in _ITERATING:
            return {path for part in node.args for path in self._elements(part)}
        return set()

    def _followed(self, call: ast.Call) -> set[Path]:
        """The paths to the modules whose weights a called Python function reads."""
        given = [self._paths(argument) for argument in call.args]
        named = {word.arg: self._paths(word.value) for word in call.keywords if word.arg}
        if not any((*given, *named.values())):
            return set()
        function = self._function(call.func)
        if function is None:
            return set()
        names = function.__code__.co_varnames
        is_method = isinstance(call.func, ast.Attribute) and self._paths(call.func.value)
        first: list[set[Path]] = [{()}] if is_method else []
        bound = dict(zip(names, first + given, strict=False)) | named
        arguments = tuple(sorted((n, frozenset(p)) for n, p in bound.items() if n in names and p))
        return set(_reads_of_call(self.cls, function, arguments, self.depth + 1))

    def _function(self, called: ast.expr) -> FunctionType | None:
        """The Python function that an expression names, if it is known without running the code."""
        scope = self.function.__globals__
        if isinstance(called, ast.Name):
            return undecorated(scope.get(called.id))
        if not isinstance(called, ast.Attribute):
            return None
        if self._paths(called.value) == {()}:
            return undecorated(inspect.getattr_static(self.cls, called.attr, None))
        owner = scope.get(called.value.id) if isinstance(called.value, ast.Name) else None
        return undecorated(vars(owner).get(called.attr)) if isinstance(owner, ModuleType) else None


def _called(call: ast.Call) -> str:
    """The name of the called function; "" if it is an expression."""
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _owner_of_weight(node: ast.AST) -> ast.expr | None:
    """The expression `x` of a read `x.weight`, in any of its spellings; None for other nodes."""
    if isinstance(node, ast.Attribute) and node.attr == WEIGHT:
        return node.value if isinstance(node.ctx, ast.Load) else None
    if isinstance(node, ast.Call) and _called(node) == "getattr" and len(node.args) > 1:
        return node.args[0] if _is_weight(node.args[1]) else None
    if isinstance(node, ast.Subscript) and _is_weight(node.slice):
        inside = node.value
        if isinstance(inside, ast.Attribute) and inside.attr == "_parameters":
            return inside.value
    return None


def _is_weight(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == WEIGHT
