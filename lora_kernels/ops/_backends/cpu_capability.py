"""The instruction set that the compiled CPU kernels run with.

Each set has its own kernels: baseline (SSE2 on x86, NEON on Arm), avx2, avx512, and avx512bf16,
which multiplies bfloat16 weights without converting them. By default the best set that the
processor supports is used. The environment variable LORA_KERNELS_CPU_CAPABILITY, read when the
package is imported, or `set_cpu_capability` choose a lower one. PyTorch's own kernels are not
affected (they follow ATEN_CPU_CAPABILITY).

Results differ between sets by rounding only. Shapes, dtypes, errors and accuracy are the same, and
no result depends on the number of threads. `dst_basis`, `frobenius_stats` and the dropout mask are
the same bit for bit.
"""

from __future__ import annotations

import os

from ..._utils.errors import unknown_name
from .extension import load_extension

SETTING = "LORA_KERNELS_CPU_CAPABILITY"
NAMES = ("baseline", "avx2", "avx512", "avx512bf16")
REFERENCE = "reference"  # no compiled kernels

extension, missing = load_extension()  # `missing` is the reason if there is none


def cpu_capability() -> str:
    """The name of the set in use; "reference" if the extension was not built."""
    return extension.cpu_capability() if extension else REFERENCE


def cpu_capabilities() -> list[str]:
    """The sets that this processor supports, ascending; empty if the extension was not built."""
    return extension.cpu_capabilities() if extension else []


def set_cpu_capability(name: str) -> None:
    """Choose the instruction set of all CPU kernels from now on, in all threads.

    Raises:
        ValueError: an unknown name, or a set that this processor does not support; nothing changes.
        RuntimeError: the extension was not built.

    """
    _set(name, "CPU capability")


def _set(name: str, option: str) -> None:
    if name not in NAMES:
        raise unknown_name(option, name, NAMES)
    if extension is None:
        raise RuntimeError(f"{option} {name!r}: the compiled CPU kernels were not built")
    if not extension.set_cpu_capability(name):
        there = ", ".join(cpu_capabilities())
        raise ValueError(f"{option} {name!r}: this processor has {there}")


def apply_setting() -> None:
    """Apply LORA_KERNELS_CPU_CAPABILITY, if it is set and the extension was built."""
    name = os.environ.get(SETTING)
    if name and extension:
        _set(name, SETTING)
