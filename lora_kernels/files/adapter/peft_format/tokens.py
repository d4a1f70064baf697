"""PEFT's `trainable_token_indices`: rows of an embedding that an adapter replaces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...._utils.checks import FLOATS
from ...._utils.peft_names import PREFIX, TOKEN_INDICES, split_by_layer
from ....model.config import TokenRows

_ROWS = "token_adapter.trainable_tokens_delta"
# The module's name; then the adapter's name, which `save_pretrained` leaves out.
_NAME = re.compile(rf"(.+)\.{re.escape(_ROWS)}(?:\.[^.]+)?")


def split_rows(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
    """The rows by the names of their weights in the base model, and all other tensors.

    Args:
        values: the content of `adapter_config.json`.
        tensors: the tensors by PEFT's names.

    Raises:
        ValueError: the configuration and the tensors do not fit each other.

    """
    wanted = values.get(TOKEN_INDICES)
    if not wanted:
        return {}, dict(tensors)
    found, others = split_by_layer(_NAME, tensors)
    rows: dict[str, TokenRows] = {}
    used: set[str] = set()
    for module, tensor in found.items():
        indices = wanted
        if isinstance(wanted, Mapping):
            named = [name for name in wanted if _is_end(name, module)]
            if len(named) != 1:
                raise ValueError(f"{TOKEN_INDICES} has no tokens of {module!r}, whose rows it has")
            used.add(named[0])
            indices = wanted[named[0]]
        rows[f"{module}.weight"] = _checked(module, indices, tensor)
    if not rows:
        raise ValueError(f"{TOKEN_INDICES} = {wanted!r}, but it has no rows of an embedding")
    # PEFT stores the rows of tied modules once.
    if isinstance(wanted, Mapping) and (lost := [n for n in wanted if n not in used]):
        stored = [wanted[name] for name in used]
        if any(wanted[name] not in stored for name in lost):
            raise ValueError(f"{TOKEN_INDICES} names {', '.join(lost)}, whose rows are missing")
    return rows, others


def rows_to_peft(rows: Mapping[str, TokenRows]) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """The value of `trainable_token_indices`, by the modules' whole names, and the tensors."""
    modules = {name.removesuffix(".weight"): row for name, row in rows.items()}
    indices = {module: list(row.indices) for module, row in modules.items()}
    return indices, {f"{PREFIX}{module}.{_ROWS}": row.values for module, row in modules.items()}


def _is_end(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _checked(module: str, indices: Any, values: Tensor) -> TokenRows:
    """Raises ValueError unless there is one row of floating-point numbers for each token."""
    whole = isinstance(indices, (list, tuple)) and all(
        type(index) is int and index >= 0 for index in indices
    )
    if not whole or len(set(indices)) != len(indices):
        raise ValueError(
            f"{TOKEN_INDICES} of {module!r} are not distinct non-negative integers: {indices!r}"
        )
    if values.dim() != 2 or values.dtype not in FLOATS or len(values) != len(indices):
        raise ValueError(
            f"the rows of {module!r} are {list(values.shape)} of {values.dtype}, for "
            f"{len(indices)} tokens"
        )
    return TokenRows(tuple(indices), values)
