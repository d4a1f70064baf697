"""Where the source of a model's code reads a layer's `.weight`, and whether it needs the values."""

from __future__ import annotations

import ast
import inspect
import linecache
from functools import cached_property, lru_cache
from types import FrameType, FunctionType

# Attributes of a tensor that do not depend on its values, and functions or methods of other tensors
# that read only such attributes of an argument.
_METADATA = (
    *("device", "dim", "dtype", "element_size", "is_contiguous", "is_cuda", "is_floating_point"),
    *("is_meta", "is_quantized", "layout", "ndim", "ndimension", "nelement", "new_empty"),
    *("new_full", "new_ones", "new_zeros", "numel", "requires_grad", "shape", "size", "stride"),
)
_TAKES_METADATA = (
    *("expand_as", "get_device", "hasattr", "id", "is_tensor", "isinstance", "ones_like"),
    *("reshape_as", "to", "type", "type_as", "view_as", "zeros_like"),
)
WEIGHT = "weight"
# Packages whose code calls the layers of a model, or reads weights to store, move or cast them.
_TRUSTED = (
    *("accelerate", "bitsandbytes", "deepspeed", "huggingface_hub", "lora_kernels", "peft"),
    *("torch", "torchao", "transformers"),
)
_MODELS = "transformers.models."


def is_trusted(module_name: str) -> bool:
    """Whether the code of this module never computes with the weight of a layer that it could call
    instead.
    """
    return module_name.partition(".")[0] in _TRUSTED and not module_name.startswith(_MODELS)


def frame_needs_values(frame: FrameType) -> bool:
    """Whether the line that a frame runs, a read of `.weight`, may compute with the values."""
    if is_trusted(frame.f_globals.get("__name__", "")):
        return False
    file = source_file(frame.f_code.co_filename)
    return file is None or file.needs_values(frame.f_lineno)


class SourceFile:
    """A Python file: its functions, and its reads of attributes called "weight"."""

    def __init__(self, text: str) -> None:
        self._tree = ast.parse(text)

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """The node that contains each node."""
        return {
            child: node for node in ast.walk(self._tree) for child in ast.iter_child_nodes(node)
        }

    @cached_property
    def functions(self) -> dict[tuple[str, int], ast.FunctionDef]:
        """The functions by name and first line, which is that of a decorator if there is one."""
        found = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[node.name, first] = node
        return found

    @cached_property
    def _reads(self) -> dict[int, list[ast.Attribute]]:
        """The reads of `.weight` by the lines that they are on."""
        found: dict[int, list[ast.Attribute]] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and node.attr == WEIGHT:
                for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                    found.setdefault(line, []).append(node)
        return found

    def needs_values(self, line: int) -> bool:
        """Whether a read of `.weight` on this line may need more than the tensor's metadata."""
        reads = self._reads.get(line)
        return not reads or any(not self.is_metadata(node) for node in reads)

    def is_metadata(self, read: ast.AST) -> bool:
        """Whether the expression `read`, a tensor, is used for its dtype, device or shape only."""
        parent = self.parents[read]
        if isinstance(parent, ast.Attribute):
            return parent.attr in _METADATA
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        if isinstance(parent, ast.Call) and read is not parent.func:
            called = parent.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            return name in _TAKES_METADATA
        return False


@lru_cache(maxsize=256)
def source_file(path: str) -> SourceFile | None:
    """The parsed file; None if it cannot be read."""
    try:
        return SourceFile("".join(linecache.getlines(path)))
    except (SyntaxError, ValueError, RecursionError):
        return None


def definition(function: FunctionType) -> tuple[SourceFile, ast.FunctionDef] | None:
    """The definition of a function, and its file; None if the source is not known."""
    code = function.__code__
    file = source_file(code.co_filename)
    node = None if file is None else file.functions.get((code.co_name, code.co_firstlineno))
    return None if file is None or node is None else (file, node)


def undecorated(value: object) -> FunctionType | None:
    """The function inside a method, property, partial or decorated function, if there is one."""
    for part in ("fget", "func", "__func__"):
        value = getattr(value, part, None) or value
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None
