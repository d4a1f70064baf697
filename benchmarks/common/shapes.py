"""Weight shapes on a command line: OUTxIN, for instance 11008x4096."""

from __future__ import annotations

import argparse

Shape = tuple[int, int]


def shape(text: str) -> Shape:
    """`"11008x4096"` -> (11008, 4096)."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"a shape looks like 4096x4096, got {text!r}")
    return int(parts[0]), int(parts[1])


def shape_name(size: Shape) -> str:
    """(11008, 4096) -> "11008×4096"."""
    return f"{size[0]}×{size[1]}"
