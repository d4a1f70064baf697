"""Converts an adapter to another format, rank, dtype or base, or renames its layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..._utils.errors import unknown_name
from ...layers.state import LayerState
from ...model.config import AdapterState
from ..adapter.compression import truncated, update_errors
from ..adapter.folder import SavedAdapter, float_dtype, read_adapter, write_adapter
from ..adapter.peft_format.experts.naming import stored_experts
from ..adapter.recipe import NATIVE, PEFT
from ..checkpoint.changes import check_experts, placed_in
from ..checkpoint.folder import CONFIG, ModelFolder, check_outside
from ..checkpoint.residual import refuse_residual, without_start
from ..checkpoint.weights import is_embedding, is_head
from .engines.model import matrix_shape
from .gguf import GGUFSummary, write_gguf
from .rename import renamed

GGUF = "gguf"
TARGETS = (PEFT, NATIVE, GGUF)


def convert(
    adapter: Path,
    out: Path,
    *,
    format: str = "peft",
    compress_to: int | None = None,
    dtype: torch.dtype | str | None = None,
    start: Path | None = None,
    rename: tuple[str, str] | None = None,
    base: Path | None = None,
    experts: str = "auto",
    expert_order: str = "auto",
) -> SavedAdapter | GGUFSummary:
    """Reads the adapter in a folder and writes it elsewhere.

    Args:
        adapter: a folder that PEFT or this package wrote.
        out: the folder to write, or the file if `format` is "gguf".
        format: "peft" or "native" (see `lora_kernels.files.adapter.folder.write_adapter`), or
            "gguf", a file for llama.cpp and Ollama (see
            `lora_kernels.files.serving.gguf.write_gguf`).
        compress_to: the rank to truncate to, unless `format` is "native".
        dtype: the dtype of the tensors, unless `format` is "native".
        start: the folder of the start that `adapter` was trained from: `initialize` wrote it beside
            a residual base, or PEFT saved it before training with "pissa", "olora", "corda" or
            "lora_ga". The result is an adapter of the original base.
        rename: a prefix of the layers' names, and the prefix that replaces it.
        base: the folder of the model, or for "gguf" its `config.json`; by default the base that
            the adapter names, if that is a folder here.
        experts: how to store experts (see `write_adapter`). With a base whose checkpoint has a
            tensor for each expert, "each" is possible for every adapter.
        expert_order: "slowest" for an adapter of experts that Unsloth wrote before September 2026
            (see `read_adapter`).

    Warns if neither the adapter nor the start says which start PEFT subtracted.

    Raises:
        ValueError: the adapter was not trained from this start, or is the start itself; the start
            would be overwritten; the adapter was trained on a residual base and there is no
            `start`; the format is unknown; no layer has the prefix; the base lacks layers or has
            layers of other shapes; see also `read_adapter`, `write_adapter` and `write_gguf`.

    """
    if format not in TARGETS:
        raise unknown_name("format", format, TARGETS)
    given = base is not None
    state = read_adapter(adapter, residual_base=start is not None, expert_order=expert_order)
    if start is not None:
        check_outside(start, out)  # every adapter trained on that residual base needs the start
        state = without_start(state, adapter, start)
    else:
        refuse_residual(adapter, state)
    if rename is not None:
        state = renamed(state, *rename)
    elif base is None and state.base_model and (Path(state.base_model) / CONFIG).is_file():
        base = Path(state.base_model)
    if format == GGUF:
        return _to_gguf(state, base, out, compress_to, dtype)
    names, conv1d = None, False
    if base is not None:  # then the configuration can name layers by their endings
        folder = ModelFolder(base)
        state = _with_names(placed_in(folder, state), folder, trained=start is not None)
        names = folder.module_names
        if given and not state.replication:  # repeated blocks have other names
            _check_base(state, folder)
        linear = [name for name, layer in state.layers.items() if _is_linear(layer)]
        conv1d = bool(linear) and all(map(folder.is_transposed, linear))
    return write_adapter(
        out,
        state,
        format=format,
        compress_to=compress_to,
        dtype=dtype,
        module_names=names,
        fan_in_fan_out=conv1d,
        experts=experts,
    )


def _is_linear(layer: LayerState) -> bool:
    return not layer.embedding and layer.experts is None


def _with_names(state: AdapterState, folder: ModelFolder, trained: bool) -> AdapterState:
    """The adapter with the names that the base's checkpoint gives its experts. The experts keep the
    layout of the adapter's file, unless PEFT `trained` the adapter, which is then stacked.
    """
    if folder.architecture is None or all(map(_is_linear, state.layers.values())):
        return state
    known = stored_experts(folder.architecture.model)
    for name, stored in state.experts.items():
        if name in known and stored.layout and not trained:
            known[name] = replace(known[name], layout=stored.layout)
    return replace(state, experts=known)


def _check_base(state: AdapterState, folder: ModelFolder) -> None:
    """Raises ValueError if the model lacks a layer, or has it with another shape."""
    modules = {} if folder.architecture is None else folder.architecture.modules
    wrong = ""
    for name, layer in state.layers.items():
        # transformers joins experts, and a vocabulary may have been resized for training.
        if layer.experts:
            check_experts(folder, name, layer)
            continue
        if ".experts." in name or is_head(name) or is_embedding(name):
            continue
        shape = (layer.lora_B.shape[0], layer.lora_A.shape[1])
        there = matrix_shape(modules.get(name))
        if name not in folder.module_names:
            wrong = f"the adapter has {name!r}, which {folder.path} does not have"
        elif there not in (None, shape):
            wrong = (
                f"the weight of {name!r} is {list(shape)} ([out, in]) for the adapter, and "
                f"{list(there or ())} in {folder.path}"
            )
        if wrong:
            raise ValueError(
                f"{wrong}: it is another base model; give the one that the adapter was trained on "
                "(--base)"
            )


def _to_gguf(
    state: AdapterState,
    base: Path | None,
    out: Path,
    compress_to: int | None,
    dtype: torch.dtype | str | None,
) -> GGUFSummary:
    if base is None:
        raise ValueError(
            "GGUF names the layers by the model's architecture, and the adapter's base "
            f"{state.base_model!r} is not a folder here: give --base, the folder of the Hugging "
            "Face model or its config.json"
        )
    kind = torch.float32 if dtype is None else float_dtype(dtype)
    written = state if compress_to is None else truncated(state, compress_to)
    summary = write_gguf(written, base, out, dtype=kind)
    if written is state and kind == torch.float32:
        return summary
    pairs = {n: layer.portable_factors() for n, layer in written.layers.items()}
    rounded = {n: (right.to(kind), left.to(kind)) for n, (right, left) in pairs.items()}
    return replace(summary, error=update_errors(state, rounded)[1])
