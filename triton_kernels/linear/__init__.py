"""The linear layer: its two operators, and the kernels that their steps choose from."""

from .operator import linear_backward, linear_forward

__all__ = ["linear_backward", "linear_forward"]
