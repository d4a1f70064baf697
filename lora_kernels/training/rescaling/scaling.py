"""Proposes s for a configuration that leaves it open: a `lora_alpha`, and perhaps a rule."""

from __future__ import annotations

import math
from dataclasses import replace

from ...init import Initializer
from ...layers.options import DEFAULT_ALPHA
from ...model.config import LoRAConfig

RSLORA_ALPHA = 16.0  # the study's: s = 4 at r = 16
_PUBLISHED = "lora_alpha = {:g} is the constant that LoRA-α's paper gives for 'alpha_sqrt'."
_FREE = (
    "s was left open. With s·BA = 0 at the start, twice the s and half the rate take a first step "
    "of the same size, and A then moves less from its start. "
)
_RSLORA = (
    _FREE
    + "Proposed is rsLoRA's s = {:g} / √r. In the study it trained LoRA as s = 1 did on one task, "
    "and to a lower mean loss on the other. By κ, the rate stays the same when r changes, if the "
    "sizes of the start's entries do (LoRA's do; those of 'gaussian' are 1 / r)."
)
_LORA = (
    _FREE
    + "Proposed is s = 1 (lora_alpha = {:.4g}), as in the study; the rule 'rslora' would keep the "
    "rate the same when r changes."
)
_ONE = (
    "s was left open. Proposed is s = 1 (lora_alpha = {:.4g}), for which the papers give the sizes "
    "of initial factors that are not zero: another s also changes s·B₀A₀, or the factors."
)


def with_scaling(config: LoRAConfig) -> tuple[LoRAConfig, str]:
    """The configuration with a proposed `lora_alpha`, and the reason for it; a configuration that
    has a `lora_alpha` is returned as it is, with "". The rule for s changes only if the
    configuration names none.

    - "alpha_sqrt": LoRA-α's own constant, 256 (arXiv 2606.12883).
    - A start with s·BA = 0: "rslora" (arXiv 2312.03732), s = 16 / √r. κ = s√(r(ν[A] + ν[B])) then
      does not depend on r if the sizes of the entries do not.
    - Every other start, and a start with s·BA = 0 under the rule "lora": s = 1 at `config.r`.
    """
    if config.lora_alpha is not None:
        return config, ""
    rule, is_named = config.scaling_rule, config.use_rslora or config.scaling is not None
    if rule == "alpha_sqrt":
        alpha = DEFAULT_ALPHA[rule]
        return replace(config, lora_alpha=alpha), _PUBLISHED.format(alpha)
    is_free = is_zero(config.initializer)
    if is_free and (rule == "rslora" or not is_named):
        use_rslora = config.use_rslora or not is_named
        found = replace(config, lora_alpha=RSLORA_ALPHA, use_rslora=use_rslora)
        return found, _RSLORA.format(RSLORA_ALPHA)
    alpha = float(config.r) if rule == "lora" else math.sqrt(config.r)
    return replace(config, lora_alpha=alpha), (_LORA if is_free else _ONE).format(alpha)


def usual_alpha(config: LoRAConfig) -> float:
    """`lora_alpha` of layers that `alpha_pattern` does not name."""
    given = config.lora_alpha
    return DEFAULT_ALPHA[config.scaling_rule] if given is None else float(given)


def is_zero(initializer: Initializer) -> bool:
    """Whether the start's s·BA is zero at every s, so that nothing has to be subtracted."""
    changes = initializer.changes_base or initializer.grows_with_scaling
    return not (changes or initializer.has_R)
