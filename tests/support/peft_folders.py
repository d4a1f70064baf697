"""Folders of adapters that PEFT has written, and models with these adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from torch import nn

from lora_kernels import load_adapter
from lora_kernels._utils.peft_names import ADAPTER_CONFIG
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.checkpoint.verify import verify

from .peft_models import adapted
from .running import move


def by_peft(folder: Path, base: nn.Module, **options) -> nn.Module:
    """A PEFT model with a random adapter, saved in the folder."""
    model = adapted(base, **options)
    move(model, 0.05)
    model.save_pretrained(folder)
    return model


def with_config(folder: Path, **values) -> None:
    """Changes fields of the configuration in place."""
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def loaded(base: nn.Module, folder: Path, **options) -> nn.Module:
    """A copy of the base with the folder's adapter."""
    model = copy.deepcopy(base)
    load_adapter(model, folder, progress=False, **options)
    return model.eval()


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """A copy of the base with the folder's adapter, loaded by PEFT."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def merged_files(base: nn.Module, folder: Path, scratch: Path) -> nn.Module:
    """The model that `lora-kernels merge` writes."""
    base.save_pretrained(scratch / "base")
    merge(scratch / "base", folder, scratch / "merged")
    return type(base).from_pretrained(scratch / "merged").eval()


def verified(folder: Path, base: Path) -> dict[str, bool | None]:
    """The results of `lora-kernels verify`, by the checks' names."""
    return {check.name: check.passed for check in verify(folder, base)}
