"""The initial factors of many layers: for plain weights in batches; for sharded weights from sums
over all processes, or computed by one process for all.
"""

from .first_rank import (
    first_rank_loads,
    lacks_weights,
    load_from_first_rank,
    loaded_device,
    starts_of_first_rank,
)
from .job import StartJob, naming
from .make import make_starts
from .parts import layer_parts, part_names, refuse_parts
from .waiting import WAITS, WaitingAdapter, waiting_adapters

__all__ = [
    "WAITS",
    "StartJob",
    "WaitingAdapter",
    "first_rank_loads",
    "lacks_weights",
    "layer_parts",
    "load_from_first_rank",
    "loaded_device",
    "make_starts",
    "naming",
    "part_names",
    "refuse_parts",
    "starts_of_first_rank",
    "waiting_adapters",
]
