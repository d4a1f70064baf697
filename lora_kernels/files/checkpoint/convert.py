"""Converts an adapter from one format to another."""

from __future__ import annotations

from pathlib import Path

from ..adapter.folder import SavedAdapter, read_adapter, write_adapter
from .folder import CONFIG, ModelFolder, check_outside
from .residual import read_start, refuse_residual, trained_from


def convert(
    adapter: Path,
    out: Path,
    *,
    format: str = "peft",
    compress_to: int | None = None,
    start: Path | None = None,
) -> SavedAdapter:
    """Reads the adapter of a folder and writes it into another, as
    `lora_kernels.files.adapter.folder.write_adapter` does.

    `start` is the folder that `initialize` wrote beside a residual base: then `adapter` was trained
    on that base, and the result is an adapter of the original base.

    Raises:
        ValueError: the adapter was not trained from this start, the start would be overwritten, or
            the adapter was trained on a residual base and there is no `start`; and as
            `read_adapter` and `write_adapter`.

    """
    state = read_adapter(adapter)
    if start is not None:
        check_outside(start, out)  # every adapter of that residual base needs it
        state = trained_from(read_start(start), state)
    else:
        refuse_residual(adapter, state)
    names, conv1d = None, False
    base = Path(state.base_model or "")
    # If the base is available, the configuration can name layers by their endings.
    if state.base_model and (base / CONFIG).is_file():
        folder = ModelFolder(base)
        names = folder.module_names
        conv1d = all(folder.is_transposed(name) for name in state.layers)
    return write_adapter(
        out,
        state,
        format=format,
        compress_to=compress_to,
        module_names=names,
        fan_in_fan_out=conv1d,
    )
