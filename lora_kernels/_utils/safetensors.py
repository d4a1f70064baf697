"""Safetensors and JSON files: what lies in them, and their tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .extras import needed


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes them, whatever memory they share, with at most one entry of metadata: the order of
    more is random, and the same adapter would give different bytes.

    Raises:
        OSError: it could not be written.

    """
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
    try:
        safetensors.torch.save_file(owned, path, dict(metadata) or None)
    except safetensors.SafetensorError as error:  # no room, for one
        raise OSError(f"{path.name} could not be written: {error}") from None


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, on the CPU, and the metadata.

    Raises:
        ValueError: it is damaged or no safetensors file.

    """
    with _opened(file) as opened:
        # Copies: the file is mapped, and may be changed under the mapping.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}


def load_metadata(file: Path) -> dict[str, str]:
    """What it says beside the tensors.

    Raises:
        ValueError: it is damaged or no safetensors file.

    """
    with _opened(file) as opened:
        return opened.metadata() or {}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    safetensors = needed("safetensors", "reading adapters", "cli")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged, or no safetensors file ({error}): copy or save it again"
        ) from None


INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file: name, shape and safetensors' name of its dtype ("BF16")."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def load(self) -> Tensor:
        """The tensor, on the CPU; the file is mapped, so that only its bytes are read."""
        with _open(self.file) as file:
            return file.get_tensor(self.name)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """All tensors of a safetensors file or of a model folder; only headers are read.

    Raises:
        ValueError: nothing of the kind is there, or a file is damaged.
        FileNotFoundError: no such path, or an index names a file that is not there.

    """
    tensors = []
    for file in model_files(path):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle itself cannot be iterated)
                part = opened.get_slice(name)
                tensors.append(StoredTensor(name, file, tuple(part.get_shape()), part.get_dtype()))
    return tensors


def model_files(path: Path) -> Iterable[Path]:
    """The safetensors files of a model's folder, in the order of its index; or the file itself.

    Raises:
        ValueError: there is none, or several without an index; the folder is unfinished.
        FileNotFoundError: no such path, or the index names a file that is not there.

    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no .safetensors file; other formats are not read")
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if is_unfinished(path):
        raise ValueError(f"{path} is unfinished: repeat the command that was writing it")
    if (path / INDEX).is_file():
        shards = read_json(path / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f"{path / INDEX} has no weight_map of names to files")
        files = [path / name for name in dict.fromkeys(shards.values())]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{INDEX} names {file.name}, which is not in {path}")
        return files
    found = sorted(path.glob("*.safetensors"))
    single = path / "model.safetensors"
    if single in found:
        return [single]
    if len(found) != 1:
        what = "several .safetensors files and no index" if found else "no .safetensors file"
        raise ValueError(f"{path} has {what}; give one file, or the folder of a model or adapter")
    return found


def _open(file: Path):
    safetensors = needed("safetensors", "reading checkpoints", "cli")
    try:
        return safetensors.safe_open(file, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; ValueError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object")
    return content


WORK = ".lora-kernels-unfinished"


def is_unfinished(folder: Path) -> bool:
    """Whether a run that writes this folder was not completed."""
    return (folder / WORK).is_dir()
