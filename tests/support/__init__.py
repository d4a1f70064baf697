"""What tests share: oracles, devices, packages that may be missing, tiny models and adapters."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
