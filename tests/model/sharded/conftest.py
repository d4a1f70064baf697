"""Imports once, in the process that is forked, what a first call of `add_lora` imports lazily."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch.distributed as dist

from lora_kernels import LoRAConfig, add_lora

from ...support.tiny_models import llama


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    if dist.is_available():
        for name in ("fsdp", "tensor", "tensor.debug", "tensor.parallel"):
            import_module(f"torch.distributed.{name}")
    if find_spec("transformers"):
        add_lora(llama(), LoRAConfig(r=2), progress=False)
