"""Shared fixtures: every device there is, and weights of a real model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings

import lora_kernels  # noqa: F401  (registers the operators)

settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M in float32; tests copy what they change."""
    from benchmarks.smollm2 import load_model

    return load_model()
