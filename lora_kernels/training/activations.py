"""`capture_activations`: statistics of layers' inputs, for starts that are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._utils.checks import as_integer
from .._utils.names import ALL_LINEAR
from .._utils.progress import tracked
from ..init import Activations
from ..init.data_driven.inputs import InputSums
from ..init.sharded.agree import has_ranks, together
from ..init.sharded.layout import is_sharded
from ..layers.base import BaseLayer
from ..layers.kinds import NAMED_KINDS
from ..model.install.sharded.fsdp import reshard
from ..model.selection import Targets, find_targets
from .gradient_sums import ranks_with_one_batch
from .gradients import in_step, input_device, moved_batch

Forward = Callable[[nn.Module, Any], Any]
_IGNORED = -100  # the label of positions that have no loss
# bitsandbytes' 4-bit layers pack their weight in evaluation mode if this is True.
_PACKS = "support_avx512bf16_for_cpu"


def capture_activations(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Targets = ALL_LINEAR,
    *,
    forward: Forward | None = None,
    sketch: int | None = None,
    use_attention_mask: bool = True,
    use_label_mask: bool = False,
    device: torch.device | str | None = "cpu",
    progress: bool = True,
) -> dict[str, Activations]:
    """Collects sums over all inputs x of every target in the forward: their number, Σ x and Σ xᵀx.

    Layers that get the same tensor, such as q, k and v, share one object, and each input is added
    once. However many batches there are, a target needs [in, in] float32 numbers (float64 for a
    float64 input), or [2 · `sketch`, in] with a sketch. The model runs in evaluation mode without
    gradients. Afterwards its modes and hooks are the same as before, even if a batch raises.

    If `torch.distributed` is initialized, the sums of all ranks are added; every rank must pass the
    same targets. The model may be sharded by FSDP2 (`fully_shard`) or by tensor parallelism. Then
    every rank must pass the same number of batches (under tensor parallelism, the same batches). An
    input that tensor parallelism has sharded raises ValueError.

    If a batch has an "attention_mask" [batch, length], positions where the mask is 0 are left out
    of inputs [batch, length, in] and [batch · length, in]. Inputs of other sizes are used in full,
    such as pooled inputs, and inputs that a mixture of experts has sorted by expert.

    Args:
        model: a model not wrapped in `DistributedDataParallel`; it may have quantized layers.
        batches: dicts, for `model(**batch)`, or tensors, for `model(batch)`. They are moved to the
            model's device. Other batches need `forward`.
        targets: as in `lora_kernels.model.selection.find_targets`. Embeddings, convolutions,
            `nn.MultiheadAttention` and the 3-D parameters of experts have no such inputs.
        forward: a function `forward(model, batch)` that runs the model.
        sketch: the number of rows of a `FrequentDirections` sketch that replaces Σ xᵀx. Only EVA
            and QERA(exact=False) can start from a sketch.
        use_attention_mask: whether to leave padding out.
        use_label_mask: whether to leave out the positions where "labels" [batch, length] is -100
            too, as PEFT's EVA does by default.
        device: the device of the sums: "cpu", another device, or None for the device of each input.
        progress: whether to show a progress bar; this needs rich, and a terminal on standard error.

    Returns:
        `Activations` by name; all names of a layer have the same object.

    Raises:
        ValueError: no batch; an input that is sharded or not finite; a target that no batch
            reached; a mask of another shape; unknown targets; different numbers of batches on the
            ranks.
        TypeError: a target that has no such inputs, a batch of the wrong type, or a
            `DistributedDataParallel` model.
        RuntimeError: another rank failed.

    """
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model is wrapped in DistributedDataParallel: pass model.module")
    if sketch is not None:
        sketch = as_integer(sketch, "sketch", minimum=1)
    reshard(model)
    bases = find_targets(model, targets)
    for name, base in bases.items():
        _check_target(name, base)
    together_in_step = any(map(is_sharded, model.parameters()))
    layers = {name: (base.module, base.shape[1]) for name, base in bases.items()}
    sums = InputSums(layers, sketch, device)
    masks = _Masks(model, use_attention_mask, use_label_mask)
    with together(where=not together_in_step, what="capture_activations"):
        _run(model, sums, batches, forward or _forward, masks, together_in_step, progress)
    if has_ranks():
        sums.reduce(ranks_with_one_batch(model), input_device(model))
    return sums.results()


def _run(
    model: nn.Module,
    sums: InputSums,
    batches: Iterable[Any],
    forward: Forward,
    masks: _Masks,
    sharded: bool,
    progress: bool,
) -> None:
    count = 0
    batches = tracked(batches, "activations", progress)
    waits = sharded and has_ranks()
    stepped = in_step(batches) if waits else batches
    # Inference-mode tensors have no version counter, which shows changes in place. Compiled modules
    # do not call hooks that were added after they were compiled.
    modes = torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager")
    with modes[0], modes[1], modes[2], _evaluating(model), sums.collecting():
        try:
            for batch in stepped:
                count += 1
                with together(where=waits):
                    sums.mask = masks.of(batch)
                forward(model, batch)
                sums.settle()
        finally:
            _reshard_if_possible(model)
    if not count:
        raise ValueError("batches is empty: there is no input to measure")


def _reshard_if_possible(model: nn.Module) -> None:
    """Makes FSDP2 hold the shards again, unless an error has interrupted a forward."""
    with suppress(RuntimeError):
        reshard(model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the context, all modules are in evaluation mode, and 4-bit layers do not pack their
    weights (see `keep_unpacked`).
    """
    names = ("training", _PACKS)
    before = [(m, n, getattr(m, n)) for m in model.modules() for n in names if n in vars(m)]
    try:
        model.eval()
        for module, name, _ in before:
            if name == _PACKS:
                setattr(module, name, False)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _forward(model: nn.Module, batch: Any) -> Any:
    device = input_device(model)
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    if isinstance(batch, Mapping):
        return model(**moved_batch(batch, device))
    raise TypeError(
        f"a batch is {type(batch).__name__}; without forward=, it must be a dict or a tensor"
    )


class _Masks:
    """Which positions of a batch are inputs."""

    def __init__(self, model: nn.Module, attention: bool, labels: bool) -> None:
        config = getattr(model, "config", None)
        self._has_two = bool(getattr(config, "is_encoder_decoder", False))
        self._attention, self._labels = attention, labels

    def of(self, batch: Any) -> Tensor | None:
        """A bool mask [batch, length], True for inputs; None if all positions are inputs."""
        if not isinstance(batch, Mapping):
            return None
        mask = self._found(batch, "attention_mask", 0) if self._attention else None
        labels = self._found(batch, "labels", _IGNORED) if self._labels else None
        if mask is None or labels is None:
            return labels if mask is None else mask
        if mask.shape != labels.shape:
            raise ValueError(
                f"attention_mask is {list(mask.shape)} and labels are {list(labels.shape)}: one "
                "does not mask the other"
            )
        return mask & labels

    def _found(self, batch: Mapping[str, Any], key: str, left_out: int) -> Tensor | None:
        found = batch.get(key)
        if found is None:
            return None
        mask = found != left_out
        if bool(mask.all()):
            return None
        if self._has_two:
            raise ValueError(
                f"{key} masks positions, but not the same ones of encoder and decoder: give "
                "batches without padding, or switch the mask off"
            )
        if mask.dim() != 2:
            raise ValueError(
                f"{key} is {list(mask.shape)}, not [batch, length]: switch the mask off with "
                "use_attention_mask=False or use_label_mask=False, or give forward= batches that "
                "are no dicts"
            )
        return mask


def _check_target(name: str, base: BaseLayer) -> None:
    """Raises TypeError if the layer is not called with rows x in order to compute x Wᵀ."""
    if base.num_experts is not None:
        raise TypeError(
            f"{name!r} holds experts: nothing measures the inputs of each; take linear layers"
        )
    if base.kind in NAMED_KINDS:
        raise TypeError(
            f"{name!r} is {type(base.module).__name__}, which has no inputs x of x Wᵀ: take linear "
            "layers"
        )
