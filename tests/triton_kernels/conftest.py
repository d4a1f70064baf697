"""Run the operators on the Triton kernels: compiled on a GPU, else interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton (pip install triton)")

from lora_kernels.ops._backends import triton as backend  # noqa: E402
from lora_kernels.ops.loram_init import empty_factors_ref  # noqa: E402


def release(version: str) -> tuple[int, int]:
    """`"3.6.0"` -> `(3, 6)`."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@pytest.fixture(scope="package")
def device() -> Iterator[str]:
    on_gpu = torch.cuda.is_available()
    old_triton, new_numpy = release(triton.__version__) < (3, 7), release(np.__version__) >= (2, 4)
    if not on_gpu and old_triton and new_numpy:
        pytest.skip("the interpreter of triton < 3.7 does not know NumPy >= 2.4")
    library = torch.library.Library("lora", "IMPL")
    # In Python, where `_poisoned` replaces the functions that allocate.
    kernels = {"_empty_factors": empty_factors_ref, **({} if on_gpu else backend.KERNELS)}
    for name, kernel in kernels.items():
        library.impl(name, kernel, "CUDA" if on_gpu else "CPU", allow_override=True)
    yield "cuda" if on_gpu else "cpu"
    library._destroy()


@pytest.fixture(scope="package")
def dtypes() -> tuple[torch.dtype, ...]:
    """Without bfloat16 where Triton's interpreter treats its bits as integers."""
    halves = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float16,)
    return (torch.float32, *halves)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch, request) -> None:
    """Fill new memory with NaN, so that entries a kernel does not write show; except where launches
    are counted or captured.
    """
    if request.module.__name__.endswith("test_gpu"):
        return
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kw: poison(empty(*args, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: poison(empty_like(*args, **kw)))
