"""PEFT's rules: which layers it adapts, and how it loads them."""

from .loading import ENGINE as ENGINE
