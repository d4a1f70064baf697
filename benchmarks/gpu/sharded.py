"""The measurements by each of two processes of a sharded model, against one device.

The model is a stack of blocks x + W₂ silu(W₁ x) with bf16 weights. All processes use the same x, so
the gradients are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common.harness import Timing, Variant
from benchmarks.gpu.targets.plan import Plan
from benchmarks.gpu.timing import measure
from lora_kernels import LoRAConfig, add_lora

ONE = "one device"
BEFORE, AFTER = "FSDP2, adapted before", "FSDP2, adapted after"
TP = "tensor parallel, adapted after"
STEP_AIM = 1.05  # A and B in W's group: a step takes as long as for a model adapted before
LARGEST_ERROR = 0.1  # of a gradient in bf16; a gradient without one process's part is half off
ADD, STEP = "add_lora", "forward + backward"


class Block(nn.Module):
    """x + W₂ silu(W₁ x), [tokens, width] -> [tokens, width]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


@dataclass(frozen=True)
class Models:
    """Makes copies of the same model, in each layout."""

    device: torch.device
    plan: Plan

    def plain(self) -> nn.Sequential:
        """The model without sharding, the same on all processes."""
        torch.manual_seed(0)
        inner, width = self.plan.sharded_shape
        with self.device:
            blocks = [Block(width, inner) for _ in range(self.plan.sharded_blocks)]
        return nn.Sequential(*blocks).bfloat16()

    def fully_sharded(self, model: nn.Sequential | None = None) -> nn.Sequential:
        """The model sharded by FSDP2, on each block and on the root."""
        from torch.distributed.fsdp import fully_shard

        model = self.plain() if model is None else model
        mesh = self._mesh()
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def tensor_parallel(self) -> nn.Sequential:
        """The model under tensor parallelism: W₁ by rows, W₂ by columns."""
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        model, mesh = self.plain(), self._mesh()
        for block in model:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return model

    def adapt(self, model: nn.Sequential) -> nn.Sequential:
        """Adapt the model with LoRAM's start."""
        add_lora(model, LoRAConfig(r=self.plan.sharded_rank), progress=False)
        return model

    def _mesh(self) -> object:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (dist.get_world_size(),))


def measured(device: torch.device, plan: Plan) -> list[dict[str, object]]:
    """The rows of sharded.csv. All processes must call this, each with its own device."""
    models = Models(device, plan)
    return [*_starts(models), *_steps(models)]


def _starts(models: Models) -> list[dict[str, object]]:
    """The time of `add_lora`, and how many entries of W, A and B have different bits than on one
    device.
    """
    layouts: dict[str, Callable[[], nn.Sequential]] = {
        ONE: models.plain,
        AFTER: models.fully_sharded,
        TP: models.tensor_parallel,
    }

    def ready(make: Callable[[], nn.Sequential]) -> nn.Sequential:
        model = make()
        dist.barrier()
        return model

    table = {name: Variant(models.adapt, partial(ready, make)) for name, make in layouts.items()}
    timings = measure(models.device, table, rounds=models.plan.grid_rounds)
    expected = dict(models.adapt(models.plain()).named_parameters())
    rows = []
    for timing in timings:
        differing = "" if timing.failure else _differing(models, layouts[timing.name], expected)
        rows.append({"what": ADD, **timing.row(), "differing": differing})
    return rows


@torch.no_grad()
def _differing(
    models: Models, make: Callable[[], nn.Sequential], expected: dict[str, Tensor]
) -> int:
    found = dict(models.adapt(make()).named_parameters())
    if found.keys() != expected.keys():
        raise RuntimeError(f"other parameters: {sorted(found.keys() ^ expected.keys())}")
    return sum(int((whole(found[name]) != expected[name]).sum()) for name in expected)


def _steps(models: Models) -> list[dict[str, object]]:
    """The time of a forward and a backward, and the largest relative error of a factor's gradient
    (in its norm) against one device.
    """
    plan, device = models.plan, models.device
    one = models.adapt(models.plain())
    before = models.fully_sharded(models.adapt(models.plain()))
    after = models.adapt(models.fully_sharded())
    tensor_parallel = models.adapt(models.tensor_parallel())
    torch.manual_seed(1)
    shape = plan.sharded_tokens, plan.sharded_shape[1]
    x, dy = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))

    def step(model: nn.Sequential) -> None:
        model.zero_grad()
        model(x).backward(dy)

    rows = []
    wanted: dict[str, Tensor] = {}
    for table in ({BEFORE: before, AFTER: after}, {ONE: one, TP: tensor_parallel}):
        if not wanted:
            step(one)
            wanted = gradients(one)
        variants = {name: Variant(partial(step, model)) for name, model in table.items()}
        for timing in measure(device, variants, rounds=plan.rounds):
            rows.append({"what": STEP, **timing.row(), **_error(timing, table, wanted)})
    return rows


def _error(
    timing: Timing, table: dict[str, nn.Sequential], wanted: dict[str, Tensor]
) -> dict[str, object]:
    if timing.failure:
        return {}
    found = gradients(table[timing.name])
    error = max(float((found[n] - g).norm() / g.norm()) for n, g in wanted.items())
    return {"gradient_error": error, "aim": STEP_AIM if timing.name == AFTER else ""}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the factors, gathered."""
    pairs = ((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
    return {name: whole(grad).float() for name, grad in pairs if grad is not None}


def whole(tensor: Tensor) -> Tensor:
    """A copy, gathered if the tensor is sharded; all processes must call this."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()
