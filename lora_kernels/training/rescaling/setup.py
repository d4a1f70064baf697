"""Scaling equivalence: setups that differ in s, in the initial factors' magnitude and in learning
rates, but train the same.

LoRAM (arXiv 2507.06558), proposition 1: what an adapter learns depends only on the combination of
s, the magnitude of its initial factors and the learning rates, not on each of them separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..._utils.checks import check_positive
from ..._utils.errors import unknown_name
from ...init import Initializer, Start, StartRequest, get_initializer
from ...init.base import LayerRank
from ...layers.linear import LoRALinear
from ...model.install.sharded.fsdp import reshard

# When a factor is multiplied by α, its gradient is multiplied by 1 / α. These are the powers of α
# by which the learning rate, eps and the weight decay are multiplied to compensate.
_POWERS = {
    "sgd": (2, 0, -2),
    "adam": (1, -1, -2),
    "adamw": (1, -1, -1),
}


@dataclass(frozen=True)
class Setup:
    """How an adapter is trained.

    Attributes:
        optimizer: "sgd" (with any momentum), "adam" or "adamw".
        lora_alpha: `lora_alpha` of the layers.
        lr_A: learning rate of A.
        lr_B: learning rate of B.
        eps_A: Adam's eps for A; it must scale with the gradient, or the equivalence fails where
            gradients are small.
        eps_B: Adam's eps for B.
        weight_decay_A: weight decay of A as torch's optimizer of that name defines it: added to the
            gradient ("sgd", "adam") or decoupled ("adamw").
        weight_decay_B: weight decay of B.
        alpha_A: α_A, by which the initial A is multiplied.
        alpha_B: α_B, by which the initial B is multiplied.

    """

    optimizer: str
    lora_alpha: float
    lr_A: float
    lr_B: float
    eps_A: float = 1e-8
    eps_B: float = 1e-8
    weight_decay_A: float = 0.0
    weight_decay_B: float = 0.0
    alpha_A: float = 1.0
    alpha_B: float = 1.0

    def __post_init__(self) -> None:
        if self.optimizer not in _POWERS:
            raise unknown_name("optimizer", self.optimizer, tuple(_POWERS))
        check_positive(self.alpha_A, "alpha_A")
        check_positive(self.alpha_B, "alpha_B")

    def initializer(self, init_lora_weights: str | Initializer = "loram") -> ScaledStart:
        """The `init_lora_weights` to pass to the layers: the given start, with A₀ multiplied by α_A
        and B₀ by α_B.
        """
        return ScaledStart(get_initializer(init_lora_weights), self.alpha_A, self.alpha_B)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Two parameter groups for the optimizer: the A and the B of all `LoRALinear` layers.

        Raises:
            ValueError: the model has no `LoRALinear`, or one of them trains an R, magnitudes or a
                bias of B.

        """
        reshard(model)  # after a forward, FSDP2's modules may hold gathered parameters
        layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no LoRALinear")
        if any(layer.middle() is not None for layer in layers):
            raise ValueError("a layer trains R between a frozen A and B, which cannot be rescaled")
        if any(layer.lora_magnitude is not None for layer in layers):
            raise ValueError("a layer trains magnitudes (use_dora), which belong to neither group")
        if any(layer.lora_bias is not None for layer in layers):
            raise ValueError("a layer has a bias of B, which grows with s and cannot be rescaled")
        groups = []
        for half in "AB":
            group = {
                "params": [getattr(layer, f"lora_{half}") for layer in layers],
                "lr": getattr(self, f"lr_{half}"),
                "weight_decay": getattr(self, f"weight_decay_{half}"),
            }
            if self.optimizer != "sgd":
                group["eps"] = getattr(self, f"eps_{half}")
            groups.append(group)
        return groups


def rescaled(setup: Setup, alpha_A: float, alpha_B: float) -> Setup:
    """The equivalent setup in which A is α_A times and B is α_B times as large.

    s becomes s / (α_Aα_B), so that s·BA is the same. This divides the gradient of A by α_A, while
    the steps of A must become α_A times as large. So SGD's learning rate is multiplied by α_A².
    Adam's is multiplied by α_A, because its steps do not depend on the gradient's size if eps is
    divided by α_A. Weight decay that is added to the gradient is divided by α_A²; decoupled weight
    decay is divided by α_A. The same holds for B.

    Clipping gradients by their common norm breaks the equivalence.

    Raises:
        ValueError: `alpha_A` or `alpha_B` is not positive and finite.
        TypeError: `alpha_A` or `alpha_B` is not a number.

    """
    check_positive(alpha_A, "alpha_A")
    check_positive(alpha_B, "alpha_B")
    lr, eps, decay = _POWERS[setup.optimizer]
    return replace(
        setup,
        lora_alpha=setup.lora_alpha / (alpha_A * alpha_B),
        lr_A=setup.lr_A * alpha_A**lr,
        lr_B=setup.lr_B * alpha_B**lr,
        eps_A=setup.eps_A * alpha_A**eps,
        eps_B=setup.eps_B * alpha_B**eps,
        weight_decay_A=setup.weight_decay_A * alpha_A**decay,
        weight_decay_B=setup.weight_decay_B * alpha_B**decay,
        alpha_A=setup.alpha_A * alpha_A,
        alpha_B=setup.alpha_B * alpha_B,
    )


# The attributes of an initializer that do not depend on the sizes of A and B.
_OF_START = (
    *("changes_base", "reads_weight", "needs_gradient", "needs_activations", "rewrites_base"),
    *("has_R", "has_diag", "compensates", "trains"),
)


@dataclass(frozen=True)
class ScaledStart(Initializer):
    """The initial factors of another initializer, with A₀ multiplied by α_A and B₀ by α_B.

    The other initializer is given α_Aα_B times the layer's s, so that s·B₀A₀ is the same. The
    result has no recipe, because the factors can no longer be computed from β.
    """

    start: Initializer
    alpha_A: float
    alpha_B: float

    def __post_init__(self) -> None:
        # Not fields: they follow from `start`.
        for what in _OF_START:
            object.__setattr__(self, what, getattr(self.start, what))

    @property
    def grows_with_scaling(self) -> bool:
        return self.start.grows_with_scaling

    @property
    def draws_unseeded(self) -> bool | None:
        return self.start.draws_unseeded

    @property
    def subtracts(self) -> bool:
        return not self.rewrites_base

    def make_start(self, request: StartRequest) -> Start:
        scaling = request.scaling * self.alpha_A * self.alpha_B
        start = self.start.make_starts([replace(request, scaling=scaling)])[0]
        A, B = self._scaled(start.lora_A, start.lora_B)
        taken = start.taken and self._scaled(*start.taken)
        return replace(start, lora_A=A, lora_B=B, beta=None, taken=taken)

    def _scaled(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        return lora_A * self.alpha_A, lora_B * self.alpha_B

    def layer_ranks(self, requests: Mapping[str, StartRequest]) -> dict[str, LayerRank] | None:
        return self.start.layer_ranks(requests)

    def for_embedding(self) -> Initializer:
        return replace(self, start=self.start.for_embedding())

    def toward(self, original: Callable[[], Tensor]) -> Initializer:
        return replace(self, start=self.start.toward(original))

    def take_out_(self, weight: Tensor, start: Start, scaling: float) -> None:
        """Rewrites the weight [out, in] in place: as the other initializer does if that rewrites
        the base (LoftQ), else to W − s·B₀A₀.
        """
        if not self.rewrites_base:
            return super().take_out_(weight, start, scaling)
        return self.start.take_out_(weight, start, scaling * self.alpha_A * self.alpha_B)
