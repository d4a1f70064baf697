"""`FactorPair`: A and B of one layer's adapter. `trained_pairs`: those of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...init.fused import Parts, blocks
from ...init.sharded.layout import is_sharded
from ...layers.adapter import Adapter
from ...model.install.layers import adapted_layers
from .peft_pairs import NO_RULE, peft_factors


@dataclass(frozen=True, eq=False)
class FactorPair:
    """A [r, in] and B [out, r] of a layer whose update is s·BA; of E experts, stacks of them.

    Attributes:
        name: the layer's name in the model.
        lora_A, lora_B: the parameters; those of PEFT's convolutions have more dimensions.
        scaling: s.
        shape_A, shape_B: [N, r, in] and [N, out, r], the parameters as N matrices.
        parts: those of a fused layer, whose B is block-diagonal.

    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    shape_A: tuple[int, int, int]
    shape_B: tuple[int, int, int]
    parts: Parts = ()

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.shape_A[1]

    @property
    def count(self) -> int:
        """N: E for a stack of E experts, else 1."""
        return self.shape_A[0]

    @property
    def trains(self) -> bool:
        """Whether A or B trains."""
        return self.lora_A.requires_grad or self.lora_B.requires_grad

    @property
    def grad_A(self) -> Tensor:
        """The gradient of A; only for an A that has one."""
        assert self.lora_A.grad is not None
        return self.lora_A.grad

    @property
    def grad_B(self) -> Tensor:
        """The gradient of B; only for a B that has one."""
        assert self.lora_B.grad is not None
        return self.lora_B.grad

    def by_part(self) -> list[FactorPair]:
        """For a fused layer, one pair for each part, with views of these factors and gradients: a
        rule for the whole would fill B outside the blocks. For other layers, the pair itself.
        """
        if not self.parts:
            return [self]
        pairs = []
        for rows, columns in blocks(self.parts, self.rank):
            A, B = self.lora_A.detach()[columns], self.lora_B.detach()[rows, columns]
            A.grad = None if self.lora_A.grad is None else self.lora_A.grad[columns]
            B.grad = None if self.lora_B.grad is None else self.lora_B.grad[rows, columns]
            pair = FactorPair(self.name, A, B, self.scaling, (1, *A.shape), (1, *B.shape))
            pairs.append(pair)
        return pairs

    def check_dense(self) -> None:
        """Raises TypeError if a gradient is sparse."""
        for name, factor in (("A", self.lora_A), ("B", self.lora_B)):
            if factor.grad is not None and factor.grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {name} in layer {self.name!r} is {factor.grad.layout}: a "
                    "rule needs dense gradients"
                )


def trained_pairs(model: nn.Module, rule: str, needs_A: bool = True) -> list[FactorPair]:
    """The pairs of the active adapters that train, in our layers and in PEFT's. A pair that two
    layers share is returned once.

    Args:
        model: a module; wrappers such as `DistributedDataParallel` may be around it.
        rule: the rule's name, for errors.
        needs_A: whether the rule is defined only if A trains.

    Raises:
        ValueError: the rule is not defined for one of the adapters; the error names the layer.

    """
    pairs: dict[int, FactorPair] = {}
    owners: dict[int, FactorPair] = {}
    for pair in (*_our_pairs(model, rule), *_peft_pairs(model, rule)):
        if (reason := _why_not(pair, needs_A)) is not None:
            raise _refused(rule, pair.name, reason)
        for factor in (pair.lora_A, pair.lora_B):
            other = owners.setdefault(id(factor), pair)
            if not _same_update(pair, other):
                raise _refused(
                    rule,
                    pair.name,
                    f"it shares A or B with {other.name!r}, but not the whole update s·BA, and the "
                    f"gradient is a sum over both layers: give it an A and a B of its own, or "
                    f"{NO_RULE}",
                )
        pairs.setdefault(id(pair.lora_A), pair)
    return list(pairs.values())


def _our_pairs(model: nn.Module, rule: str) -> Iterator[FactorPair]:
    for name, layer in adapted_layers(model).items():
        adapter = layer.active()
        if not any(parameter.requires_grad for parameter in adapter.parameters()):
            continue
        if (reason := _why_not_adapter(adapter)) is not None:
            raise _refused(rule, name, reason)
        A, B = adapter.lora_A, adapter.lora_B
        N = A.shape[0] if A.dim() == 3 else 1
        out, r = B.shape[-2:]
        shapes = (N, r, A.shape[-1]), (N, out, r)
        pair = FactorPair(name, A, B, adapter.scaling, *shapes, adapter.options.parts)
        if pair.trains:  # not a magnitude or a bias only
            yield pair


def _peft_pairs(model: nn.Module, rule: str) -> Iterator[FactorPair]:
    for name, found, scaling in peft_factors(model):
        if isinstance(found, str):
            raise _refused(rule, name, found)
        A, B = found
        r, out = A.shape[0], B.shape[0]
        yield FactorPair(name, A, B, scaling, (1, r, A.numel() // r), (1, out, r))


def _same_update(pair: FactorPair, other: FactorPair) -> bool:
    same = pair.lora_A is other.lora_A and pair.lora_B is other.lora_B
    return same and pair.scaling == other.scaling


def _refused(rule: str, name: str, reason: str) -> ValueError:
    return ValueError(f"{rule} does not fit the layer {name!r}: {reason}")


def _why_not_adapter(adapter: Adapter) -> str | None:
    """Why no rule is defined for this adapter of ours; None if there may be one."""
    if adapter.lora_R is not None:
        return f"it trains an R between A and B (LoRA-XS, LoRA-SB): {NO_RULE}"
    if adapter.lora_diag is not None:
        return f"its update is B·diag(λ)·A (KaSA), not BA: {NO_RULE}"
    return None


def _why_not(pair: FactorPair, needs_A: bool) -> str | None:
    """Why the rule is not defined for this pair; None if it is."""
    if is_sharded(pair.lora_A) or is_sharded(pair.lora_B):
        return (
            "its factors are sharded, and a rule needs whole ones: train with "
            f"DistributedDataParallel, or {NO_RULE}"
        )
    if not pair.lora_B.requires_grad:
        return f"its B is frozen (MiCA trains only A): {NO_RULE}"
    if needs_A and not pair.lora_A.requires_grad:
        return "its A is frozen: lora_fa is the rule for a frozen A"
    if not (pair.lora_A.is_leaf and pair.lora_B.is_leaf):
        return f"its A or B is computed from another parameter: {NO_RULE}"
    if pair.scaling == 0:
        return "its scaling is 0, so its gradients are 0: set another scaling"
    return None
