"""Shared fixtures: the available devices, and the weights of a real model."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # Inductor's cache of graphs (torch 2.13) does not distinguish instruction sets. A graph from
    # another ATEN_CPU_CAPABILITY does not compile ("'at::vec' has not been declared"), or its loops
    # of 8 floats store 16 and the process aborts; two plain programs with torch.compile reproduce
    # this.
    name = f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / name)

if not torch.cuda.is_available():
    # The kernels of triton_kernels/ then run in Triton's interpreter. @triton.jit decides when it
    # decorates, also in Triton's own library: this must be set before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

import random

import numpy as np
import pytest
from hypothesis import settings

import lora_kernels  # noqa: F401  (registers the operators)

from .support.devices import DEVICES
from .support.exhaustive import EXHAUSTIVE
from .support.packages import skipped_without_packages
from .support.sticky_errors import end_if_broken

examples = 40 if EXHAUSTIVE else 25
settings.register_profile("tests", deadline=None, max_examples=examples, derandomize=True)
# A new shape may compile a kernel; machines without a GPU run the 40 examples of the CPU.
settings.register_profile("gpu", settings.get_profile("tests"), max_examples=10)
settings.load_profile("gpu" if "cuda" in DEVICES else "tests")

# Tolerances assume float32 products, and sums accumulated in float32.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pytest_configure(config) -> None:
    config.addinivalue_line(
        "markers",
        "sanitize: small enough for `compute-sanitizer python -m pytest -m sanitize -k cuda`",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item) -> Iterator[None]:
    with skipped_without_packages():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item) -> Iterator[None]:
    with skipped_without_packages():
        return (yield)


# Hypothesis refuses function-scoped fixtures.
@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _device_stays_usable(request) -> Iterator[None]:
    """A kernel's error shows only at the next synchronization. Synchronizing after each test makes
    the test that launched the kernel report the error.
    """
    yield
    if "cuda" in DEVICES and torch.cuda.is_initialized():
        end_if_broken(request.config, request.node.nodeid, torch.cuda.synchronize)


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M in float32; tests must copy what they change."""
    from benchmarks.common.smollm2 import load_model

    return load_model()
