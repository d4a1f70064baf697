"""EVA: A from the principal axes of the layer's inputs, and ranks by their explained variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils.checks import check_number
from ..base import LayerRank, register_initializer
from ..start import Start, StartRequest
from .activations import Activations, FromActivations, measured

_NOTHING = 1e-14  # variances below this share count as zero in float64


@dataclass(frozen=True)
class EVA(FromActivations):
    """A = the first r principal axes of the layer's inputs, B = 0. Ranks are redistributed among
    the layers of a model.

    Paischer et al., arXiv 2410.07170; PEFT's `eva.py` and the authors' code, which agree. The axes
    are those of the inputs minus their mean. W does not change, and the layer starts as its base.

    `add_lora` computes the explained variance ratios of the first ⌊ρr⌉ axes of every layer (ρ =
    `rho`): σ²_k over the variance of all directions. Each of the Σr largest ratios of all layers
    gives its layer one rank; a layer that gets none is not adapted. Ties go to the layer that comes
    first. If `adjust_scaling_factors`, a layer's `lora_alpha` is multiplied by its new rank over
    its old one. Layers that share an input compete with the same number of axes, that of the
    largest r among them, as in PEFT.

    `whiten` divides each axis by √σ, as both codes do, where σ is the singular value of the N
    inputs minus their mean: A becomes smaller with more inputs.

    Two differences from PEFT: the axes are those of all inputs, whereas PEFT stops when its
    incremental estimate settles (cosine > 0.99); and no rank exceeds min(n, m). PEFT also leaves
    out inputs at positions whose label is -100, as `capture_activations` does with
    `use_label_mask=True`.

    Cost: an SVD of [m, m] for every distinct input. A sketch suffices. ValueError if N ≤ r, or if
    the inputs do not vary.
    """

    rho: float = 2.0
    whiten: bool = False
    adjust_scaling_factors: bool = True
    changes_base = False

    def __post_init__(self) -> None:
        check_number(self.rho, "rho")
        if not 1 <= self.rho < float("inf"):
            raise ValueError(f"rho must be at least 1 and finite, got {self.rho}")
        for name in ("whiten", "adjust_scaling_factors"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), r = request.shape, request.r
        axes, values = _axes(request, r)
        if self.whiten:
            if float(values[-1]) <= _NOTHING * float(values[0]):
                raise ValueError(
                    f"the inputs vary in less than r = {r} directions, and EVA divides by the "
                    "variance of each: take a smaller rank, or whiten=False"
                )
            axes = axes / values[:, None] ** 0.25
        lora_A = request.empty(r, cols).copy_(axes)
        return Start(lora_A, request.empty(rows, r).zero_())

    def layer_ranks(self, requests: Mapping[str, StartRequest]) -> dict[str, LayerRank]:
        most: dict[int, int] = {}  # keyed by the input: layers that share one have the same number
        for request in requests.values():
            key, own = id(request.activations), round(self.rho * request.r)
            most[key] = max(own, most.get(key, 0))
        shares: list[Tensor] = []
        owners: list[str] = []
        for name, request in requests.items():
            try:
                found = self._shares(request, most[id(request.activations)])
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
            shares.append(found)
            owners += [name] * len(found)
        budget = sum(request.r for request in requests.values())
        order = torch.cat(shares).sort(descending=True, stable=True).indices[:budget]
        ranks = dict.fromkeys(requests, 0)
        for index in order.tolist():
            ranks[owners[index]] += 1
        return {name: self._rank(requests[name].r, r) for name, r in ranks.items()}

    def _shares(self, request: StartRequest, most: int) -> Tensor:
        """The explained variance ratios of at most `most` axes of a layer."""
        found = measured(request, "EVA", needs_gram=False)
        most = min(most, *request.shape, max(found.count - 1, request.r))
        if found.sketch is not None:
            most = min(most, max(len(found.sketch), request.r))
        return (_axes(request, most)[1] / found.variance()).cpu()

    def _rank(self, before: int, after: int) -> LayerRank:
        return LayerRank(after, after / before if self.adjust_scaling_factors else 1.0)


def _axes(request: StartRequest, r: int) -> tuple[Tensor, Tensor]:
    """The first r axes of the inputs and the variance along each."""
    found: Activations = measured(request, "EVA", needs_gram=False)
    if found.count <= r:
        raise ValueError(
            f"activations are of {found.count} inputs, which have less than r = {r} principal "
            "axes: capture more of them"
        )
    axes, values = found.axes(r)
    if not float(values[0]) > _NOTHING * float(found.squares.double().sum()):
        raise ValueError(
            "the inputs of the layer are all alike, so they have no principal axes: capture other "
            "batches, or leave the layer out"
        )
    return axes, values


register_initializer("eva", EVA)
