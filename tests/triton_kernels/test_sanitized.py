"""Every kernel of the layer at small sizes: what `make gpu` runs under compute-sanitizer."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from triton.runtime import interpreter

from lora_kernels.triton_kernels import linear
from lora_kernels.triton_kernels.linear import gemm

from ..ops.test_linear import check, inputs
from .test_linear import force  # noqa: F401  (a fixture)

# Rows, N, K, r: the first for few rows, the second for the GEMM beyond the ends of M, N and K.
SIZES = [((2, 3), 96, 200, 16), ((200,), 24, 344, 8)]
WAYS = [
    *(("kernel", "decode"), ("kernel", "steps", "reversed")),
    *(("kernel", "steps", config) for config in gemm.CONFIGS),
]


def run(force, ways, size, dropout, start, device, dtype) -> None:  # noqa: F811
    force(*ways)
    t = inputs(*size, dtype, start=start, device=device)
    check(t, 0.7, dropout, torch.tensor(2**33 + 5, device=device) if dropout else None)


@pytest.mark.sanitize
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_layer(ways, size, dropout, start, device, force):  # noqa: F811
    if device == "cpu":
        pytest.skip("in the interpreter test_linear.py has these sizes")
    for dtype in (torch.bfloat16, torch.float16):
        run(force, ways, size, dropout, start, device, dtype)


def test_no_kernel_of_the_layer_is_left_out(device, force, monkeypatch):  # noqa: F811
    if device != "cpu":
        pytest.skip("launches are counted in the interpreter")
    kernels = set()
    for found in pkgutil.iter_modules(linear.__path__):
        module = importlib.import_module(f"{linear.__name__}.{found.name}")
        kernels |= {
            name
            for name, value in vars(module).items()
            if name.endswith("_kernel") and value.fn.__module__ == module.__name__
        }
    launched, launch = set(), interpreter.GridExecutor.__call__

    def noted(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    for size in SIZES:
        for ways in WAYS:
            run(force, ways, size, 0.0, False, device, torch.float16)
    assert kernels <= launched and len(kernels) >= 6
