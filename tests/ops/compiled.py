"""Which operators run a compiled kernel on this machine."""

from __future__ import annotations

import pytest
import torch


def needs_compiled(kernel: str) -> pytest.MarkDecorator:
    """For properties that LAPACK, behind the reference, does not promise: the same bits on any
    number of threads.
    """
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"lora::{kernel}", "CPU")
    reason = f"the CPU runs the reference of {kernel}, whose bits depend on the threads"
    return pytest.mark.skipif(not there, reason=reason)
