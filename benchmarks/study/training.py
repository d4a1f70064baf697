"""One start of a method, and the runs that train from it."""

from __future__ import annotations

import copy
import itertools
import math
import time
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from benchmarks.study.cost import Cost
from benchmarks.study.methods import FULL, METHODS
from benchmarks.study.tasks.base import Task
from lora_kernels import LoRAConfig, add_lora, capture_gradients, lora_plus_groups
from lora_kernels.init import Start
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.magnitude import update_mean_square
from lora_kernels.training.rescaling.step_size import LayerSize, StepSize, start_square

WARMUP = 0.1  # of all steps, linear; then the rate falls linearly to zero
GRADIENT_BATCHES = 4  # for starts that need gradients
DIVERGED = 1.5  # times the loss of the untouched model, at any check: the run stops


@dataclass(frozen=True)
class Point:
    """What was measured after a step. `train_loss` is the mean since the last point."""

    step: int
    train_loss: float
    loss: float
    metric: float
    nu_update: float


@dataclass
class Outcome:
    """A run's points; `diverged` is true if the run was stopped before its last step."""

    points: list[Point] = field(default_factory=list)
    diverged: bool = False
    seconds: float = 0.0


class Started:
    """A model with the initial factors of one method, rank and seed.

    Attributes:
        seconds, mib: the time and memory to compute the start, gradients included.
        scaling: s, the same in all layers.
        nu_weight: ν[W] over all adapted layers together, with the initial factors.
        step_size: κ, the root mean square of the entries of ΔW after one Adam step of rate 1.
        first: the loss, the metric and ν[ΔW] before training.

    """

    def __init__(self, task: Task, method: str, r: int, seed: int) -> None:
        self.task, self.seed, self.ratio = task, seed, METHODS[method].ratio
        self.model = copy.deepcopy(task.model)
        torch.manual_seed(seed)
        with Cost(task.device) as cost:
            if method == FULL:
                for name in task.targets:
                    self.model.get_submodule(name).weight.requires_grad_(True)
            else:
                self._adapt(METHODS[method].config(r, seed, task.targets))
        self.seconds, self.mib = cost.seconds, cost.mib
        self.layers = {name: self.model.get_submodule(name) for name in task.targets}
        self.initial = [p.detach().clone() for p in self._parameters()]
        self.scaling = next((x.scaling for x in self._adapters().values()), 1.0)
        self.nu_weight = self._nu_weight()
        self.step_size = self._step_size()
        self.first = Point(0, math.nan, *task.evaluate(self.model), self._nu_update())

    def run(self, lr: float) -> Outcome:
        """Train from the start at the peak rate `lr`."""
        task, outcome, began = self.task, Outcome([self.first]), time.perf_counter()
        with torch.no_grad():
            for parameter, value in zip(self._parameters(), self.initial, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(self._groups(lr), weight_decay=0.0)
        peaks = [group["lr"] for group in optimizer.param_groups]
        losses: list[float] = []
        for step, batch in enumerate(task.batches(self.seed), start=1):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step, task.steps)
            loss = task.loss(self.model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            outcome.diverged = not math.isfinite(losses[-1])
            if step in task.check_steps() and not outcome.diverged:
                held_out, metric = task.evaluate(self.model)
                mean = sum(losses) / len(losses)
                outcome.points.append(Point(step, mean, held_out, metric, self._nu_update()))
                losses.clear()
                outcome.diverged = not held_out <= DIVERGED * self.first.loss
            if outcome.diverged:
                break
        outcome.seconds = time.perf_counter() - began
        return outcome

    def _adapt(self, config: LoRAConfig) -> None:
        gradients = None
        if config.initializer.needs_gradient:
            batches = itertools.islice(self.task.batches(self.seed), GRADIENT_BATCHES)
            gradients = capture_gradients(
                self.model,
                batches,
                self.task.targets,
                loss=self.task.loss,
                device=None,
                progress=False,
            )
        add_lora(self.model, config, gradients=gradients, progress=False)

    def _adapters(self) -> dict[str, LoRALinear]:
        return {k: own for k, own in self.layers.items() if isinstance(own, LoRALinear)}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _groups(self, lr: float) -> list[dict[str, object]]:
        if self.ratio != 1:
            return lora_plus_groups(self.model, lr, self.ratio)
        return [{"params": self._parameters(), "lr": lr}]

    def _step_size(self) -> float:
        """κ of the start, as `lora_kernels.suggest` computes it."""
        if not self._adapters():
            return 1.0
        sizes, squares = [], {}
        for name, own in self._adapters().items():
            start = Start(own.lora_A, own.lora_B, lora_R=own.middle())
            shape = (own.out_features, own.in_features)
            sizes.append(LayerSize(name, shape, own.r, own.scaling, self._entries(own)))
            squares[name] = start_square(start, own.scaling, ratio=self.ratio)
        return StepSize.of(sizes, squares).value

    def _nu_weight(self) -> float:
        adapters = self._adapters()
        each = [
            adapters[name].base_weight() if name in adapters else own.weight
            for name, own in self.layers.items()
        ]
        return sum(float(w.detach().double().square().sum()) for w in each) / self._all_entries

    def _nu_update(self) -> float:
        """ν[ΔW] over all layers together."""
        if self._adapters():
            each = [update_mean_square(own) * self._entries(own) for own in self.layers.values()]
            return sum(each) / self._all_entries
        changes = zip(self._parameters(), self.initial, strict=True)
        return sum(float((p.detach() - q).double().square().sum()) for p, q in changes) / (
            self._all_entries
        )

    @cached_property
    def _all_entries(self) -> int:
        return sum(self._entries(own) for own in self.layers.values())

    @staticmethod
    def _entries(layer: nn.Module) -> int:
        return int(layer.in_features * layer.out_features)


def schedule(step: int, steps: int) -> float:
    """The learning rate at a step from 1 to `steps`, as a share of the peak rate."""
    warmup = max(1, round(WARMUP * steps))
    return min(step / warmup, (steps - step + 1) / (steps - warmup + 1))
