"""The SVD engine for GPUs, built on torch's own operators, in the operators' tests on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ...support import ROOT
from ...support.exhaustive import EXHAUSTIVE
from ..compiled import needs_compiled

OPERATORS = ("randomized_svd", "minor_svd", "thin_qr")  # a minute in all


@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 runs it")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run it on the GPU")
@needs_compiled("_randomized_svd")
@pytest.mark.parametrize("operator", OPERATORS)
def test_batched_engine(operator):
    # LAPACK's bits depend on the number of threads, and so do this engine's.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not threads and not compile"]
    done = subprocess.run(
        [*command, f"tests/ops/svd/test_{operator}.py"],
        cwd=ROOT,
        env={**os.environ, "LORA_KERNELS_SVD_ENGINE": "aten"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
