"""The layers' operators: `lora::linear`, and DoRA's `lora::row_norms` and `lora::dora_linear`."""

from . import dora, row_norms
from .lora import (
    check_operand,
    check_together,
    define_autocast,
    dropped,
    linear,
    linear_backward_ref,
    linear_forward_ref,
)

__all__ = [
    "check_operand",
    "check_together",
    "define_autocast",
    "dora",
    "dropped",
    "linear",
    "linear_backward_ref",
    "linear_forward_ref",
    "row_norms",
]
