"""`Task`, the interface of the study's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Batch = Any
_Item = TypeVar("_Item")


class Task:
    """A pretrained model and data that are the same for every method.

    Attributes:
        name: as in the CSV files.
        device: where the model is.
        model: in float32, in evaluation mode (no dropout), all parameters frozen.
        targets: the names of the linear layers that are adapted.
        steps, batch: optimizer steps of a run, and samples of a step.
        checks: how often the held-out part is evaluated, at equal intervals up to the end.
        metric: what `evaluate` returns beside the loss; larger is better.

    """

    name: str
    device: torch.device
    model: nn.Module
    targets: list[str]
    steps: int
    batch: int
    checks: int = 3
    metric: str

    def samples(self) -> Sequence[Any]:
        """The training samples."""
        raise NotImplementedError

    def collate(self, samples: Sequence[Any]) -> Batch:
        """One batch on the model's device."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar with gradients."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """The loss and the metric of the held-out part, without gradients."""
        raise NotImplementedError

    def batches(self, seed: int) -> Iterator[Batch]:
        """The batches of a run: epoch after epoch, in an order that depends only on the seed."""
        samples, order = self.samples(), list[int]()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            while len(order) < self.batch:
                order += torch.randperm(len(samples), generator=generator).tolist()
            yield self.collate([samples[i] for i in order[: self.batch]])
            del order[: self.batch]

    def check_steps(self) -> list[int]:
        """The steps after which the held-out part is evaluated."""
        return [self.steps * k // self.checks for k in range(1, self.checks + 1)]


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """[len(rows), longest] int64, padded with `value` on the right."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.requires_grad_(False).eval().to(device)
