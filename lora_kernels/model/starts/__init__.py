"""The initial factors of many layers: of plain weights in batches; of sharded ones from sums over
all processes, or made by one process for all.
"""

from .job import StartJob, naming
from .make import make_starts

__all__ = ["StartJob", "make_starts", "naming"]
