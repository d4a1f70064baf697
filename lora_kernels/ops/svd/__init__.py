"""Singular triplets and thin QR: the operators, and `truncated` and `minor` for users."""

from .triplets import METHODS, TruncatedSVD, check_options, minor, truncated

__all__ = ["METHODS", "TruncatedSVD", "check_options", "minor", "truncated"]
