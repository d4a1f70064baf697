"""`precondition_gradients_`, and the functions that register a rule on an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from .base import Rule
from .blocks import batches
from .lora_fa import LoRAFA
from .lora_pro import LoRAPro
from .pairs import FactorPair, trained_pairs
from .riemannian import Riemannian


def precondition_gradients_(model: nn.Module, rule: Rule) -> None:
    """Rewrites the gradients of A and B of a model's active adapters, once.

    Call this after the backward (and `GradScaler.unscale_`) and before `optimizer.step()`. Call it
    before `clip_grad_norm_` to clip the rewritten gradients, or after it to clip the original ones.
    `lora_pro`, `riemannian` and `lora_fa` rewrite gradients in the optimizer's step instead, after
    any clipping. Gradients are overwritten in place, in their dtypes. Layers without gradients,
    biases of B and DoRA's magnitudes do not change. With DoRA, BA is the update of the direction.

    Args:
        model: a model with adapters, ours or PEFT's.
        rule: `LoRAPro()`, `Riemannian()` or `LoRAFA()`.

    Raises:
        TypeError: `rule` is not a rule, or a gradient is sparse.
        ValueError: no adapter trains, or the rule is not defined for one of them (R, KaSA, a frozen
            B, sharded factors). No gradient is rewritten then.

    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be LoRAPro(), Riemannian() or LoRAFA(), got {rule!r}")
    _rewrite_(_found(model, rule), rule)


class RuleHandle:
    """A rule that is registered on an optimizer.

    The rule is not in the optimizer's `state_dict`: after resuming, register it on the new
    optimizer. Copies of the optimizer do not have the rule either.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, rule: Rule) -> None:
        self.rule = rule
        self._frozen: list[FactorPair] = []
        self._hook = _Hook(model, rule)
        self._handle = optimizer.register_step_pre_hook(self._hook)

    def freeze_A(self, pairs: Sequence[FactorPair]) -> None:
        """Freezes A until `remove`."""
        self._frozen = [pair for pair in pairs if pair.lora_A.requires_grad]
        for pair in self._frozen:
            pair.lora_A.requires_grad_(False)
            pair.lora_A.grad = None

    def remove(self) -> None:
        """Removes the rule from the optimizer; an A that it froze trains again."""
        self._handle.remove()
        for pair in self._frozen:
            pair.lora_A.requires_grad_(True)
        self._frozen = []


def lora_pro(model: nn.Module, optimizer: Optimizer, damping: float = 1e-8) -> RuleHandle:
    """Makes every step of `optimizer` a step of LoRA-Pro: see `LoRAPro` and `RuleHandle`.

    The rule runs at the beginning of `optimizer.step()`: after the clipping of gradients, after
    the averaging of `DistributedDataParallel`, and only in steps that `GradScaler` does not skip.
    Every optimizer except LBFGS is supported, including fused optimizers and optimizers that
    accelerate has prepared.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`, or `damping` is not a number.
        ValueError: as `precondition_gradients_`; or the optimizer has no factors, has only A or
            only B, has another rule, or is LBFGS; or `damping` is negative or not finite.

    """
    return _register(model, optimizer, LoRAPro(damping))


def riemannian(model: nn.Module, optimizer: Optimizer, damping: float = 1e-6) -> RuleHandle:
    """Makes every step of `optimizer` a preconditioned step: see `Riemannian`, and `lora_pro` for
    when the rule runs.

    Raises:
        TypeError, ValueError: as `lora_pro`; `damping` must be positive.

    """
    return _register(model, optimizer, Riemannian(damping))


def lora_fa(model: nn.Module, optimizer: Optimizer, damping: float = 1e-8) -> RuleHandle:
    """Freezes every A, and makes every step of `optimizer` a step of LoRA-FA: see `LoRAFA`, and
    `lora_pro` for when the rule runs.

    A may be among the optimizer's parameters: optimizers skip parameters without gradients.

    Raises:
        TypeError, ValueError: as `lora_pro`; or the model is already wrapped in
            `DistributedDataParallel`, which would wait for the gradients of A.

    """
    rule = LoRAFA(damping)
    pairs = _found(model, rule)
    if isinstance(model, DistributedDataParallel) and any(p.lora_A.requires_grad for p in pairs):
        raise ValueError(
            "lora_fa freezes A, whose gradients this DistributedDataParallel waits for: call "
            "lora_fa first, then wrap the model"
        )
    handle = _register(model, optimizer, rule)
    handle.freeze_A(pairs)
    return handle


def _register(model: nn.Module, optimizer: Optimizer, rule: Rule) -> RuleHandle:
    optimizer = _innermost(optimizer)
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"{rule.name} needs an optimizer of one gradient a step, not LBFGS, which compares "
            "gradients: use SGD or AdamW"
        )
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(hook, _Hook):
            raise ValueError(f"the optimizer has the rule {hook.rule.name}: remove() it first")
    if not _owned(_found(model, rule), optimizer, rule):
        raise ValueError(
            f"the optimizer has no A and B of the model, so that {rule.name} would do nothing: "
            "construct it with the model's parameters"
        )
    return RuleHandle(model, optimizer, rule)


class _Hook:
    """What an optimizer calls before a step."""

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        self.model, self.rule = model, rule

    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The optimizer itself is the first of `args`.
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._after(kwargs["closure"], optimizer)}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._after(args[1], optimizer), *args[2:]), kwargs
        self._rewrite_(optimizer)
        return None

    def _after(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """A closure that calls `closure`, which runs the backward, and then the rule."""

        def followed() -> Any:
            loss = closure()
            self._rewrite_(optimizer)
            return loss

        return followed

    def _rewrite_(self, optimizer: Optimizer) -> None:
        pairs = trained_pairs(self.model, self.rule.name, self.rule.needs_A)
        _rewrite_(_owned(pairs, optimizer, self.rule), self.rule)


@torch.no_grad()
def _rewrite_(pairs: Sequence[FactorPair], rule: Rule) -> None:
    prepared = [own for pair in rule.prepare_(pairs) for own in pair.by_part()]
    for blocks in batches(prepared):
        with torch.autocast(blocks[0].device.type, enabled=False):
            rule.rewrite_(blocks)


def _found(model: nn.Module, rule: Rule) -> list[FactorPair]:
    pairs = trained_pairs(model, rule.name, rule.needs_A)
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has no adapter that trains A and B: add_lora first"
        )
    return pairs


def _owned(pairs: Sequence[FactorPair], optimizer: Optimizer, rule: Rule) -> list[FactorPair]:
    """The pairs that the optimizer trains; others may be another optimizer's.

    Raises:
        ValueError: the optimizer has only one of A and B, and the rule rewrites both.

    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for pair in pairs if rule.needs_A else ():
        if (id(pair.lora_A) in own) != (id(pair.lora_B) in own):
            missing = "B" if id(pair.lora_A) in own else "A"
            raise ValueError(
                f"the optimizer lacks {missing} of layer {pair.name!r}, and {rule.name} rewrites "
                "the gradients of A and B together: give it both, perhaps in two groups"
            )
    return [pair for pair in pairs if id(pair.lora_B) in own]


def _innermost(optimizer: object) -> Optimizer:
    """The optimizer inside accelerate's wrapper, whose own hooks are never called."""
    inner = getattr(optimizer, "optimizer", None)
    found = inner if isinstance(inner, Optimizer) else optimizer
    if not isinstance(found, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(found).__name__}")
    return found
