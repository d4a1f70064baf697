"""Checkpoints written and read without the code under test and without the safetensors package."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import torch

ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1, "BOOL": 1}
TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Stored = tuple[str, tuple[int, ...], bytes]  # dtype, shape, contents


def random_tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Stored:
    """Floats are about as large as weights; other dtypes have random bytes."""
    if dtype in TORCH:
        values = torch.as_tensor(rng.standard_normal(shape) * 0.05).to(TORCH[dtype])
        return dtype, shape, values.reshape(-1).view(torch.uint8).numpy().tobytes()
    count = int(np.prod(shape, dtype=int)) * ITEMSIZE[dtype]
    return dtype, shape, rng.integers(0, 2, count, dtype=np.uint8).tobytes()


def write_file(
    path: Path, tensors: dict[str, Stored], metadata: dict[str, str] | None = None, pad: int = 3
) -> None:
    """In the order of the dict; the header's own order is the reverse, and its end is `pad` more
    spaces than alignment wants.
    """
    entries, position = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        end = position + len(content)
        entries[name] = {"data_offsets": [position, end], "shape": list(shape), "dtype": dtype}
        position = end
    header = {name: entries[name] for name in reversed(entries)}
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + 8 * pad)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def write_model(
    folder: Path, shards: list[dict[str, Stored]], config: dict | None = None, index: bool = True
) -> None:
    """A folder with these shards, their index, a tokenizer and a config.json."""
    files = [f"part-{k + 1}-of-{len(shards)}.safetensors" for k in range(len(shards))]
    if not index:
        files = ["model.safetensors"]
    for file, tensors in zip(files, shards, strict=True):
        write_file(folder / file, tensors, {"format": "pt", "note": "kept"})
    if index:
        names = {name: file for file, t in zip(files, shards, strict=True) for name in t}
        size = sum(len(c) for tensors in shards for _, _, c in tensors.values())
        content = {"weight_map": names, "metadata": {"total_size": size, "total_parameters": 1}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}, indent=1))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "extra").mkdir()
    (folder / "extra" / "pooling.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")


def read_file(path: Path) -> tuple[dict[str, Stored], dict]:
    """The tensors in the order of their bytes, and the whole header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    entries = sorted(
        ((n, e) for n, e in header.items() if n != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    )
    return {
        n: (e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])]) for n, e in entries
    }, header


def as_float64(stored: Stored) -> np.ndarray:
    """The numbers of a floating-point tensor."""
    dtype, shape, content = stored
    if not content:
        return np.zeros(shape)
    tensor = torch.frombuffer(bytearray(content), dtype=TORCH[dtype]).reshape(shape)
    return tensor.to(torch.float64).numpy()


def fingerprint(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
