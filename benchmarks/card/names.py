"""The name of a GPU's folder of results."""

from __future__ import annotations

import re


def slug(name: str) -> str:
    """`"NVIDIA H200"` -> `"nvidia-h200"`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
