"""LoRA with Triton, CUDA and C++ kernels: operators, starts, layers, models, files, PEFT."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if find_spec("lora_kernels.triton_kernels") is None:
    # In a checkout that is not installed, `triton_kernels` is a folder beside this one.
    __path__.append(str(Path(__file__).parents[1]))

from . import init, ops
from ._utils.version import __version__
from .files.adapter.hotswap import hotswap_adapter
from .files.adapter.saving import load_adapter, save_adapter
from .layers.linear import LoRALinear
from .model.config import LoRAConfig
from .model.install.per_row import adapters_per_row
from .model.install.starting import start_adapters
from .model.install.weighted import add_weighted_adapter
from .model.lora import (
    adapter_names,
    add_lora,
    disable_adapters,
    enable_adapters,
    merge_lora,
    set_adapter,
    unload_lora,
)
from .model.selection.expert_rank import with_expert_rank
from .ops import svd
from .training import magnitude, optim, rescaling, trainer
from .training.activations import capture_activations
from .training.gradients import capture_gradients
from .training.optim import lora_plus_groups
from .training.rescaling import suggest

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "__version__",
    "adapter_names",
    "adapters_per_row",
    "add_lora",
    "add_weighted_adapter",
    "capture_activations",
    "capture_gradients",
    "disable_adapters",
    "enable_adapters",
    "hotswap_adapter",
    "init",
    "load_adapter",
    "lora_plus_groups",
    "magnitude",
    "merge_lora",
    "ops",
    "optim",
    "rescaling",
    "save_adapter",
    "set_adapter",
    "start_adapters",
    "suggest",
    "svd",
    "trainer",
    "unload_lora",
    "with_expert_rank",
]

# Public modules inside sub-packages; this makes `import lora_kernels.svd` work.
for _module in (svd, magnitude, optim, rescaling, trainer):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
del _module


if TYPE_CHECKING:
    from . import peft as peft
else:

    def __getattr__(name):
        """Imports `lora_kernels.peft` at its first use, because it imports PEFT."""
        if name == "peft":
            return import_module(".peft", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
