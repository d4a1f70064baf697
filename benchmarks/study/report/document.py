"""The study's tables go between markers as all others do."""

from benchmarks.common.document import marked, put_tables

__all__ = ["marked", "put_tables"]
