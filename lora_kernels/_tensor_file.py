"""A safetensors file as a whole, for adapters: small enough to be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ._extras import needed


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
