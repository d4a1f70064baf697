"""Adapters as GGUF files, which llama.cpp loads: `llama-cli -m model.gguf --lora adapter.gguf`.

llama.cpp adds (α / rank of the tensor)·B(Ax) to a layer's output, with one α for all layers. s is
therefore multiplied into B, all layers are padded with zeros to one rank r, and α = r.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..._utils.errors import needed
from ...layers.state import LayerState
from ...model.config import AdapterState
from ..adapter.portable import padded
from ..adapter.tensors import check_state
from ..io.disk import sync
from .gguf_names import BaseModel, Target

# {dtype: gguf's type of tensors, gguf's type of files}.
_TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}


@dataclass(frozen=True)
class GGUFSummary:
    """What was written; `str()` gives a line to print.

    Attributes:
        file: the file that was written.
        size: the file's size in bytes.
        architecture: `general.architecture`, which must be that of the model the adapter is loaded
            on.
        dtype: the dtype of the tensors.
        layers: the number of layers.
        r: the rank of all layers, and `adapter.lora.alpha`.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all layers, where ΔW' is the update in the file; None if
            nothing was truncated or rounded.

    """

    file: Path
    size: int
    architecture: str
    dtype: torch.dtype
    layers: int
    r: int
    error: float | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.file}: {self.layers} layers of rank {self.r} in {dtype} for a GGUF model of "
            f"{self.architecture} ({self.size:,} bytes)"
            + ("" if self.error is None else f", with a relative error of {self.error:.2e}")
        )


def write_gguf(
    state: AdapterState, base: Path, out: Path, *, dtype: torch.dtype = torch.float32
) -> GGUFSummary:
    """Writes an adapter as a GGUF file, which replaces an existing file.

    The file is read back and compared before it gets its name. After an error or a kill, an
    existing file is unchanged.

    Args:
        state: the adapter.
        base: the folder of the Hugging Face model that the adapter was trained on, or its
            `config.json`. Only the configuration is read.
        out: the file.
        dtype: the dtype of the tensors: float32, float16 or bfloat16.

    Raises:
        MissingExtraError: the package gguf is not installed.
        FileNotFoundError: the configuration, or the folder to write into, does not exist.
        ValueError: the architecture, a layer or the dtype cannot be written; the adapter has
            tensors that such a file cannot hold; or the model lacks a layer or has it with another
            shape.
        OSError: the content that was read back differs from what was written.

    """
    gguf = needed("gguf", "writing GGUF files", "gguf")
    base, out = Path(base), Path(out)
    if dtype not in _TYPES:
        raise ValueError(f"dtype is {dtype}: llama.cpp's adapters are float32, float16 or bfloat16")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give the name of a file, such as {out}/adapter.gguf")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is not a folder to write into: make it first")
    _check_extra(state)
    check_state(state)
    model = BaseModel(base)
    shapes = {n: (s.lora_B.shape[0], s.lora_A.shape[1]) for n, s in state.layers.items()}
    targets = model.targets(gguf, shapes)
    r, tensors = _tensors(state.layers, targets, dtype)
    architecture = model.gguf_architecture(gguf)
    fields = {
        gguf.Keys.General.ARCHITECTURE: architecture,
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.Adapter.LORA_ALPHA: float(r),
    }
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.unfinished")
    try:
        _write(gguf, temporary, fields, tensors, dtype)
        sync(temporary)
        _check_written(gguf, temporary, fields, tensors, dtype)
        size = temporary.stat().st_size
        temporary.replace(out)
        sync(out.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return GGUFSummary(out, size, architecture, dtype, len(state.layers), r)


def _check_extra(state: AdapterState) -> None:
    """Raises ValueError if the adapter has anything except A and B of single layers."""
    biased = any(layer.lora_bias is not None for layer in state.layers.values())
    if state.rows or state.replication or biased:
        raise ValueError(
            "the adapter has trained rows of an embedding, biases of lora_B or repeated blocks, "
            "which a GGUF adapter cannot hold: load it with load_adapter, merge it with "
            "merge_lora, and convert the model with llama.cpp's convert_hf_to_gguf.py"
        )
    if any(layer.lora_magnitude is not None for layer in state.layers.values()):
        raise ValueError(
            "the adapter is a DoRA one (use_dora), whose magnitudes a GGUF adapter cannot hold: "
            "merge it into the model (lora-kernels merge) and convert the result with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    stacks = [name for name, layer in state.layers.items() if layer.experts is not None]
    if stacks:
        raise ValueError(
            f"the adapter has experts ({stacks[0]} ...), which are not written to GGUF here: "
            "llama.cpp's convert_lora_to_gguf.py converts the folder that lora-kernels convert "
            "writes with --experts each; or merge the adapter into the model (lora-kernels merge)"
        )
    if state.extra:
        names = ", ".join(list(state.extra)[:4]) + (" ..." if len(state.extra) > 4 else "")
        raise ValueError(
            f"the adapter also has {len(state.extra)} tensors trained in full ({names}), which a "
            "GGUF adapter cannot hold: llama.cpp refuses biases and whole weights in it, and "
            "ignores norms. Merge the adapter into the model (lora-kernels merge) and convert the "
            "result with llama.cpp's convert_hf_to_gguf.py"
        )


def _tensors(
    layers: Mapping[str, LayerState], targets: Mapping[str, Target], dtype: torch.dtype
) -> tuple[int, dict[str, Tensor]]:
    """r, and A' [r, in] and s·B' [out, r] of all layers, by their names in the file."""
    factors = {name: layer.portable_factors() for name, layer in layers.items()}
    r = max(right.shape[0] for right, _ in factors.values())
    found: dict[str, Tensor] = {}
    for name in layers:
        right, left = factors.pop(name)
        target = targets[name]
        if target.heads is not None:
            left = _neighbors(left, target.heads)
        pair = {"a": padded(right, r, 0), "b": padded(left, r, 1)}
        for half, tensor in pair.items():
            cast = tensor.to("cpu", dtype).contiguous()
            if not bool(cast.isfinite().all()):
                raise ValueError(
                    f"{name!r} has values that are too large for {dtype}: choose torch.bfloat16 or "
                    "torch.float32; nothing was written"
                )
            found[f"{target.name}.lora_{half}"] = cast
    return r, found


def _neighbors(left: Tensor, heads: int) -> Tensor:
    """B' [out, r] of q or k with reordered rows: rows i and i + d/2 of every head of d rows become
    neighbors, because llama.cpp's RoPE rotates neighbors.
    """
    halves = left.reshape(heads, 2, -1, left.shape[1])
    return halves.transpose(1, 2).reshape(left.shape)


def _write(
    gguf: ModuleType,
    file: Path,
    fields: Mapping[str, str | float],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    kind, file_type = _TYPES[dtype]
    # The writer adds the architecture itself.
    writer = gguf.GGUFWriter(file, fields[gguf.Keys.General.ARCHITECTURE])
    try:
        for key, value in fields.items():
            if isinstance(value, float):
                writer.add_float32(key, value)
            elif key != gguf.Keys.General.ARCHITECTURE:
                writer.add_string(key, value)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in tensors.items():
            writer.add_tensor(name, _stored(tensor), raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check_written(
    gguf: ModuleType,
    file: Path,
    fields: Mapping[str, str | float],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Raises OSError unless the file has these fields and exactly these tensors, bit for bit."""
    reader = gguf.GGUFReader(file)
    for key, value in fields.items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            raise _damaged(file, key)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name in stored.keys() ^ tensors.keys():
        raise _damaged(file, name)
    for name, tensor in tensors.items():
        found, expected = stored[name], _stored(tensor)
        same = (
            found.tensor_type == gguf.GGMLQuantizationType[_TYPES[dtype][0]]
            and [int(size) for size in found.shape] == list(reversed(tensor.shape))
            and found.data.tobytes() == expected.tobytes()
        )
        if not same:
            raise _damaged(file, name)


def _damaged(file: Path, name: str) -> OSError:
    return OSError(
        f"{file} was read back, and {name!r} is not what was written: it was removed again. Check "
        "the disk, and the version of the package gguf"
    )


def _stored(tensor: Tensor) -> Any:
    """The tensor as a NumPy array; bfloat16, which NumPy lacks, as bytes [rows, 2·columns]."""
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
