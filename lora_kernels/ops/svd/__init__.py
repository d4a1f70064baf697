"""Singular triplets and thin QR: the operators, and the functions over them that users call."""

from .triplets import METHODS, TruncatedSVD, check_options, minor, truncated

__all__ = ["METHODS", "TruncatedSVD", "check_options", "minor", "truncated"]
