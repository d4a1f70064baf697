"""`Suggestion`: a learning rate and an s for a start, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from ...model.config import LoRAConfig
from .notes import notes_on, start_name
from .reference import STUDY
from .scaling import usual_alpha
from .step_size import StepSize


@dataclass(frozen=True)
class Suggestion:
    """Suggested settings for training a start. `str()` gives a readable summary.

    Attributes:
        learning_rate: the peak rate of Adam or AdamW; with LoRA+, that of A.
        low: the lower end of the range around that rate in which the study's tuned rates lie.
        high: the upper end of that range.
        config: the configuration to pass to `add_lora`, with `lora_alpha` filled in.
        scaling: s; (smallest, largest) if the layers differ.
        lora_alpha: the α from which s is computed; `alpha_pattern` may give layers another α.
        scaling_rule: the rule that computes s from α.
        ratio: B's learning rate divided by A's.
        step_size: κ, the root mean square of the entries of the change of W in one step of Adam at
            the rate 1.
        next_step_size: κ after the first step at `learning_rate`.
        measured: the number of layers on which κ was measured.
        layers: the number of adapted layers.
        reference: where c = learning_rate · κ comes from, for the κ after the first step.
        notes: what is known and what is not, one or two sentences each.

    """

    learning_rate: float
    low: float
    high: float
    config: LoRAConfig
    scaling: float | tuple[float, float]
    lora_alpha: float
    scaling_rule: str
    ratio: float
    step_size: float
    next_step_size: float
    measured: int
    layers: int
    reference: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rate = f"{self.learning_rate:.2g}" + " for A" * (self.ratio != 1)
        of_B = f", {self.ratio * self.learning_rate:.2g} for B" if self.ratio != 1 else ""
        some = f"{self.measured} of " if self.measured < self.layers else "all "
        c = self.learning_rate * self.next_step_size
        return "\n".join(
            [
                f"{described(self.config, self.scaling)}: learning rate {rate}{of_B} "
                f"({self.low:.2g} to {self.high:.2g})",
                f"  step size κ = {self.step_size:.3g}, measured on {some}{self.layers} layers; "
                f"{self.next_step_size:.3g} after a step",
                f"  c = learning rate · κ = {c:.2g}, from {self.reference}",
                *(f"  - {note}" for note in self.notes),
            ]
        )


def make_suggestion(
    config: LoRAConfig,
    step: StepSize,
    *,
    product: float | None = None,
    reference: str = "",
    ratio: float = 1.0,
    notes: tuple[str, ...] = (),
) -> Suggestion:
    """The suggestion for a configuration with a `lora_alpha` and the κ that was measured.

    `product` is c, and `reference` says where c comes from; None means the study's c. `notes` come
    before the other notes.
    """
    is_study = product is None
    c = STUDY.product if product is None else product
    rate, (low, high) = step.rate(c), step.scaling
    return Suggestion(
        learning_rate=rate,
        low=rate / STUDY.spread,
        high=rate * STUDY.spread,
        config=config,
        scaling=low if low == high else (low, high),
        lora_alpha=usual_alpha(config),
        scaling_rule=config.scaling_rule,
        ratio=ratio,
        step_size=step.value,
        next_step_size=step.after(rate),
        measured=step.measured,
        layers=step.layers,
        reference=str(STUDY) if is_study else reference,
        notes=(*notes, *notes_on(config, step, c, ratio, is_study)),
    )


def reference_text(config: LoRAConfig, step: StepSize, rate: float) -> str:
    """Where c comes from, if that is a configuration that trains well at this rate."""
    low, high = step.scaling
    text = described(config, low if low == high else (low, high))
    return f"{text} at the rate {rate:.2g} on this model, where κ = {step.after(rate):.3g}"


def described(config: LoRAConfig, scaling: float | tuple[float, float]) -> str:
    """The start, its rank and s in a few words."""
    s = f"{scaling:.3g}" if isinstance(scaling, float) else "{:.3g} to {:.3g}".format(*scaling)
    rule = f" by {config.scaling_rule}" * (config.scaling_rule != "lora")
    alpha = f"{usual_alpha(config):.4g}"
    return f"{start_name(config)}, r={config.r}, lora_alpha={alpha}{rule} (s={s})"
