"""The learning rates that the study tuned, and the setups that it tuned them on."""

from __future__ import annotations

from dataclasses import dataclass

from ...init import Initializer, get_initializer

# A start has small factors if the first step at the rate c / κ makes κ so many times as large.
SMALL = 1.5


@dataclass(frozen=True)
class StudyTask:
    """A task of the study: a model of size `parameters`, trained for `steps` optimizer steps of
    `batch` samples.
    """

    name: str
    model: str
    parameters: int
    steps: int
    batch: int


@dataclass(frozen=True)
class StudyReference:
    """The study's tuned learning rates in two numbers, and the setups that they come from.

    Attributes:
        product: c, the geometric mean over all setups of the tuned rate times κ, the step size
            after the first step. The rate is the peak of a linear warm-up and decay, for AdamW
            without weight decay.
        spread: the largest factor, in either direction, between a tuned rate and c / κ.
        full: the lowest and the highest tuned rate of full fine-tuning, which c does not include.
        small_factors: the smallest and the largest tuned rate over c / κ of starts with small
            factors. c and the spread do not include these starts.
        tasks: the models and how long they were trained.
        starts: the names of the starts.
        ranks: the values of r.
        scalings: the smallest and the largest s.

    """

    product: float
    spread: float
    full: tuple[float, float]
    small_factors: tuple[float, float]
    tasks: tuple[StudyTask, ...]
    starts: tuple[str, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, float]

    def has_start(self, initializer: Initializer) -> bool:
        """Whether the study includes this kind of start, perhaps with other options."""
        return type(initializer) in {type(get_initializer(name)) for name in self.starts}

    def __str__(self) -> str:
        models = dict.fromkeys(task.model for task in self.tasks)
        return (
            f"the study of {' and '.join(models)}, whose tuned rates lie within a factor of "
            f"{self.spread:.2g} of c / κ"
        )


# From benchmarks/results/study/rates.csv, without full fine-tuning; a test compares them.
STUDY = StudyReference(
    product=4.48e-4,
    spread=4.9,
    full=(1e-4, 1.78e-4),
    small_factors=(0.203, 0.358),
    tasks=(
        StudyTask("code", "SmolLM2-135M", 135_000_000, steps=24, batch=4),
        StudyTask("sentiment", "all-MiniLM-L6-v2", 23_000_000, steps=66, batch=16),
    ),
    starts=(
        *("lora", "loram", "pissa", "milora", "olora", "init_ab", "init_ab_plus"),
        *("lora_ga", "lora_one", "lora_sb", "lora_xs"),
    ),
    ranks=(8, 16, 64),
    scalings=(1.0, 90.5),
)
