"""Notes on a suggested learning rate: what is known about it, and what is not."""

from __future__ import annotations

from ...model.config import LoRAConfig
from .reference import SMALL, STUDY, StudyReference
from .step_size import StepSize


def notes_on(
    config: LoRAConfig, step: StepSize, product: float, ratio: float, is_study: bool
) -> tuple[str, ...]:
    """Notes on the rate `product` / κ; `is_study` says whether `product` is the study's."""
    return (
        *_on_the_rate(is_study),
        *_on_small_factors(step, product),
        *_on_the_study(config, step),
        *_on_the_configuration(config, product, ratio),
    )


def _on_the_rate(is_study: bool) -> list[str]:
    spread = f"within a factor of {STUDY.spread:.2g} of c / κ"
    return [
        "The rate is c / κ: near its start, a step of AdamW at the rate η changes W by about η·κ, "
        "and setups with equal η·κ are taken to train alike (arXiv 2507.06558, propositions 1 "
        "and 2, for Adam).",
        f"The study's tuned rates are {spread}; they are peaks of a warm-up and a linear decay."
        if is_study
        else "c is what the reference gives, with its schedule. The range is that of the study, "
        f"whose tuned rates are {spread}.",
    ]


def _on_small_factors(step: StepSize, product: float) -> list[str]:
    after = step.after(step.rate(product))
    if after <= SMALL * step.value:
        return []
    low, high = STUDY.small_factors
    return [
        f"The factors of this start are small beside this rate: κ is {step.value:.2g} before the "
        f"first step and {after:.2g} after it. The study's one start of this kind, LoRA-One, "
        f"trained best at {low:.2g} to {high:.2g} times such a rate: try smaller ones."
    ]


def _on_the_study(config: LoRAConfig, step: StepSize, study: StudyReference = STUDY) -> list[str]:
    models = {task.model: task.parameters for task in study.tasks}
    small = ", ".join(f"{name} with {size / 1e6:.0f}M" for name, size in models.items())
    steps, batch = ([getattr(t, key) for t in study.tasks] for key in ("steps", "batch"))
    notes = [
        f"The study is of small models ({small} parameters) and short runs ({_range(steps)} steps "
        f"of {_range(batch)} samples). Long runs, large batches and large models were not "
        "measured: tune around this rate.",
    ]
    others = []
    if not study.has_start(config.initializer):
        others.append(f"the start {start_name(config)}")
    if not min(study.ranks) <= step.ranks[0] <= step.ranks[1] <= max(study.ranks):
        others.append(f"r = {_range(step.ranks)}")
    if not min(study.scalings) <= step.scaling[0] <= step.scaling[1] <= max(study.scalings):
        others.append(f"s = {_range(step.scaling)}")
    if others:
        notes.append(
            f"The study does not have {', '.join(others)}: κ is measured, but no rate was tuned."
        )
    return notes


def _on_the_configuration(config: LoRAConfig, product: float, ratio: float) -> list[str]:
    notes = []
    if ratio != 1:
        notes.append(f"The rate is that of A; B has {ratio:g} times as much (lora_plus_groups).")
    if config.use_dora:
        notes.append(
            "DoRA's magnitudes train at the same rate, and are not in κ, which is that of BA."
        )
    if config.target_parameters:
        notes.append("κ of experts is that of a step in which all of them get tokens.")
    if config.modules_to_save or config.bias != "none":
        notes.append(
            "What trains in full (modules_to_save, bias) has κ = 1: give it a parameter group of "
            f"its own, with a rate below c = {product:.2g}. The study's full fine-tuning was best "
            f"at {STUDY.full[0] / STUDY.product:.2g} to {STUDY.full[1] / STUDY.product:.2g} of its "
            "c."
        )
    return notes


def start_name(config: LoRAConfig) -> str:
    """The name of the start: the given name, or the class of the given object."""
    given = config.init_lora_weights
    return given.lower() if isinstance(given, str) else type(config.initializer).__name__


def _range(values: list[int] | tuple[float, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
