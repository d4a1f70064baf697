"""LoRA with its kernels: operators, initialisers and the layer. See the README for a tour."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

if find_spec("lora_kernels.triton_kernels") is None:
    # Used from a checkout that is not installed, where that package is the folder beside this one.
    __path__.append(str(Path(__file__).parents[1]))

from . import init as init
from . import magnitude as magnitude
from . import ops as ops
from . import svd as svd
from ._version import __version__ as __version__
from .adapter_files import load_adapter as load_adapter
from .adapter_files import save_adapter as save_adapter
from .config import LoRAConfig as LoRAConfig
from .gradients import capture_gradients as capture_gradients
from .linear import LoRALinear as LoRALinear
from .model import adapter_names as adapter_names
from .model import add_lora as add_lora
from .model import disable_adapters as disable_adapters
from .model import enable_adapters as enable_adapters
from .model import merge_lora as merge_lora
from .model import set_adapter as set_adapter
from .model import unload_lora as unload_lora
from .optim import lora_plus_groups as lora_plus_groups


def __getattr__(name: str):
    """`lora_kernels.peft`, imported at its first use: it imports PEFT."""
    if name == "peft":
        return import_module(".peft", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
