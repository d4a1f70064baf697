"""The linear layers of a mixture's experts: two operators and their kernels."""

from .operator import grouped_linear_backward, grouped_linear_forward, suits

__all__ = ["grouped_linear_backward", "grouped_linear_forward", "suits"]
