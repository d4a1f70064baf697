"""`capture_gradients`: gradients of the loss by the weights, for the data-driven starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._utils.names import ALL_LINEAR
from .._utils.progress import tracked
from ..init.sharded.agree import from_every, has_ranks, together
from ..init.sharded.layout import is_dtensor
from ..model.install.sharded.fsdp import reshard
from ..model.selection import Targets, find_targets
from .gradient_sums import GradientSums

Loss = Callable[[nn.Module, Any], Tensor]


def capture_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Targets = ALL_LINEAR,
    *,
    loss: Loss | None = None,
    device: torch.device | str | None = "cpu",
    progress: bool = True,
) -> dict[str, Tensor]:
    """The sum of ∇_W L over the batches for every target, collected during the backward pass.

    Each gradient is added to its sum and freed before the backward pass reaches the next layer, so
    that the sums are the only additional memory (the technique of LoRA-GA, arXiv 2407.05000, and
    LoRA-SB, arXiv 2411.19557). Afterwards the model's `.grad`, `requires_grad` and hooks are the
    same as before, even if a batch raises. The model stays in its training or evaluation mode,
    which decides whether dropout and gradient checkpointing are active. If `torch.distributed` is
    initialized, the gradients of all ranks are summed; every rank must pass the same targets.

    The model may be sharded by FSDP2 (`fully_shard`, also with a replicated mesh dimension) or by
    tensor parallelism. Then every rank must pass the same number of batches (under tensor
    parallelism, the same batches). G is then a DTensor that is sharded as the weight is; nothing is
    gathered. `add_lora(model, config, gradients=...)` accepts it. The sums do not depend on how
    FSDP2 averages gradients.

    Args:
        model: a model not wrapped in `DistributedDataParallel`. Its weights may be frozen.
        batches: dicts with "labels", whose loss is `model(**batch).loss`, or integer tensors of
            token ids [batch, length], which are their own labels. They are moved to the model's
            device. Other batches need `loss`.
        targets: as in `lora_kernels.model.selection.find_targets`.
        loss: a function `loss(model, batch)` that returns a scalar tensor.
        device: the device of the sums: "cpu", another device, or None for the device of each
            weight.
        progress: whether to show a progress bar; this needs rich, and a terminal on standard error.

    Returns:
        G [out, in] by name, in float32, or float64 for float64 weights. G is [out, in] for a Conv1D
        too, and for an embedding, whose W is its transposed weight. A 3-D parameter of experts
        has its own name, and G is [E, out, in]. If several modules share a weight, the gradient
        covers all its uses, and all their names have the same tensor, or its transpose.

    Raises:
        ValueError: no batch; a loss that is not a scalar, not finite, or independent of the
            targets; a sum that is not finite; a target that no batch reached; unknown targets; a
            weight that is sharded by FSDP1 or ZeRO-3; different numbers of batches on the ranks.
        TypeError: a weight or a batch of the wrong type, a `DistributedDataParallel` model.
        RuntimeError: another rank failed, or `torch.inference_mode` is on.

    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode records no gradients: call this outside of it")
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model is wrapped in DistributedDataParallel: pass model.module")
    reshard(model)
    bases = find_targets(model, targets)
    sums = GradientSums(model, bases, device)
    with together(where=not sums.in_step, what="capture_gradients"):
        _run(model, sums, batches, loss or _model_loss, progress)
    sums.reduce()
    sums.check()
    return {name: sums.of(base) for name, base in bases.items()}


def _run(
    model: nn.Module, sums: GradientSums, batches: Iterable[Any], loss: Loss, progress: bool
) -> None:
    count, waits = 0, sums.in_step and has_ranks()
    batches = tracked(batches, "gradients", progress)
    with sums.collecting(), torch.enable_grad():
        for count, batch in enumerate(in_step(batches) if waits else batches, start=1):
            value = loss(model, batch)
            with together(where=waits):
                _check_loss(value, count)
            value.backward()
    if not count:
        raise ValueError("batches is empty: there is no gradient to sum")


def in_step(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, as many on every rank: the forward of a sharded model waits for all ranks.

    Raises:
        ValueError: the ranks have different numbers of batches.
        Exception: `batches` raised it on another rank.

    """
    iterator = iter(batches)
    for count in itertools.count():
        with together():
            found = list(itertools.islice(iterator, 1))
        more = from_every(bool(found))
        if not any(more):
            return
        if not all(more):
            raise ValueError(
                f"{more.count(False)} of {len(more)} ranks have only {count} batches, others have "
                "more: the model is sharded, so give all ranks the same number of batches"
            )
        yield found[0]


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The `.loss` of a Hugging Face model's output."""
    device = input_device(model)
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        if batch.dim() != 2:
            raise ValueError(
                f"a batch of token ids must be [batch, length], got {list(batch.shape)}; batches "
                "is a list of them"
            )
        ids = batch.to(device)
        batch = {"input_ids": ids, "labels": ids}
    elif isinstance(batch, Mapping):
        batch = moved_batch(batch, device)
    else:
        what = f"a {batch.dtype} tensor" if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            f"a batch is {what}; without loss=, it must be a dict with labels or a tensor of "
            "token ids"
        )
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise ValueError(
            f"{type(model).__name__} gave no .loss: put labels into the batches, or pass "
            "loss=a function of the model and a batch"
        )
    return value


def moved_batch(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def input_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs; with FSDP2, the model's parameters may be on the CPU."""
    first: Any = next(model.parameters())
    own: torch.device = first.device
    kind = first.device_mesh.device_type if is_dtensor(first) else own.type
    return own if own.type in (kind, "meta") else torch.device(kind)


def _check_loss(value: Any, count: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss of batch {count} must be a tensor of one element, got {shape}")
    if not value.requires_grad:
        raise ValueError(f"the loss of batch {count} does not depend on any target")
    if not bool(torch.isfinite(value)):
        raise ValueError(f"the loss of batch {count} is {value.item()}")
