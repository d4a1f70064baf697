"""LoRA with kernels of its own: operators, starts, layers, whole models, files, PEFT models."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if find_spec("lora_kernels.triton_kernels") is None:
    # In a checkout that is not installed, that package is the folder beside this one.
    __path__.append(str(Path(__file__).parents[1]))

from . import init as init
from . import ops as ops
from ._utils.version import __version__ as __version__
from .files.adapter.saving import load_adapter as load_adapter
from .files.adapter.saving import save_adapter as save_adapter
from .layers.linear import LoRALinear as LoRALinear
from .model.config import LoRAConfig as LoRAConfig
from .model.lora import adapter_names as adapter_names
from .model.lora import add_lora as add_lora
from .model.lora import disable_adapters as disable_adapters
from .model.lora import enable_adapters as enable_adapters
from .model.lora import merge_lora as merge_lora
from .model.lora import set_adapter as set_adapter
from .model.lora import unload_lora as unload_lora
from .ops import svd as svd
from .training import magnitude as magnitude
from .training import optim as optim
from .training import rescaling as rescaling
from .training import trainer as trainer
from .training.gradients import capture_gradients as capture_gradients
from .training.optim import lora_plus_groups as lora_plus_groups

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
