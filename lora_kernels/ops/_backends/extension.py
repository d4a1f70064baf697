"""Loads the C++ extension `lora_kernels._C`, whose import registers the compiled kernels."""

from __future__ import annotations

import importlib
import warnings


def load_extension() -> bool:
    """True if the compiled kernels are in; otherwise one warning says what that costs."""
    try:
        importlib.import_module("lora_kernels._C")
    except ImportError as error:
        warnings.warn(
            "lora_kernels runs without its compiled CPU kernels, on the plain-torch references: "
            "results are the same, initialisation is many times slower. To build them: "
            f"pip install --no-build-isolation . (needs a C++20 compiler and ninja). [{error}]",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
