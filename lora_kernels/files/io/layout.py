"""The safetensors format, as far as it takes to rewrite a file without changing its layout.

A file is eight bytes with the length of its header, little-endian; the header, JSON that may end in
spaces; and the tensors' bytes, one after the other without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_HEADER = 100_000_000  # what the safetensors library reads, too
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The sizes of the format's dtypes; a later version may have others, whose tensors are copied.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its bytes are [begin, end) after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """What a file holds and where: `header`, the JSON as it stands in the file; the `entries` in
    the order of their bytes; the `metadata`.
    """

    header: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    @property
    def start(self) -> int:
        """Where the tensors' bytes start in the file."""
        return 8 + len(self.header)

    @property
    def data_size(self) -> int:
        """How many bytes the tensors have."""
        return self.entries[-1].end if self.entries else 0

    @property
    def file_size(self) -> int:
        """How many bytes the file has."""
        return self.start + self.data_size

    def head(self) -> bytes:
        """All that comes before the tensors."""
        return struct.pack("<Q", len(self.header)) + self.header

    def cast(self, dtype: torch.dtype | None) -> Layout:
        """The layout with all tensors of ordinary floats in `dtype`, in the same order; itself if
        there is nothing to change.
        """
        if dtype is None or all(e.dtype not in DTYPES or e.dtype == _NAMES[dtype]
                                for e in self.entries):  # fmt: skip
            return self
        cast: list[Entry] = []
        position = 0
        for entry in self.entries:
            name, size = entry.dtype, entry.end - entry.begin
            if name in DTYPES:
                name, size = _NAMES[dtype], entry.numel * dtype.itemsize
            cast.append(Entry(entry.name, name, entry.shape, position, position + size))
            position += size
        # The names keep their order in the JSON, which need not be that of the bytes.
        by_name = {entry.name: entry for entry in cast}
        in_header = [name for name in json.loads(self.header) if name != "__metadata__"]
        return render([by_name[name] for name in in_header], self.metadata)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "BF16"."""
    return _NAMES[dtype]


def render(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Layout:
    """The layout of a new file, whose header is padded so that the tensors are aligned."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        content[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header = text.ljust(-(-len(text) // 8) * 8)
    return Layout(header, tuple(sorted(entries, key=lambda e: (e.begin, e.end))), metadata)


def read_layout(file: Path) -> Layout:
    """The layout of a file, of which only the header is read.

    Raises:
        ValueError: it is damaged, truncated, or no safetensors file.

    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{file} is damaged or no safetensors file: it has no header")
        header = opened.read(length)
    try:
        layout = _parsed(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{file} is damaged or no safetensors file: its header is wrong ({reason})"
        ) from None
    if layout.file_size != size:
        raise ValueError(
            f"{file} is damaged: it has {size:,} bytes, its header wants {layout.file_size:,}"
        )
    return layout


def _parsed(header: bytes) -> Layout:
    content = json.loads(header)
    metadata = content.pop("__metadata__", {})
    entries = []
    for name, value in content.items():
        begin, end = value["data_offsets"]
        entry = Entry(name, value["dtype"], tuple(value["shape"]), begin, end)
        bits = _BITS.get(entry.dtype)
        if bits is not None and entry.numel * bits != 8 * (end - begin):
            raise ValueError(f"{name!r} has {end - begin} bytes, which its shape does not")
        entries.append(entry)
    entries.sort(key=lambda e: (e.begin, e.end))
    position = 0
    for entry in entries:
        if entry.begin != position or entry.end < entry.begin:
            raise ValueError(f"the bytes of {entry.name!r} do not follow those before it")
        position = entry.end
    return Layout(header, tuple(entries), metadata)
