"""The operators `torch.ops.lora.*`. Importing this package registers them. Compiled kernels, where
available, override the references.
"""

from . import dst_basis, frobenius_stats, grouped_linear, linear, loram_init, subtract_dst
from ._backends import tensor_kinds as tensor_kinds
from ._backends.cpu_capability import (
    apply_setting,
    cpu_capabilities,
    cpu_capability,
    set_cpu_capability,
)
from ._backends.triton import register_triton
from .svd import minor_svd, randomized_svd, thin_qr

__all__ = [
    "cpu_capabilities",
    "cpu_capability",
    "dst_basis",
    "frobenius_stats",
    "grouped_linear",
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
