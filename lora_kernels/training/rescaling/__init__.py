"""Learning rates and s that belong together: setups that train the same (`rescaled`), and the rate
that a start wants (`suggest`).

`setup` is LoRAM's proposition 1, exactly. `suggest` is about rates that were found by training:
`step_size` measures how far a step of Adam moves W, `reference` has what the study found, `scaling`
proposes s, and `notes` says what is not known.
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
