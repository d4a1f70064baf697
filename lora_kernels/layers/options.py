"""`AdapterOptions`, and the rules that compute s, the multiplier of BA, from `lora_alpha` and r."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .._utils.checks import as_integer, check_positive, check_probability
from .._utils.errors import unknown_name
from ..init import Initializer
from ..init.base import refuse_implicit
from ..init.fused import Parts

DEFAULT_ALPHA = {"lora": 8.0, "rslora": 8.0, "alpha_sqrt": 256.0}
RULES = tuple(DEFAULT_ALPHA)


def resolve_rule(scaling: str | None, use_rslora: bool) -> str:
    """The name of the rule for s, in lower case; `use_rslora` is PEFT's spelling of "rslora".

    Raises:
        ValueError: an unknown name, or one that contradicts `use_rslora=True`.
        TypeError: `scaling` is not a string, for example the number s itself.

    """
    if scaling is None:
        return "rslora" if use_rslora else "lora"
    if not isinstance(scaling, str):
        raise TypeError(
            f"scaling must be the name of a rule, {', '.join(RULES)}, got "
            f"{type(scaling).__name__}; s itself follows from lora_alpha and r"
        )
    rule = scaling.lower()
    if rule not in RULES:
        raise unknown_name("scaling", scaling, RULES)
    if use_rslora and rule != "rslora":
        raise ValueError(
            f"use_rslora=True is scaling='rslora', but {scaling!r} is asked for too: "
            "give one of them"
        )
    return rule


def lora_scaling(lora_alpha: float, r: int, rule: str = "lora") -> float:
    """s, with α = `lora_alpha`:

    - "lora": s = α / r (Hu et al., arXiv 2106.09685, section 4.1).
    - "rslora": s = α / √r (Kalajdzievski, arXiv 2312.03732).
    - "alpha_sqrt": s = C / √r, where `lora_alpha` is C. It is LoRA-α's α = C√r, divided by r
      (arXiv 2606.12883; the paper finds C = 256, and uses B₀ = 0 and the learning rates of full
      fine-tuning).

    Raises:
        ValueError: an unknown rule, or a `lora_alpha` that is not positive and finite.
        TypeError: a `lora_alpha` that is not a number.

    """
    check_positive(lora_alpha, "lora_alpha")
    if rule not in RULES:
        raise unknown_name("rule", rule, RULES)
    return float(lora_alpha) / (r if rule == "lora" else math.sqrt(r))


def check_start(rule: str, scaling: float, initializer: Initializer) -> None:
    """Raises ValueError if the rule is "alpha_sqrt" (a large s) and the start grows with s."""
    if rule == "alpha_sqrt" and initializer.grows_with_scaling:
        raise ValueError(
            f"scaling='alpha_sqrt' multiplies the start of {type(initializer).__name__} by "
            f"s = {scaling:g}: s·B₀A₀ would dwarf the weight, and rounding errors would swamp the "
            "weight. Use a start with B = 0 ('lora', 'gaussian'), a start that is divided by s "
            "('pissa', LoRAM(track='pissa')), or another scaling"
        )


RESIDUALS = ("absorb", "implicit")


@dataclass(frozen=True)
class AdapterOptions:
    """The settings of an adapter: rank, α, the rule for s, dropout and residual; whether it is a
    DoRA adapter; which of A and B train, "AB" or "A"; and the parts of a fused layer, if its B is
    block-diagonal.
    """

    r: int
    lora_alpha: float
    scaling_rule: str
    lora_dropout: float
    residual: str
    use_dora: bool = False
    trains: str = "AB"
    parts: Parts = ()

    @classmethod
    def checked(
        cls,
        initializer: Initializer,
        r: int,
        lora_alpha: float | None,
        *,
        use_rslora: bool,
        scaling: str | None,
        lora_dropout: float,
        residual: str,
        use_dora: bool = False,
    ) -> AdapterOptions:
        """Checked options of an adapter whose factors `initializer` computes.

        Raises:
            ValueError: a value out of range, an unknown name, or a rule for s or a residual that
                this initializer does not support.
            TypeError: a value of the wrong type.

        """
        r = as_integer(r, "r", minimum=1)
        rule = resolve_rule(scaling, use_rslora)
        if residual not in RESIDUALS:
            raise unknown_name("residual", residual, RESIDUALS)
        refuse_implicit(initializer, residual)
        check_probability(lora_dropout, "lora_dropout")
        lora_alpha = DEFAULT_ALPHA[rule] if lora_alpha is None else lora_alpha
        if not isinstance(use_dora, bool):
            raise TypeError(f"use_dora must be True or False, got {use_dora!r}")
        trains = initializer.trains
        options = cls(r, lora_alpha, rule, lora_dropout, residual, use_dora, trains)
        check_start(rule, options.scaling, initializer)
        return options

    def fused(self, parts: Parts) -> AdapterOptions:
        """The settings of a fused layer whose P parts each have an adapter with these settings:
        rank P·r and the same s.
        """
        count = len(parts)
        factor = count if self.scaling_rule == "lora" else math.sqrt(count)
        alpha = self.lora_alpha * factor
        return replace(self, r=count * self.r, lora_alpha=alpha, parts=parts)

    @property
    def scaling(self) -> float:
        """s, the multiplier of BA."""
        return lora_scaling(self.lora_alpha, self.r, self.scaling_rule)
