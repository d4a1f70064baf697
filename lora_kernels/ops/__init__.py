"""The operators `torch.ops.lora.*`. Importing this package registers them; the compiled kernels
override the references where they were built (see DESIGN in the README).
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
from ._extension import load_extension
from ._triton import register_triton

__all__ = [
    "dst_basis",
    "frobenius_stats",
    "linear",
    "loram_init",
    "minor_svd",
    "randomized_svd",
    "subtract_dst",
    "thin_qr",
]

load_extension()
register_triton()
