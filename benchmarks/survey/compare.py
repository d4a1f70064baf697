"""How far outputs and weights are from the expected ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .families import outputs

TOLERANCE = 1e-4  # of the largest value


def difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of the same tensor.

    If the values of a tensor are below a hundredth of the largest value of all tensors, that
    hundredth replaces the tensor's largest value.
    """
    if [t.shape for t in got] != [t.shape for t in expected]:
        return math.inf
    largest = max((_largest(t) for t in expected), default=0.0)
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if not torch.equal(a.isfinite(), b.isfinite()):
            return math.inf
        scale = max(_largest(b), largest / 100, 1e-30)
        worst = max(worst, _largest(a.double() - b.double()) / scale)
    return worst


def _largest(tensor: Tensor) -> float:
    if tensor.numel() == 0:
        return 0.0
    return float(tensor.detach().double().nan_to_num(0, 0, 0).abs().max())


def floating_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating-point parameters and buffers that belong to the model's files."""
    state = model.state_dict()
    return {n: t.detach().clone() for n, t in state.items() if t.is_floating_point()}


def differing_weight(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The number of weights that are missing or differ, and the name of one of them; None if all
    agree.
    """
    wrong = [
        name
        for name, tensor in expected.items()
        if name not in got or difference([got[name]], [tensor]) > TOLERANCE
    ]
    return f"{len(wrong)} weights, such as {wrong[0]}" if wrong else None


@torch.no_grad()
def sensitivity(
    load: Callable[[], nn.Module], inputs: dict[str, object], expected: Sequence[Tensor]
) -> float:
    """How far rounding moves the outputs: the largest effect of a relative change of 1e-6 in the
    weights.

    The effect is large where a model makes a choice, for example of an expert.
    """
    worst = 0.0
    for seed in range(3):
        model = load()
        disturb(model, seed)
        worst = max(worst, difference(outputs(model, inputs), expected))
    return worst


def disturb(model: nn.Module, seed: int) -> None:
    """Changes every weight by a relative amount of about 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
