"""Computes starts for a checkpoint that may be larger than memory; writes the residual base."""

from .job import InitSummary as InitSummary
from .run import initialize as initialize
from .run import starts_from_files as starts_from_files
