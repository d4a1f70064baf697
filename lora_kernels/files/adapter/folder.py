"""Writes adapters into folders, and reads adapters that this package or PEFT wrote."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._utils.errors import unknown_name
from ..._utils.model_files import read_json
from ..._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from ..._utils.safetensors import load_tensors
from ...model.config import AdapterState
from .compression import balanced, rounded, truncated, update_errors
from .content import (
    ADAPTER_FILES,
    COMPONENTS,
    DIFFUSERS_FILE,
    NATIVE_FILE,
    NATIVE_TYPE,
    as_diffusers,
    factors_of,
    folder_content,
    from_diffusers,
    with_factors,
    with_recipe,
)
from .peft_format.experts.layouts import LAYOUTS
from .peft_format.experts.writing import chosen_layout
from .peft_format.reading import from_peft
from .recipe import DIFFUSERS, FORMATS, METADATA, NATIVE, PEFT, START, recipe_from_json
from .tensors import ChangedTensorsError, check_state, check_tensors, from_recipe

DTYPES = ("float32", "bfloat16", "float16")
HALF = (torch.bfloat16, torch.float16)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank
VLLM_RANK = 16  # its default
_ATTEMPTS, _PAUSE = 20, 0.01  # seconds between attempts to read files that are being replaced


@dataclass(frozen=True)
class SavedAdapter:
    """What was written; `str()` gives a line or two to print.

    Attributes:
        folder: where it was written.
        files: the sizes of the files in bytes, by name.
        layers: the number of layers.
        rank: the largest rank in the file; with format="peft" the rank of all layers.
        folded: the layers whose R was multiplied into A, because format="peft" cannot store R:
            training continues with A and B. format="native" keeps R.
        errors: with `compress_to` or `dtype`, ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of each layer, where ΔW' is
            the update in the file; else None.
        error: the same ratio over all layers.
        changed: what `compress_to` and `dtype` did, in words.

    """

    folder: Path
    files: dict[str, int]
    layers: int
    rank: int
    folded: tuple[str, ...] = ()
    errors: dict[str, float] | None = None
    error: float | None = None
    changed: str = ""

    @property
    def warning(self) -> str | None:
        """What a server has to be told so that it loads the adapter, or None."""
        return beyond_vllm(self.rank) if ADAPTER_FILE in self.files else None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in self.files.items())
        lines = [f"{self.folder}: {self.layers} layers of rank {self.rank} in {sizes}"]
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines.append(
                f"{self.changed} with a relative error of {self.error:.2e}, at most "
                f"{self.errors[worst]:.2e} ({worst})"
            )
        if self.folded:
            lines.append(
                f"R of {len(self.folded)} layers is multiplied into A; only format='native' keeps "
                "it for further training"
            )
        return "\n".join([*lines, self.warning] if self.warning else lines)


def vllm_limit(rank: int) -> int | None:
    """The smallest value of vLLM's --max-lora-rank that allows this rank; None if none does."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)


def beyond_vllm(rank: int) -> str | None:
    """What to do about vLLM's limit, if the rank of a file is above it."""
    if rank <= VLLM_RANK:
        return None
    flag = vllm_limit(rank)
    remedy = f"start it with --max-lora-rank {flag}" if flag else f"{VLLM_RANKS[-1]} is its largest"
    return (
        f"the adapter has rank {rank}, and vLLM takes {VLLM_RANK} by default: {remedy}, or "
        f"truncate the adapter with save_adapter(..., compress_to={VLLM_RANK}) or lora-kernels "
        f"convert --compress-to {VLLM_RANK}"
    )


def write_adapter(
    folder: str | Path,
    state: AdapterState,
    *,
    format: str = "peft",
    compress_to: int | None = None,
    dtype: torch.dtype | str | None = None,
    module_names: Collection[str] | None = None,
    fan_in_fan_out: bool = False,
    experts: str = "auto",
    component: str = "",
) -> SavedAdapter:
    """Writes an adapter into a folder, where it replaces an existing one. A killed process leaves
    either the old adapter or the new one, complete. Other files in the folder do not change.

    Args:
        folder: made if it does not exist.
        state: the adapter.
        format: "peft": PEFT and serving engines load the adapter onto the original base, all with
            the same strength. s is multiplied into B, all layers have one rank, and `lora_alpha`
            equals that rank. A start that was subtracted doubles the rank: A' = [A; A − A₀],
            B' = s·[B − B₀, B₀]. An R is multiplied into A. "native": for this package, as small as
            the training state, with R. "diffusers": the content of "peft" in the one file that a
            pipeline's `load_lora_weights` loads.
        compress_to: the rank to which format="peft" is truncated, by the SVD of s(BA − B₀A₀). The
            result is a plain adapter, from which the start cannot be recovered.
        dtype: float32, bfloat16 or float16. All tensors of format="peft" are rounded to it, except
            DoRA's magnitudes, which are rounded to float32. If the values change, the result is a
            plain adapter too. None keeps float32 or float64.
        module_names: the names of all modules of the base. They allow `target_modules` of the
            configuration to have endings ("q_proj") where these match exactly the adapted layers.
        fan_in_fan_out: whether the layers are Conv1D, for PEFT's option of that name.
        experts: how format="peft" stores the adapters of experts. "each": a pair of 2-D matrices
            for each tensor of a checkpoint that has one tensor for each expert. "stacked": one pair
            for all experts of a parameter, as PEFT writes it since 0.19. "auto": the layout that
            `save_adapter` chose, or that of the file from which the adapter was read. If only one
            projection of the experts is adapted, the other is written as zeros.
        component: for format="diffusers", the pipeline's model: "unet", "transformer" ...

    Raises:
        ValueError: an unknown format, dtype or layout of experts, "each" without the names of a
            checkpoint, or tensors that are not finite, do not fit each other or are too large for
            `dtype`; nothing is written then.

    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if (format == DIFFUSERS) != bool(component):
        known = ", ".join(COMPONENTS)
        raise ValueError(f"component is for format='diffusers', which needs it: one of {known}")
    format = PEFT if component else format
    if experts not in LAYOUTS:
        raise unknown_name("experts", experts, LAYOUTS)
    for option, value in (("compress_to", compress_to), ("dtype", dtype)):
        if value is not None and format != PEFT:
            raise ValueError(f"{option} makes a plain adapter: it needs format='peft'")
    narrow = None if dtype is None else float_dtype(dtype)
    check_state(state)
    written = state if compress_to is None else truncated(state, compress_to)
    content = folder_content(
        written,
        format,
        module_names=module_names,
        fan_in_fan_out=fan_in_fan_out,
        layout=chosen_layout(state, experts if format == PEFT else "auto"),
    )
    changed = [] if compress_to is None else ["truncated in rank"]
    if narrow is not None:
        whole = content
        if narrow in HALF:
            whole = with_factors(content, state.layers, balanced(factors_of(content, state.layers)))
        tensors = rounded(whole.tensors, narrow)
        if tensors is not content.tensors:
            changed.append(f"rounded to {str(narrow).removeprefix('torch.')}")
            content = replace(content, tensors=tensors)
    folded: tuple[str, ...] = ()
    errors, error = None, None
    if changed:  # without a recipe: the state before truncation or rounding cannot be recovered
        errors, error = update_errors(state, factors_of(content, state.layers))
    elif format == PEFT:
        content = with_recipe(content, state)
        folded = tuple(n for n, layer in state.layers.items() if layer.middle() is not None)
    sizes = (as_diffusers(content, component) if component else content).write(Path(folder))
    return SavedAdapter(
        folder=Path(folder),
        files=sizes,
        layers=len(state.layers),
        rank=max(layer.r for layer in state.layers.values())
        if format == NATIVE
        else content.config["r"],
        folded=folded,
        changed=" and ".join(changed),
        errors=errors,
        error=error,
    )


def float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of that name, or the given dtype; raises ValueError unless `DTYPES` has it."""
    known = {name: getattr(torch, name) for name in DTYPES}
    found = known.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in known.values():
        name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
        raise unknown_name("dtype", name, DTYPES)
    return found


def read_adapter(
    folder: str | Path, *, residual_base: bool = False, expert_order: str = "auto"
) -> AdapterState:
    """Reads the adapter in a folder, on the CPU.

    An adapter that this package wrote is restored as it was trained, bit for bit: A, B, R and the
    start that is subtracted (except an R that was folded, see `SavedAdapter`). An adapter that PEFT
    wrote is read as a plain adapter with nothing to subtract. If PEFT has converted that adapter
    from a residual base, A₀ and B₀ are subtracted, and the rank is half of the file's.

    Args:
        folder: written by this package or PEFT.
        residual_base: whether the adapter may belong to a residual base, from which a start was
            subtracted: the start that `lora-kernels init` wrote, or PEFT's PiSSA and similar. It is
            read as a plain adapter of that base, and is wrong on the original base.
        expert_order: for experts that PEFT stacks in one tensor, how the expert varies in the
            columns of B: "fastest", as PEFT writes it; "slowest", as Unsloth did before September
            2026; "auto", as the configuration says, else "fastest".

    Experts that are linear layers in the file stay linear layers: `placed` joins them for a model
    that has them in one parameter.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a file is damaged or holds something else, an option is not implemented, the
            adapter belongs to a residual base, or the configuration contradicts `expert_order`.

    """
    folder = Path(folder)
    config, file, tensors, metadata = read_files(folder)
    try:
        check_tensors(tensors)
        recipe = recipe_from_json(metadata[METADATA]) if METADATA in metadata else None
        if recipe is not None and recipe["format"] == START:
            if not residual_base:
                raise ValueError(
                    f"it is the start of {recipe['base_model']}, which was subtracted from those "
                    "weights, and wrong on the original model: train it there with PEFT, and "
                    f"convert the result with lora-kernels convert --start {folder}"
                )
            recipe = None
        if recipe is None:
            if file.name == NATIVE_FILE:
                raise ValueError("its recipe is missing")
            if config is None:
                raise ValueError(f"{ADAPTER_CONFIG} is missing beside it, which has the scaling")
            return from_peft(config, tensors, residual_base, expert_order)
        if (recipe["format"] == NATIVE) != (file.name == NATIVE_FILE):
            raise ValueError(f"it was saved in the format {recipe['format']!r} and renamed")
        try:
            return from_recipe(recipe, config, tensors)
        except ChangedTensorsError as error:
            if config is None:
                raise
            warn_of_changed(file, error)
            return from_peft(config, tensors, residual_base, expert_order)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def warn_of_changed(file: Path, error: ChangedTensorsError) -> None:
    """Warns that a file's tensors are read without its recipe."""
    warnings.warn(
        f"{file}: {error}: another program has changed the tensors. They are read as a plain "
        "adapter of the original base, without the start and the numbers of the training",
        stacklevel=4,
    )


def read_files(
    folder: Path,
) -> tuple[dict[str, Any] | None, Path, dict[str, Tensor], dict[str, str]]:
    """The configuration, the file, its tensors and its metadata. All belong to one adapter, even
    while another one is being written in its place.
    """
    for attempt in range(_ATTEMPTS):
        before = _versions(folder)
        try:
            config = _read_config(folder)
            file = _tensor_file(folder, config)
            tensors, metadata = load_tensors(file)
            if file.name == DIFFUSERS_FILE:
                config, tensors = from_diffusers(tensors, metadata)
        except (FileNotFoundError, RuntimeError):  # RuntimeError: a mapped file has become smaller
            if before == _versions(folder) or attempt == _ATTEMPTS - 1:
                raise
        else:
            if before == _versions(folder):
                break
        time.sleep(_PAUSE)
    return config, file, tensors, metadata


def _versions(folder: Path) -> list[tuple[int, int, int] | None]:
    """Identifies the versions of an adapter's files: equal only if no file was replaced."""
    versions: list[tuple[int, int, int] | None] = []
    for name in (*sorted(ADAPTER_FILES), DIFFUSERS_FILE):
        try:
            status = (folder / name).stat()
            versions.append((status.st_ino, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:
            versions.append(None)
    return versions


def is_adapter(path: Path) -> bool:
    """Whether the path is a folder with an adapter of this package or of PEFT."""
    return any((path / name).is_file() for name in (*ADAPTER_FILES, DIFFUSERS_FILE))


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The content of `adapter_config.json`, or None."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder: give that of an adapter, downloaded if it is on a hub"
        )
    file = folder / ADAPTER_CONFIG
    return read_json(file) if file.is_file() else None


def _tensor_file(folder: Path, config: dict[str, Any] | None) -> Path:
    """The file that belongs to the configuration; without a configuration, the newest file."""
    names: tuple[str, ...] = (NATIVE_FILE, ADAPTER_FILE)
    if config is not None:
        names = (NATIVE_FILE,) if config.get("peft_type") == NATIVE_TYPE else (ADAPTER_FILE,)
    files = [folder / name for name in names if (folder / name).is_file()]
    if config is None and not files and (folder / DIFFUSERS_FILE).is_file():
        return folder / DIFFUSERS_FILE
    if files:
        return max(files, key=lambda file: file.stat().st_mtime_ns)
    hint = ""
    for name in ("adapter_model.bin", "adapter_model.pt"):
        if (folder / name).is_file():
            hint = f"; {name} cannot be read: save it from PEFT with safe_serialization=True"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inside and config is None:
        hint = f"; there are adapters in its subfolders {', '.join(inside[:8])}"
    raise FileNotFoundError(f"{folder} has no {' or '.join(names)}{hint}")
