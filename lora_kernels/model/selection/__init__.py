"""Which layers of a model are adapted, and why the others are not."""

from .bypassed import bypassed_layers
from .layers import (
    Selection,
    Targets,
    find_candidates,
    find_targets,
    input_embeddings,
    match_modules,
    output_head,
    select_layers,
    with_task_head,
    without_adapters,
    without_named,
)
from .tied import tie_adapters, tie_weights, tied_layers, with_saved_ties, with_ties

__all__ = [
    "Selection",
    "Targets",
    "bypassed_layers",
    "find_candidates",
    "find_targets",
    "input_embeddings",
    "match_modules",
    "output_head",
    "select_layers",
    "tie_adapters",
    "tie_weights",
    "tied_layers",
    "with_saved_ties",
    "with_task_head",
    "with_ties",
    "without_adapters",
    "without_named",
]
