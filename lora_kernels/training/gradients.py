"""`capture_gradients`: gradients of the loss by the weights, for the data-driven starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._utils.checks import check_weight, factor_dtype
from .._utils.names import ALL_LINEAR
from .._utils.progress import tracked
from ..layers.base import BaseLayer
from ..model.selection import Targets, find_targets

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
    """The sum over the batches of ∇_W L for every target, collected during the backward pass.

    Each gradient is added to its sum and freed before the backward pass reaches the next layer, so
    that the sums are the only additional memory (the technique of LoRA-GA, arXiv 2407.05000, and
    LoRA-SB, arXiv 2411.19557). Afterwards, also if a batch raises, the model's `.grad`,
    `requires_grad` and hooks are the same as before. The training mode does not change: it decides
    whether dropout and gradient checkpointing are active. If `torch.distributed` is initialized,
    the gradients of all ranks are summed; every rank must pass the same targets.

    Args:
        model: a model not wrapped in `DistributedDataParallel`. Its weights may be frozen.
        batches: dicts with "labels", whose loss is `model(**batch).loss`, or integer tensors of
            token ids [batch, length], which are their own labels. They are moved to the model's
            device. Other batches need `loss`.
        targets: as in `lora_kernels.model.selection.find_targets`.
        loss: a function `loss(model, batch)` that returns a scalar tensor.
        device: the device of the sums: "cpu", another device, or None for each weight's own.
        progress: whether to show a bar; needs rich, and a terminal as standard error.

    Returns:
        {name: G [out, in]} in float32, or float64 for float64 weights; also [out, in] for a
        Conv1D, and for an embedding, whose W is its transposed weight. A 3-D parameter of experts
        has its own name, and G is [E, out, in]. If several modules share a weight, the gradient
        covers all its uses, and all their names have the same tensor, or its transpose.

    Raises:
        ValueError: no batch; a loss that is not a scalar, not finite, or independent of the
            targets; a sum that is not finite; a target that no batch reached; unknown targets.
        TypeError: a weight or a batch of the wrong type, a `DistributedDataParallel` model.
        RuntimeError: another rank failed, or `torch.inference_mode` is on.

    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode records no gradients: call this outside of it")
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model is wrapped in DistributedDataParallel: pass model.module")
    bases = find_targets(model, targets)
    sums = _Sums(bases, device)
    if dist.is_available() and dist.is_initialized():
        with _failing_together(next(iter(sums.names)).device):
            _run(model, sums, batches, loss or _model_loss, progress)
        sums.reduce()
    else:
        _run(model, sums, batches, loss or _model_loss, progress)
    sums.check()
    return {name: sums.of(base) for name, base in bases.items()}


class _Sums:
    """The sum of the gradients of every distinct weight, and the number of gradients in it."""

    def __init__(self, bases: Mapping[str, BaseLayer], device: torch.device | str | None) -> None:
        self.names: dict[Tensor, str] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._counts: dict[Tensor, int] = {}
        self._transposed: set[Tensor] = set()
        for name, base in bases.items():
            if not base.rewritable:
                raise TypeError(
                    f"the weight of {name!r} is quantised ({base.kind}) and has no gradient: load "
                    "the model in floating point"
                )
            weight = base.stored_weight
            if not isinstance(weight, nn.Parameter) or not weight.is_leaf:
                raise TypeError(
                    f"the weight of {name!r} is computed; remove its parametrization first"
                )
            for matrix in base.matrices():
                check_weight(matrix, base.parameter_name(name))
            if type(weight.data) is not Tensor:
                raise TypeError(
                    f"{name}.weight is a {type(weight.data).__name__}: gather a sharded weight or "
                    "dequantise a quantised one first"
                )
            if weight.is_meta:
                raise ValueError(f"{name}.weight is on the meta device: load it first")
            if weight in self.names:
                continue
            if base.transposed:
                self._transposed.add(weight)
            self.names[weight] = name
            self._sums[weight] = torch.zeros(
                base.weight().shape,
                dtype=factor_dtype(weight.dtype),
                device=device or weight.device,
            )
            self._counts[weight] = 0

    def of(self, base: BaseLayer) -> Tensor:
        """The sum as [out, in] of this layer, which may be tied to one that stores Wᵀ."""
        weight = base.stored_weight
        total = self._sums[weight]
        return total if base.transposed == (weight in self._transposed) else total.mT

    def take(self, weight: Tensor) -> None:
        """Adds `weight.grad` to the sum and frees it. Called as a hook when `.grad` is complete."""
        grad, weight.grad = weight.grad, None
        if grad is None:
            return
        total = self._sums[weight]
        total.add_((grad.mT if weight in self._transposed else grad).to(total.device))
        self._counts[weight] += 1

    def reduce(self) -> None:
        """Adds the sums of all ranks, one weight at a time, on its device, as NCCL requires."""
        for weight, total in self._sums.items():
            shared = total.to(weight.device)  # [out, in]
            dist.all_reduce(shared)
            total.copy_(shared)
        counts = torch.tensor(list(self._counts.values()), device=next(iter(self._sums)).device)
        dist.all_reduce(counts)
        self._counts = dict(zip(self._counts, counts.tolist(), strict=True))

    def check(self) -> None:
        """Raises ValueError if a weight had no gradient, or its sum overflowed."""
        missed = [self.names[weight] for weight, count in self._counts.items() if not count]
        if missed:
            raise ValueError(
                f"no gradient reached {len(missed)} of {len(self.names)} targets "
                f"({', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}): the loss does not "
                "depend on them, or reentrant checkpointing cut them off (set use_reentrant=False)"
            )
        for weight, total in self._sums.items():
            if not bool(torch.isfinite(torch.ops.lora.frobenius_stats([total.flatten(1)])[0, 1])):
                raise ValueError(
                    f"the gradient of {self.names[weight]!r} holds NaN or Inf; float16 overflows "
                    "easily: run the model in bfloat16, or scale the loss down"
                )


def _run(model: nn.Module, sums: _Sums, batches: Iterable[Any], loss: Loss, progress: bool) -> None:
    count = 0
    with _only_weights_of(model, sums), torch.enable_grad():
        for count, batch in enumerate(tracked(batches, "gradients", progress), start=1):
            value = loss(model, batch)
            _check_loss(value, count)
            value.backward()
    if not count:
        raise ValueError("batches is empty: there is no gradient to sum")


@contextmanager
def _only_weights_of(model: nn.Module, sums: _Sums) -> Iterator[None]:
    """Inside the context, autograd computes gradients of the targets' weights only, and hooks add
    these to the sums.
    """
    flags = {p: p.requires_grad for p in (*model.parameters(), *sums.names)}
    grads = {weight: weight.grad for weight in sums.names}
    hooks = []
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in sums.names)
        for weight in sums.names:
            weight.grad = None
            hooks.append(weight.register_post_accumulate_grad_hook(sums.take))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, grad in grads.items():
            weight.grad = grad
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _failing_together(device: torch.device) -> Iterator[None]:
    """If one rank raises, all ranks raise; otherwise they would wait for it forever in `reduce`."""
    failed = True
    try:
        yield
        failed = False
    finally:
        count = torch.tensor(int(failed), device=device)
        dist.all_reduce(count)
    if int(count):
        raise RuntimeError(f"capture_gradients failed on {int(count)} other rank(s)")


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The `.loss` of a Hugging Face model's output."""
    device = next(model.parameters()).device
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        if batch.dim() != 2:
            raise ValueError(
                f"a batch of token ids must be [batch, length], got {list(batch.shape)}; batches "
                "is a list of them"
            )
        ids = batch.to(device)
        batch = {"input_ids": ids, "labels": ids}
    elif isinstance(batch, Mapping):
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
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


def _check_loss(value: Any, count: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss of batch {count} must be a tensor of one element, got {shape}")
    if not value.requires_grad:
        raise ValueError(f"the loss of batch {count} does not depend on any target")
    if not bool(torch.isfinite(value)):
        raise ValueError(f"the loss of batch {count} is {value.item()}")
