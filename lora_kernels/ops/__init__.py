"""The operators `torch.ops.lora.*`. Importing this package registers them; the compiled kernels
override the references where they were built.
"""

from . import (
    _kinds as _kinds,
)
from . import (
    dst_basis,
    frobenius_stats,
    linear,
    loram_init,
    minor_svd,
    randomized_svd,
    subtract_dst,
    thin_qr,
)
from ._triton import register_triton
from .cpu_capability import (
    apply_setting,
    cpu_capabilities,
    cpu_capability,
    set_cpu_capability,
)

__all__ = [
    "cpu_capabilities",
    "cpu_capability",
    "dst_basis",
    "frobenius_stats",
    "linear",
    "loram_init",
    "minor_svd",
    "randomized_svd",
    "set_cpu_capability",
    "subtract_dst",
    "thin_qr",
]

apply_setting()
register_triton()
