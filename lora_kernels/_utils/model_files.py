"""Which files in a model's folder hold its weights, and JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .safetensors import Entry, load_tensor, read_layout

INDEX = "model.safetensors.index.json"
# A hidden folder that holds the journal while a run writes the folder around it.
JOURNAL_FOLDER = ".lora-kernels-unfinished"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: Path
    entry: Entry

    @property
    def name(self) -> str:
        return self.entry.name

    def load(self) -> Tensor:
        """The tensor, on the CPU; only its own bytes are read."""
        return load_tensor(self.file, self.name)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """All tensors of a safetensors file or of a model's folder; only headers are read.

    Raises:
        ValueError: as `model_files`, or if a file is damaged.
        FileNotFoundError: as `model_files`.

    """
    return [
        StoredTensor(file, entry)
        for file in model_files(path)
        for entry in read_layout(file).entries
    ]


def model_files(path: Path) -> Iterable[Path]:
    """The safetensors files of a model's folder, in the order of its index; or the file itself.

    Raises:
        ValueError: there are no such files, several without an index, or the folder is unfinished.
        FileNotFoundError: the path does not exist, or the index names a missing file.

    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a .safetensors file; other formats are not supported")
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


def is_unfinished(folder: Path) -> bool:
    """Whether a run that writes this folder has not finished."""
    return (folder / JOURNAL_FOLDER).is_dir()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file does not hold a JSON object.

    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return content
