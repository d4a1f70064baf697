"""A model of two blocks, adapters in place, and their training, sharded or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (as everybody calls it)
from torch.utils.checkpoint import checkpoint

from lora_kernels.model.install.sharded import fsdp

WIDTH, STEPS, BATCH = 8, 5, 8
REAL = torch.float64  # of the comparisons with one process: the order of sums must not count
Adapt = Callable[[nn.Module], None]


class Factors(nn.Module):
    """A and B of an adapter."""

    def __init__(self, like: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(rank)
        self.A = nn.Parameter(torch.randn(rank, like.in_features, generator=draw, dtype=dtype))
        self.B = nn.Parameter(torch.randn(like.out_features, rank, generator=draw, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)


class Adapted(nn.Linear):
    """W x + B A x, for one adapter or more, of which the active one counts."""

    active = "one"

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.adapters[self.active](x).to(y.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 2 * WIDTH)
        self.o = nn.Linear(2 * WIDTH, WIDTH)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        return x + (
            checkpoint(self._mix, x, use_reentrant=False) if self.checkpointed else self._mix(x)
        )

    def _mix(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)))


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = REAL) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x.to(self.lm_head.weight.dtype))


def layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for block in model.blocks for layer in (block.q, block.o)]


def hang_on(layer: nn.Linear, name: str = "one", rank: int = 3, dtype: torch.dtype = REAL) -> None:
    """An adapter in place: the layer's class is exchanged, FSDP2's is kept."""
    if not isinstance(layer, Adapted):
        first = type(layer).__bases__[0]
        own = layer in fsdp.fsdp_modules(layer)
        layer.__class__ = type("FSDPAdapted", (first, Adapted), {}) if own else Adapted
        layer.adapters = nn.ModuleDict()
    layer.adapters[name] = Factors(layer, rank, dtype)


def adapt(model: nn.Module, rank: int = 3, dtype: torch.dtype = REAL) -> None:
    for layer in layers(model):
        hang_on(layer, rank=rank, dtype=dtype)
    freeze(model)


def freeze(model: nn.Module, trained: str = "one") -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"adapters.{trained}." in name)


def members(model: nn.Module, name: str = "one") -> dict[fsdp.Place, fsdp.Place]:
    return {
        (layer.adapters[name], factor): (layer, "weight")
        for layer in layers(model)
        for factor in ("A", "B")
    }


def adapt_in_place(model: nn.Module, rank: int = 3, dtype: torch.dtype = REAL) -> None:
    """What `add_lora` does with a sharded model."""
    fsdp.reshard(model)
    adapt(model, rank, dtype)
    fsdp.join(model, members(model))
    fsdp.sync_trainable(model)


def sharded(
    adapted: Adapt | None = None,
    wrap: Sequence[str] = (),
    dtype: torch.dtype = REAL,
    **options: Any,
) -> nn.Module:
    """The model, its blocks and itself sharded; `adapted` adapts it before."""
    from torch.distributed.fsdp import fully_shard

    model = Model(dtype)
    if adapted is not None:
        adapted(model)
    for name in wrap:
        fully_shard(model.get_submodule(name), **options)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def data(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """A rank's part of the batch of a step."""
    draw = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(BATCH, WIDTH, generator=draw) for _ in range(2))
    return tuple(part.chunk(world)[rank] for part in (x, y))


def loss_of(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> Tensor:
    x, y = data(step, rank, world)
    dtype = next(model.parameters()).dtype
    return F.mse_loss(model(x.to(dtype)).to(REAL), y.to(REAL))


def train(
    model: nn.Module, rank: int = 0, world: int = 1, name: str = "one", accumulate: int = 1
) -> dict[str, Tensor]:
    """The adapter after five steps of AdamW, in full, and the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(STEPS):
        for micro in range(accumulate):
            if accumulate > 1 and fsdp.is_managed(model):
                model.set_requires_gradient_sync(micro == accumulate - 1)
            loss = loss_of(model, accumulate * step + micro, rank, world)
            (loss / accumulate).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    total = torch.stack(losses)
    if world > 1:
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return {"losses": total, **factors(model, name)}


def factors(model: nn.Module, name: str = "one") -> dict[str, Tensor]:
    fsdp.reshard(model)
    return {
        f"{index}.{factor}": full(getattr(layer.adapters[name], factor))
        for index, layer in enumerate(layers(model))
        for factor in ("A", "B")
    }


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def first_step(model: nn.Module, rank: int, world: int) -> None:
    """A forward and a backward of the base, whose gradients are forgotten."""
    loss_of(model, 50, rank, world).backward()
    model.zero_grad()


def collectives(work: Callable[[], Any]) -> tuple[int, int, int]:
    """How many all-gathers, reduce-scatters and all-reduces."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        work()
    counts = {str(kind): count for kind, count in mode.get_comm_counts().items()}
    names = ("all_?gather", "reduce_?scatter", "all_?reduce")
    return tuple(sum(n for k, n in counts.items() if re.search(name, k)) for name in names)


def step_of(model: nn.Module, rank: int, world: int) -> Callable[[], None]:
    return lambda: loss_of(model, 0, rank, world).backward()
