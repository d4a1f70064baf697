"""`lora::linear`, and `lora::grouped_linear` for the experts of a mixture."""

from .grouped import grouped_linear_backward_ref, grouped_linear_forward_ref
from .plain import linear_backward_ref, linear_forward_ref

__all__ = [
    "grouped_linear_backward_ref",
    "grouped_linear_forward_ref",
    "linear_backward_ref",
    "linear_forward_ref",
]
