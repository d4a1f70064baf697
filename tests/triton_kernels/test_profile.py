"""The script that `make gpu-again` runs under ncu calls the kernels' own functions."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu.profile import kernels
from benchmarks.gpu.targets.plan import FULL

TINY = replace(FULL, layer_shape=(48, 32), layer_tokens=24, layer_cases=((8, 0.0),))


def test_every_kernel_runs(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    runs = kernels(torch.device(device), TINY, dtype)
    assert len(runs) == 6 or device == "cuda"
    for run in runs.values():
        run()
