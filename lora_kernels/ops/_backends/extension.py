"""Loads the C++ extension `lora_kernels._C`, whose import registers the compiled kernels."""

from __future__ import annotations

import importlib
import warnings


def load_extension() -> bool:
    """Whether the compiled kernels were loaded; if not, warn once of what that costs."""
    try:
        importlib.import_module("lora_kernels._C")
    except ImportError as error:
        warnings.warn(
            "lora_kernels runs without its compiled CPU kernels, on plain-torch references: the "
            "results are the same, but initialization is many times slower. To build them: "
            f"pip install --no-build-isolation . (needs a C++20 compiler and ninja). [{error}]",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
