"""The linear layer: its two operators, and the kernels among which their steps choose."""

from .operator import linear_backward, linear_forward

__all__ = ["linear_backward", "linear_forward"]
