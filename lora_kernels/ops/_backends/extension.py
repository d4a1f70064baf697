"""Loads the C++ extension `lora_kernels._C`, whose import registers the compiled kernels.

torch's C++ interface changes with its minor version. An extension that was built for another one
may crash or compute wrong numbers, so it is not loaded. The file's name says which torch it fits:
`_C.torch2.13.abi3.so`. A wheel may contain a file for each of several versions.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from ..._utils.version import torch_abi

NAME = "lora_kernels._C"
FOLDER = Path(__file__).parents[2]
_PREFIX = "_C.torch"


def load_extension() -> tuple[ModuleType | None, str]:
    """The extension, and "". Without one: None and the reason, after a warning that says what the
    lack of it costs.
    """
    try:
        return _load(), ""
    except ImportError as error:
        warnings.warn(
            "lora_kernels runs without its compiled CPU kernels, on plain-torch references: the "
            f"results are the same, but initialization is many times slower. The reason: {error}. "
            "To build the kernels for this torch, in the folder of the source: "
            "pip install --no-build-isolation . (needs a C++20 compiler and ninja)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, str(error)


def _load() -> ModuleType:
    if NAME in sys.modules:  # loaded before, or None, which blocks it
        return importlib.import_module(NAME)
    path = fitting_file(FOLDER, torch.__version__)
    spec = spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def fitting_file(folder: Path, version: str) -> Path:
    """The extension in `folder` that was built for this version of torch.

    Raises:
        ImportError: there is none; the message lists the versions that there are.

    """
    files = _files(folder)
    if not files:
        raise ImportError("they were not built")
    fitting = files.get(torch_abi(version))
    if fitting is None:
        built = ", ".join(files)
        raise ImportError(f"they were built for torch {built}, and this is torch {version}")
    return fitting


def _files(folder: Path) -> dict[str, Path]:
    """The extensions in `folder`, by the version of torch that they fit."""
    files = {}
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        # The longest suffixes come first, and ".so" is last.
        suffix = next((end for end in EXTENSION_SUFFIXES if path.name.endswith(end)), None)
        if suffix:
            files[path.name.removeprefix(_PREFIX).removesuffix(suffix)] = path
    return files
