"""What `initialize` changes in PEFT's layers: `start` makes a layer subtract A₀ and B₀, `dora` does
the same for DoRA layers, and `parts` finds a layer's tensors.
"""

from .dora import measure_magnitude
from .parts import adapters_in, factors_of, magnitude_of, start_of
from .start import (
    STARTED,
    StartVariant,
    drop_start,
    load_from_state_dict,
    set_start,
    silently_loaded,
)

__all__ = [
    "STARTED",
    "StartVariant",
    "adapters_in",
    "drop_start",
    "factors_of",
    "load_from_state_dict",
    "magnitude_of",
    "measure_magnitude",
    "set_start",
    "silently_loaded",
    "start_of",
]
