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

from torch import Tensor, nn

from . import _recipe
from ._atomic import replace_files
from ._errors import unknown_name
from ._extras import needed
from ._peft_format import DECISIVE, check_pair, from_peft, split_tensors, to_peft
from .checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from .model import _inner, adapter_state, apply_state
from .model_report import LoRAReport
from .ops._checks import FLOATS
from .recompression import recompressed
from .state import AdapterState, LayerState

NATIVE_FILE = "adapter_native.safetensors"
NATIVE_TYPE = "LORA_KERNELS"
FORMATS = ("peft", "native")
_OWNED = frozenset({ADAPTER_CONFIG, ADAPTER_FILE, NATIVE_FILE})
METADATA = "lora_kernels"
START = "start"  # the format of a start beside the base that lacks it (lora_kernels.stream)


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


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str | None = None,
    format: str = "peft",
    compress_to: int | None = None,
) -> SavedAdapter:
    """Writes an adapter of the model, the active one by default, as `write_adapter` does."""
    state = adapter_state(model, adapter_name)
    modules = {name: module for name, module in _inner(model).named_modules() if name}
    inside = tuple(f"{name}." for name in state.layers)  # what adapting them has added
    return write_adapter(
        folder,
        state,
        format=format,
        compress_to=compress_to,
        module_names=[name for name in modules if not name.startswith(inside)],
        fan_in_fan_out=all(getattr(modules[n], "transposed", False) for n in state.layers),
    )


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = True,
    progress: bool = True,
) -> LoRAReport:
    """Puts the adapter of a folder onto the model; whether it was written here or by PEFT.

    Args:
        model: the base, which may have other adapters.
        folder: of `save_adapter`, or PEFT's.
        adapter_name: what it is called from now on; it is active.
        is_trainable: whether it can be trained further.
        progress: whether a bar is shown, if standard error is a terminal.

    Returns:
        What was adapted, as `add_lora` reports it.

    Raises:
        ValueError: as `read_adapter`, or the adapter does not fit the model, which is as it was
            then.

    """
    state = read_adapter(folder)
    return apply_state(
        model, state, adapter_name=adapter_name, is_trainable=is_trainable, progress=progress
    )


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
    _check_state(state)
    folder, errors, error, folded = Path(folder), None, None, ()
    metadata: dict[str, str] = {}
    if format == "native":
        file, tensors = NATIVE_FILE, native_tensors(state)
        metadata[METADATA] = _recipe.to_json(state, format)
        config = {"peft_type": NATIVE_TYPE, **json.loads(metadata[METADATA])}
    else:
        if compress_to is not None:
            state, errors, error = recompressed(state, compress_to)
        file = ADAPTER_FILE
        config, tensors = to_peft(state, module_names, fan_in_fan_out)
        if compress_to is None:
            folded = tuple(n for n, layer in state.layers.items() if layer.lora_R is not None)
            metadata[METADATA] = _recipe.to_json(state, format, peft_config=config)
    content = json.dumps(config, indent=2, allow_nan=False).encode()
    replace_files(
        folder,
        file,
        lambda path: _save(tensors, path, metadata),
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
    config = _read_config(folder)
    file = _tensor_file(folder, config)
    tensors, metadata = load_tensors(file)
    try:
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS and ".lora_" in name:
                raise ValueError(
                    f"{name!r} is {tensor.dtype}, no floating-point type of an adapter"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name!r} holds NaN or Inf; take an earlier one")
        if METADATA not in metadata:
            if file.name == NATIVE_FILE:
                raise ValueError("its recipe is missing")
            if config is None:
                raise ValueError(f"{ADAPTER_CONFIG} is missing beside it, which has the scaling")
            return from_peft(config, tensors)
        recipe = _recipe.from_json(metadata[METADATA])
        if recipe["format"] == START:
            raise ValueError(
                f"it is the start of {recipe['base_model']}, whose weights lack it, and wrong on "
                "the original model: train it there with PEFT, and convert what comes of it with "
                f"lora-kernels convert --start {folder}"
            )
        if (recipe["format"] == "native") != (file.name == NATIVE_FILE):
            raise ValueError(f"it was saved in the format {recipe['format']!r} and renamed")
        return _from_recipe(recipe, config, tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check_state(state: AdapterState) -> None:
    """Raises unless it can be written and read again."""
    if not state.layers:
        raise ValueError("the adapter has no layers")
    for name, layer in state.layers.items():
        _check_layer(name, layer, layer.r)
        for key in _recipe.FACTORS:
            factor = getattr(layer, key)
            if factor is not None and not bool(factor.isfinite().all()):
                raise ValueError(f"{key} of {name!r} holds NaN or Inf; nothing was written")
    for name, tensor in state.extra.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or Inf; nothing was written")


def native_tensors(state: AdapterState) -> dict[str, Tensor]:
    """The tensors of format="native" by their names."""
    tensors = {f"extra.{name}": tensor for name, tensor in state.extra.items()}
    for name, layer in state.layers.items():
        for key in _recipe.FACTORS:
            factor = getattr(layer, key)
            if factor is not None:
                tensors[f"layers.{name}.{key}"] = factor
    return tensors


def _from_recipe(
    recipe: dict[str, Any], config: dict[str, Any] | None, tensors: dict[str, Tensor]
) -> AdapterState:
    """What this package wrote, in either format."""
    if recipe["format"] == "peft":
        _check_unedited(recipe, config)
        factors, extra = _split_halves(recipe, tensors)
    else:
        factors, extra = _split_native(recipe, tensors)
    layers = {}
    for name, layer in recipe["layers"].items():
        try:
            layers[name] = _recipe.layer_from_dict(layer, factors[name])
        except (ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"the recipe of {name!r} is damaged: {error}") from None
        _check_layer(name, layers[name], layer["r"])
    adapted = _recipe.config_from_dict(recipe["config"])
    return AdapterState(adapted, layers, extra, recipe["base_model"])


def _check_unedited(recipe: dict[str, Any], config: dict[str, Any] | None) -> None:
    """Raises if the configuration beside the tensors is not theirs. None is fine: a process was
    killed before it put it there.
    """
    saved = recipe.get("peft_config")
    if not isinstance(saved, dict):
        raise ValueError("its recipe is damaged")
    for key in DECISIVE if config is not None else ():
        if (config.get(key) or None) != (saved.get(key) or None):  # {} is None
            raise ValueError(
                f"{ADAPTER_CONFIG} says {key} = {config.get(key)!r}, but this was saved with "
                f"{saved.get(key)!r}: it was edited, or is of another adapter; to take what was "
                f"saved, remove {ADAPTER_CONFIG}"
            )


def _split_halves(
    recipe: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A, B and kept starts out of [A; A₀] and [B, −B₀]."""
    pairs, extra = split_tensors(tensors)
    _check_names(recipe["layers"], pairs)
    factors = {}
    for name, layer in recipe["layers"].items():
        right, left = pairs[name]
        check_pair(name, right, left)
        r, start = layer.get("r"), layer.get("start")
        if right.shape[0] != (2 * r if start else r):
            raise ValueError(
                f"lora_A of {name!r} has {right.shape[0]} rows, its recipe has r = {r}"
            )
        factors[name] = {"lora_A": right[:r].clone(), "lora_B": left[:, :r].clone()}
        if start == "kept":
            factors[name] |= {"start_A": right[r:].clone(), "start_B": -left[:, r:]}
    return factors, extra


def _split_native(
    recipe: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    extra = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "extra":
            extra[name] = tensor
            continue
        layer, _, part = name.rpartition(".")
        if kind != "layers" or part not in _recipe.FACTORS:
            raise ValueError(f"{key!r} is no tensor of an adapter")
        factors.setdefault(layer, {})[part] = tensor
    _check_names(recipe["layers"], factors)
    for name, layer in recipe["layers"].items():
        expected = {"lora_A", "lora_B"} | ({"lora_R"} if layer.get("R") else set())
        expected |= {"start_A", "start_B"} if layer.get("start") == "kept" else set()
        if factors[name].keys() != expected:
            wrong = ", ".join(sorted(factors[name].keys() ^ expected))
            raise ValueError(f"{wrong} of {name!r} is missing, or not in the recipe")
    return factors, extra


def _check_names(recipe: Collection[str], stored: Collection[str]) -> None:
    for name in [*recipe, *stored]:
        if name not in stored or name not in recipe:
            what = "tensors" if name not in stored else "recipe"
            raise ValueError(f"the {what} of {name!r} are missing")


def _check_layer(name: str, layer: LayerState, r: int) -> None:
    check_pair(name, layer.lora_A, layer.lora_B)
    shapes = {"lora_A": layer.lora_A.shape, "lora_B": layer.lora_B.shape}
    expected = {"lora_A": (r, shapes["lora_A"][1]), "lora_B": (shapes["lora_B"][0], r)}
    for key, like in (("start_A", "lora_A"), ("start_B", "lora_B"), ("lora_R", None)):
        factor = getattr(layer, key)
        if factor is not None:
            shapes[key], expected[key] = factor.shape, expected[like] if like else (r, r)
    for key, shape in shapes.items():
        if tuple(shape) != expected[key]:
            raise ValueError(f"{key} of {name!r} is {list(shape)}, expected {list(expected[key])}")


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
    except ValueError as error:  # UnicodeDecodeError is one too
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


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    needed("safetensors", "saving adapters", "cli")
    import safetensors.torch

    # Copies where two share memory, which the format cannot express.
    owned: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    # One key: with two, the order of which is random, the same adapter gives different bytes.
    try:
        safetensors.torch.save_file(owned, path, metadata or None)
    except safetensors.SafetensorError as error:  # no room, for one
        raise OSError(f"{path.name} could not be written: {error}") from None


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ValueError if it is damaged."""
    safetensors = needed("safetensors", "reading adapters", "cli")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            # Copies: the file is mapped, and may be changed under the mapping.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged, or no safetensors file ({error}): copy or save it again"
        ) from None
