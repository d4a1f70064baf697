"""Starts and the fused forward for PEFT's models: `initialize` and `accelerate`.

Both change a `peft.PeftModel` in place and can be undone. PEFT still trains, saves, merges and
switches the adapters.
"""

from importlib.util import find_spec

from .._utils.errors import needed

if find_spec("peft") is None:
    needed("peft", "lora_kernels.peft", "ecosystem")

from .accelerate import AccelerateReport as AccelerateReport
from .accelerate import accelerate as accelerate
from .initialize import InitializeReport as InitializeReport
from .initialize import initialize as initialize
