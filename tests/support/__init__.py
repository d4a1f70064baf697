"""Helpers for tests: tiny models, adapters, oracles, devices, and which packages are installed."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
