"""The study's tables stand between the same markers as all other tables."""

from benchmarks.common.document import marked, put_tables

__all__ = ["marked", "put_tables"]
