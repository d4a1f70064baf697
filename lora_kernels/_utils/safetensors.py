"""The safetensors format: the layout of a file, and how its tensors are read and written.

A file is eight bytes with the length of its header, little-endian; the header, which is JSON and
may end in spaces; and the tensors' bytes, one after the other without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import needed

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library, too
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
# The bits per entry of the format's dtypes. Tensors of dtypes added later are only copied.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file. Its bytes are [begin, end) after the header; its dtype is safetensors'
    name for it ("BF16").
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def slice(self, index: int) -> Entry:
        """`tensor[index]`, with the tensor's name."""
        size = (self.end - self.begin) // self.shape[0]
        begin = self.begin + index * size
        return Entry(self.name, self.dtype, self.shape[1:], begin, begin + size)


@dataclass(frozen=True)
class Layout:
    """The contents of a file and their positions: `header`, the JSON exactly as in the file; the
    `entries`, in the order of their bytes; and the `metadata`.
    """

    header: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    @property
    def data_offset(self) -> int:
        """The position in the file at which the tensors' bytes begin."""
        return 8 + len(self.header)

    @property
    def data_size(self) -> int:
        return self.entries[-1].end if self.entries else 0

    @property
    def file_size(self) -> int:
        return self.data_offset + self.data_size

    def head(self) -> bytes:
        """Everything before the tensors."""
        return struct.pack("<Q", len(self.header)) + self.header

    def cast(self, dtype: torch.dtype | None) -> Layout:
        """The layout with all tensors of the `DTYPES` cast to `dtype`, in the same order; the same
        object if nothing changes.
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
        # The JSON keeps its order of names, which may differ from the order of the bytes.
        by_name = {entry.name: entry for entry in cast}
        in_header = [name for name in json.loads(self.header) if name != "__metadata__"]
        return render([by_name[name] for name in in_header], self.metadata)

    def edited(
        self, dropped: Collection[str], added: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> Layout:
        """The layout without the tensors `dropped`, and with {name: (dtype, shape)} at the end; the
        same object if nothing changes.
        """
        if not added and not any(entry.name in dropped for entry in self.entries):
            return self
        kept = [entry for entry in self.entries if entry.name not in dropped]
        sizes = [(e.name, e.dtype, e.shape, e.end - e.begin) for e in kept]
        for name, (dtype, shape) in added.items():
            kind = (_NAMES | _INTEGERS)[dtype]
            sizes.append((name, kind, shape, math.prod(shape) * dtype.itemsize))
        entries, position = [], 0
        for name, kind, shape, size in sizes:
            entries.append(Entry(name, kind, shape, position, position + size))
            position += size
        return render(entries, self.metadata)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "BF16"."""
    return _NAMES[dtype]


def render(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Layout:
    """The layout of a new file; its header is padded so that the tensors are aligned."""
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
    """The layout of a file. Only its header is read.

    Raises:
        ValueError: the file is damaged, truncated, or not a safetensors file.

    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise _damaged(file, "it has no header")
        header = opened.read(length)
    try:
        layout = _parsed(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise _damaged(file, f"its header is wrong: {reason}") from None
    if layout.file_size != size:
        raise _damaged(file, f"it has {size:,} bytes, its header says {layout.file_size:,}")
    return layout


def load_tensor(file: Path, name: str) -> Tensor:
    """One tensor, on the CPU. It may be a view of the mapped file, which must not change meanwhile.

    Raises:
        ValueError: the file is damaged or not a safetensors file.

    """
    with _opened(file) as opened:
        return opened.get_tensor(name)


def load_entry(file: Path, entry: Entry) -> Tensor:
    """The floating-point tensor or slice of that entry, on the CPU: a copy. The header is not
    parsed, so reading many tensors of a large file is fast.

    Raises:
        OSError: the file is shorter than when its layout was read.

    """
    content = bytearray(entry.end - entry.begin)
    with file.open("rb", buffering=0) as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        opened.seek(8 + length + entry.begin)
        view, done = memoryview(content), 0
        while done < len(content):
            count = opened.readinto(view[done:])
            if not count:
                raise OSError(f"{file} was truncated while it was read")
            done += count
    return torch.frombuffer(content, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, on the CPU, and the metadata. All come from one version of the file, even if the
    file is replaced meanwhile.

    Raises:
        ValueError: the file is damaged or not a safetensors file.

    """
    with _opened(file) as opened:
        # Copies, because the file is mapped and may change under the mapping.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the tensors; some may share memory.

    `metadata` has at most one entry: the library writes several entries in random order, so the
    same adapter would give different bytes.

    Raises:
        OSError: the file could not be written.

    """
    needed("safetensors", "saving adapters", "cli")
    import safetensors.torch

    # Tensors that share memory are copied, because the format cannot express that.
    owned: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    try:
        safetensors.torch.save_file(owned, path, dict(metadata) or None)
    except safetensors.SafetensorError as error:  # for example, a full disk
        raise OSError(f"{path.name} could not be written: {error}") from None


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The safetensors library's view of a file."""
    safetensors = needed("safetensors", "reading tensors", "cli")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} is damaged or not a safetensors file ({reason}): copy or save it again"
    )


def _parsed(header: bytes) -> Layout:
    content = json.loads(header)
    metadata = content.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    entries = []
    for name, value in content.items():
        begin, end = value["data_offsets"]
        entry = Entry(name, value["dtype"], tuple(value["shape"]), begin, end)
        bits = _BITS.get(entry.dtype)
        if bits is not None and entry.numel * bits != 8 * (end - begin):
            raise ValueError(f"{name!r} has {end - begin} bytes, its shape another number")
        entries.append(entry)
    entries.sort(key=lambda e: (e.begin, e.end))
    position = 0
    for entry in entries:
        if entry.begin != position or entry.end < entry.begin:
            raise ValueError(f"the bytes of {entry.name!r} do not follow those before it")
        position = entry.end
    return Layout(header, tuple(entries), metadata)
