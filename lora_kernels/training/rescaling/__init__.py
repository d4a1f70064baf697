"""Learning rates and s that fit together: setups that train the same (`rescaled`), and suggested
values for a start (`suggest`).

`setup` applies LoRAM's proposition 1 exactly. `suggest` relies on rates that were tuned by
training: `step_size` measures how far a step of Adam moves W, `reference` has the study's results,
`scaling` proposes s, and `notes` says what is not known.
"""

from .reference import STUDY, StudyReference, StudyTask
from .setup import ScaledStart, Setup, rescaled
from .suggest import suggest
from .suggestion import Suggestion

__all__ = [
    "STUDY",
    "ScaledStart",
    "Setup",
    "StudyReference",
    "StudyTask",
    "Suggestion",
    "rescaled",
    "suggest",
]
