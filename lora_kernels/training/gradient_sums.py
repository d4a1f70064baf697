"""`GradientSums`: the sums that `capture_gradients` returns, of plain and of sharded weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from .._utils.checks import check_weight, factor_dtype
from ..init.sharded.agree import has_ranks
from ..init.sharded.layout import Shards, is_dtensor, is_flattened, is_sharded, local_part
from ..init.sharded.sums import sums_of
from ..init.sharded.zero3 import is_zero3
from ..layers.base import BaseLayer
from ..model.install.sharded.fsdp import summed_gradients, sync_trainable, unsharded_layouts


class GradientSums:
    """For every distinct weight, the sum of its gradients and their number.

    The sum for a sharded weight is a DTensor that is sharded as the weight is.
    """

    def __init__(
        self, model: nn.Module, bases: Mapping[str, BaseLayer], device: torch.device | str | None
    ) -> None:
        self._model = model
        self._copies = ranks_with_one_batch(model)
        self._names: dict[Tensor, str] = {}
        self._sums: dict[Tensor, Tensor] = {}  # [out, in]
        self._counts: dict[Tensor, int] = {}
        self._divisors: dict[Tensor, float] = {}  # of the weights that FSDP2 manages
        self._bases: dict[Tensor, BaseLayer] = {}
        for name, base in bases.items():
            weight = _checked_weight(name, base)
            if weight in self._names:
                continue
            self._names[weight], self._bases[weight], self._counts[weight] = name, base, 0
            self._sums[weight] = torch.zeros_like(
                base.weight(),
                dtype=factor_dtype(weight.dtype),
                device=device,
                memory_format=torch.contiguous_format,
            )

    @property
    def in_step(self) -> bool:
        """Whether a forward or backward of one process waits for the others."""
        return any(map(is_sharded, self._model.parameters()))

    def of(self, base: BaseLayer) -> Tensor:
        """The sum as [out, in] of this layer, which may be tied to one that stores Wᵀ."""
        weight = base.stored_weight
        total = self._sums[weight]
        return total if base.transposed == self._bases[weight].transposed else total.mT

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the context, autograd computes gradients only for the targets' weights, and hooks
        add these to the sums. Afterwards the model is as before.

        Raises:
            ValueError: FSDP2 cannot reduce the gradients of these weights together.

        """
        flags = {p: p.requires_grad for p in (*self._model.parameters(), *self._names)}
        grads = {weight: weight.grad for weight in self._names}
        hooks = []
        done = False
        try:
            for parameter in flags:
                parameter.requires_grad_(parameter in self._names)
            for weight in self._names:
                weight.grad = None
                hooks.append(weight.register_post_accumulate_grad_hook(self._take))
            with summed_gradients(self._model) as divisors:
                self._divisors = self._of_weights(divisors)
                yield
            done = True
        finally:
            for hook in hooks:
                hook.remove()
            for weight, grad in grads.items():
                weight.grad = grad
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            # Before torch 2.13, FSDP2 raises here after an error has interrupted a forward.
            with nullcontext() if done else suppress(RuntimeError):
                sync_trainable(self._model, mixed=True)

    def reduce(self) -> None:
        """Adds up the sums of all processes. FSDP2 has already added up those of its weights, and
        divided them; tensor parallelism has one batch on all processes. The sums of other weights
        are added up one at a time, on the weight's device.
        """
        for weight, total in self._sums.items():
            if weight in self._divisors:
                local_part(total).mul_(self._divisors[weight])
            elif has_ranks() and not is_dtensor(weight):
                total.copy_(self._added(total.to(weight.device)))
        if has_ranks():
            device = local_part(next(iter(self._sums))).device
            counts = self._added(torch.tensor([*self._counts.values()], device=device))
            self._counts = dict(zip(self._counts, counts.tolist(), strict=True))

    def check(self) -> None:
        """Raises ValueError if a weight had no gradient, or its sum overflowed."""
        missed = [self._names[weight] for weight, count in self._counts.items() if not count]
        if missed:
            raise ValueError(
                f"no gradient reached {len(missed)} of {len(self._names)} targets "
                f"({', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}): the loss does not "
                "depend on them, or reentrant checkpointing cut them off (set use_reentrant=False)"
            )
        found = sums_of([Shards.of(total) for total in self._sums.values()])
        for name, sums in zip(self._names.values(), found, strict=True):
            if not bool(torch.isfinite(sums).all()):
                raise ValueError(
                    f"the gradient of {name!r} holds NaN or Inf; float16 overflows easily: run the "
                    "model in bfloat16, or scale the loss down"
                )

    def _take(self, weight: Tensor) -> None:
        """Adds `weight.grad` to the sum and frees it. Called as a hook when `.grad` is complete."""
        grad, weight.grad = weight.grad, None
        if grad is None:
            return
        if is_dtensor(weight):  # under tensor parallelism, the gradient may be a partial sum
            grad = grad.redistribute(placements=weight.placements)  # type: ignore[attr-defined]
        total = local_part(self._sums[weight])
        transposed = self._bases[weight].transposed
        own = local_part(grad.mT if transposed else grad)
        total.add_(own.reshape(total.shape).to(total.device))  # flattens a convolution's gradient
        self._counts[weight] += 1

    def _of_weights(self, divisors: Mapping[tuple[nn.Module, str], float]) -> dict[Tensor, float]:
        """FSDP2's divisors by weight.

        Raises:
            ValueError: a weight's mesh does not contain all processes.

        """
        import torch.distributed as dist

        found = {w: divisors[b.place] for w, b in self._bases.items() if b.place in divisors}
        for weight, name in self._names.items():
            if weight in found or not is_dtensor(weight):
                continue
            size = weight.device_mesh.size()  # type: ignore[attr-defined]
            if size != dist.get_world_size():
                raise ValueError(
                    f"the weight of {name!r} is a DTensor over {size} of {dist.get_world_size()} "
                    "processes, and nothing adds the gradients of the others: apply fully_shard "
                    "over the data-parallel mesh, or capture the gradients on these processes alone"
                )
        return found

    def _added(self, own: Tensor) -> Tensor:
        """The sum over all processes, each batch counted once."""
        import torch.distributed as dist

        dist.all_reduce(own)
        return own.div_(self._copies) if own.is_floating_point() else own


def _checked_weight(name: str, base: BaseLayer) -> Tensor:
    """The weight as it is stored; raises TypeError or ValueError if it can have no gradient."""
    if not base.rewritable:
        raise TypeError(
            f"the weight of {name!r} is quantized ({base.kind}) and has no gradient: load the "
            "model in floating point"
        )
    weight = base.stored_weight
    if is_zero3(weight):
        raise ValueError(
            f"the weight of {name!r} is managed by DeepSpeed's ZeRO-3, which reduces gradients by "
            "itself: capture the gradients before deepspeed.initialize and outside of zero.Init"
        )
    own = base.layer._parameters.get("weight", weight)
    if own is None or is_flattened(weight):
        raise ValueError(
            f"the weight of {name!r} is part of a flat parameter of FSDP: capture the gradients "
            "before the model is wrapped, or shard it by fully_shard"
        )
    if not isinstance(weight, nn.Parameter) or not weight.is_leaf:
        raise TypeError(f"the weight of {name!r} is computed; remove its parametrization first")
    if not is_sharded(weight):
        for matrix in base.matrices():
            check_weight(matrix, base.parameter_name(name))
        if type(weight.data) is not Tensor:
            raise TypeError(
                f"{name}.weight is a {type(weight.data).__name__}: dequantize a quantized one first"
            )
    if weight.is_meta:
        raise ValueError(f"{name}.weight is on the meta device: load it first")
    return weight


def ranks_with_one_batch(model: nn.Module) -> int:
    """How many processes compute with one batch: those of a mesh of tensor parallelism."""
    layouts = unsharded_layouts(model)
    sizes = {layout.mesh.size() for layout in layouts.values() if layout is not None}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (module, name) not in layouts and is_dtensor(parameter):
                sizes.add(parameter.device_mesh.size())  # type: ignore[attr-defined]
    return max(sizes, default=1)
