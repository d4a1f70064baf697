"""Adapters in folders: written for PEFT and serving engines or as they are, and read again.

format="peft": `adapter_config.json` and `adapter_model.safetensors`, which give the adapted model
on the original base, whatever the start (see `_peft_format`). The recipe from which training goes
on exactly lies in the header of the tensors, where PEFT and engines do not look.

format="native": `adapter_native.safetensors`, another name on purpose, holds A, B, R and the starts
that are no recipe, at their rank.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._utils.errors import unknown_name
from ..._utils.safetensors import load_tensors, save_tensors
from ...model.config import AdapterState
from ..io.replace import replace_files
from .compression import recompressed
from .peft_format import from_peft, rank_fields, to_peft
from .recipe import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    FORMATS,
    METADATA,
    NATIVE_FILE,
    NATIVE_TYPE,
    START,
    recipe_from_json,
    recipe_to_json,
)
from .tensors import check_state, check_tensors, from_recipe, native_tensors

_OWNED = frozenset({ADAPTER_CONFIG, ADAPTER_FILE, NATIVE_FILE})


@dataclass(frozen=True)
class SavedAdapter:
    """What was written; `str()` of it is a line or two to print.

    Attributes:
        folder: where.
        files: their sizes in bytes by name.
        layers: how many layers there are.
        scalings: the different s of the layers.
        folded: the layers whose R is multiplied into A: format="peft" has no place for it, and
            training goes on with A and B. format="native" keeps it.
        errors: with `compress_to`, ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of each layer; else None.
        error: the same over all layers.

    """

    folder: Path
    files: dict[str, int]
    layers: int
    scalings: tuple[float, ...]
    folded: tuple[str, ...] = ()
    errors: dict[str, float] | None = None
    error: float | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in self.files.items())
        lines = [f"{self.folder}: {self.layers} layers in {sizes}"]
        if self.errors:
            worst = max(self.errors, key=self.errors.get)
            lines.append(
                f"recompressed with a relative error of {self.error:.2e}, at most "
                f"{self.errors[worst]:.2e} ({worst})"
            )
        if len(self.scalings) > 1 and ADAPTER_FILE in self.files:
            lines.append(
                f"its layers have {len(self.scalings)} different scalings, by alpha_pattern: PEFT "
                "reads that, vLLM does not and would scale them alike"
            )
        if self.folded:
            lines.append(
                f"R of {len(self.folded)} layers is multiplied into A; only format='native' keeps "
                "it for further training"
            )
        return "\n".join(lines)


def write_adapter(
    folder: str | Path,
    state: AdapterState,
    *,
    format: str = "peft",
    compress_to: int | None = None,
    module_names: Collection[str] | None = None,
    fan_in_fan_out: bool = False,
) -> SavedAdapter:
    """Writes an adapter into a folder, over the one that is there; a killed process leaves the old
    one whole, or the new one. Other files in the folder stay.

    Args:
        folder: made if it is not there.
        state: the adapter.
        format: "peft", which PEFT and serving engines load on the original base. A start that was
            taken out doubles the rank: A' = [A; A₀], B' = [B, −B₀]. Or "native", for this package:
            as small as the training state.
        compress_to: the rank that format="peft" is cut to, by the SVD of s(BA − B₀A₀); what is
            written is a plain adapter then, from which the start cannot be told.
        module_names: the names of all modules of the base. With them `target_modules` of the
            configuration can be endings ("q_proj") where those mean exactly these layers.
        fan_in_fan_out: whether the layers are Conv1D, for PEFT's field of that name.

    Raises:
        ValueError: an unknown format, or tensors that are not finite or do not go together; nothing
            is written then.

    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if compress_to is not None and format != "peft":
        raise ValueError("compress_to makes a plain adapter: it goes with format='peft' only")
    check_state(state)
    folder, errors, error, folded = Path(folder), None, None, ()
    metadata: dict[str, str] = {}
    if format == "native":
        file, tensors = NATIVE_FILE, native_tensors(state)
        recipe = recipe_to_json(state.layers, format, state.config, state.base_model)
        metadata[METADATA] = recipe
        config = {"peft_type": NATIVE_TYPE, **json.loads(recipe)}
    else:
        if compress_to is not None:
            state, errors, error = recompressed(state, compress_to)
        file = ADAPTER_FILE
        config, tensors = to_peft(state, module_names, fan_in_fan_out)
        if compress_to is None:
            folded = tuple(n for n, layer in state.layers.items() if layer.lora_R is not None)
            metadata[METADATA] = recipe_to_json(
                state.layers,
                format,
                state.config,
                state.base_model,
                peft_config=config,
                rank_fields=rank_fields(state, {n: layer.r for n, layer in state.layers.items()}),
            )
    content = json.dumps(config, indent=2, allow_nan=False).encode()
    replace_files(
        folder,
        file,
        lambda path: save_tensors(tensors, path, metadata),
        {ADAPTER_CONFIG: content},
        _OWNED,
    )
    sizes = {file: (folder / file).stat().st_size, ADAPTER_CONFIG: len(content)}
    scalings = tuple(sorted({float(f"{layer.scaling:.12g}") for layer in state.layers.values()}))
    return SavedAdapter(folder, sizes, len(state.layers), scalings, folded, errors, error)


def read_adapter(folder: str | Path) -> AdapterState:
    """The adapter of a folder, on the CPU.

    What this package wrote comes back as it was trained: A, B, R, the start and how it is taken
    out, bit for bit (but an R that is folded, see `SavedAdapter`). What PEFT wrote is a plain
    adapter, with nothing to take out.

    Raises:
        FileNotFoundError: no adapter is there.
        ValueError: a file is damaged, holds something else, or an option that is not implemented.

    """
    folder = Path(folder)
    for _ in range(3):
        config = _read_config(folder)
        file = _tensor_file(folder, config)
        tensors, metadata = load_tensors(file)
        if _read_config(folder) == config:
            break  # else somebody has just written another one
    try:
        check_tensors(tensors)
        if METADATA not in metadata:
            if file.name == NATIVE_FILE:
                raise ValueError("its recipe is missing")
            if config is None:
                raise ValueError(f"{ADAPTER_CONFIG} is missing beside it, which has the scaling")
            return from_peft(config, tensors)
        recipe = recipe_from_json(metadata[METADATA])
        if recipe["format"] == START:
            raise ValueError(
                f"it is the start of {recipe['base_model']}, whose weights lack it, and wrong on "
                "the original model: train it there with PEFT, and convert what comes of it with "
                f"lora-kernels convert --start {folder}"
            )
        if (recipe["format"] == "native") != (file.name == NATIVE_FILE):
            raise ValueError(f"it was saved in the format {recipe['format']!r} and renamed")
        return from_recipe(recipe, config, tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any] | None:
    """`adapter_config.json`, or None."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder: give that of an adapter, downloaded if it is on a hub"
        )
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no JSON object")
    return config


def _tensor_file(folder: Path, config: dict[str, Any] | None) -> Path:
    """The file that the configuration goes with; without one, what was written last."""
    names = (NATIVE_FILE, ADAPTER_FILE)
    if config is not None:
        names = (NATIVE_FILE,) if config.get("peft_type") == NATIVE_TYPE else (ADAPTER_FILE,)
    files = [folder / name for name in names if (folder / name).is_file()]
    if files:
        return max(files, key=lambda file: file.stat().st_mtime_ns)
    hint = ""
    for name in ("adapter_model.bin", "adapter_model.pt"):
        if (folder / name).is_file():
            hint = f"; {name} is not read: save it from PEFT with safe_serialization=True"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inside and config is None:
        hint = f"; there are adapters in its folders {', '.join(inside[:8])}"
    raise FileNotFoundError(f"{folder} has no {' or '.join(names)}{hint}")
