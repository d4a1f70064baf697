"""`suggest`: a learning rate and an s for a start on a model; the model does not change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.checks import as_integer, check_positive
from ..._utils.errors import unknown_name
from ..._utils.progress import tracked
from ...init import Initializer
from ...layers.base import BaseLayer
from ...layers.kinds import EMBEDDING
from ...model.config import LoRAConfig
from ...model.install.record import ModelAdapters, check_model, check_weights, record_of
from ...model.install.sharded.fsdp import reshard
from ...model.originals import OriginalWeights
from ...model.plan import LayerPlan, plan_layers, plan_starts
from ...model.report import listed
from ...model.selection import select_layers, with_task_head, with_ties
from ...model.selection.tied import tied_modules
from ...model.starts import first_rank_loads
from ...model.starts.ranks import redistributed
from .scaling import with_scaling
from .step_size import LAYERS, LayerSize, StepSize, is_slow, moving, sampled, start_square
from .suggestion import Suggestion, make_suggestion, reference_text

OPTIMIZERS = ("adamw", "adam")
_BATCH = 8  # layers whose factors are in memory at a time


def suggest(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    reference: tuple[LoRAConfig, float] | None = None,
    optimizer: str = "adamw",
    ratio: float = 1.0,
    layers: int | None = LAYERS,
    gradients: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Any] | None = None,
    original_weights: Mapping[str, Tensor] | str | Path | None = None,
    progress: bool = True,
) -> Suggestion:
    """Suggests a learning rate for a start, from how far a step of Adam moves W, and an s if none
    is set.

    Near its start, one step of Adam at the rate η changes W by a matrix whose entries have the root
    mean square η·κ, where κ² = s² · `adam_growth(A₀, B₀)`, if the signs of the gradients are
    independent of each other. κ² of a model is the mean over its layers, weighted by their numbers
    of entries. By propositions 1 and 2 of LoRAM (arXiv 2507.06558), the updates of setups with
    equal η·κ grow alike. So the best rate is about c / κ, where c is one setup's best rate times
    its κ. Training W itself has κ = 1. This κ is the one after the first step, which moves A and B
    too: it differs from the κ of the start if the factors are not large beside the rate.

    The initial factors are those that `add_lora` would compute, one group of layers after another.
    The model and torch's random generators do not change.

    Args:
        model: a model that `add_lora` would adapt, without adapters and not sharded.
        config: how to adapt the model; None means `LoRAConfig()`. If `lora_alpha` is None, a value
            is proposed. If the configuration also names no rule for s, the rule "rslora" is
            proposed for a start with s·BA = 0. See `Suggestion.config`.
        reference: (a configuration, its best learning rate) on this model, with one rate for A and
            B; None takes c from the study, `lora_kernels.rescaling.STUDY`.
        optimizer: "adamw" or "adam".
        ratio: B's learning rate divided by A's (LoRA+, `lora_plus_groups`).
        layers: on how many layers of each kind, such as all q_proj, to compute a start that reads
            the entries of W (PiSSA's SVD ...), gradients or activations. The layers are evenly
            spaced; None means all layers. Other starts are always computed on all layers.
        gradients: as for `add_lora`, for starts that are computed from gradients.
        activations: as for `add_lora`, for starts that are computed from activations.
        original_weights: as for `add_lora`, for LoftQ and QERA on a quantized model.
        progress: whether to show a progress bar; this needs rich, and a terminal on standard error.

    Returns:
        The suggestion. `print` shows it; `add_lora(model, suggestion.config)` uses it.

    Raises:
        ValueError: another optimizer; a value out of range; a model that has adapters, is sharded
            or is on the meta device; a configuration that adapts only embeddings; and as
            `add_lora`.
        TypeError: an argument of the wrong type, and as `add_lora`.

    """
    if optimizer not in OPTIMIZERS:
        raise _refused(optimizer)
    check_positive(ratio, "ratio")
    layers = None if layers is None else as_integer(layers, "layers", minimum=1)
    config = LoRAConfig() if config is None else config
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    _check_reference(reference)
    _check_base(model)
    config, why = with_scaling(config)
    data = _Data(gradients, activations, original_weights)
    starts = [config.initializer, *([] if reference is None else [reference[0].initializer])]

    def measured(of: LoRAConfig, ratio: float) -> tuple[StepSize, tuple[str, ...]]:
        return _step_size(model, of, data.share(of.initializer, starts), ratio, layers, progress)

    product, text = None, ""
    if reference is not None:
        step, _ = measured(reference[0], 1.0)
        product = step.product(reference[1])
        text = reference_text(reference[0], step, reference[1])
    step, notes = measured(config, ratio)
    notes = (why, *notes) if why else notes
    return make_suggestion(config, step, product=product, reference=text, ratio=ratio, notes=notes)


def _refused(optimizer: object) -> ValueError:
    if optimizer == "sgd":
        return ValueError(
            "optimizer 'sgd' is not supported: κ is the size of Adam's steps, which do not depend "
            "on the gradients' sizes, and SGD's do; lora_kernels.rescaling.rescaled carries SGD's "
            "rates from one s to another"
        )
    return unknown_name("optimizer", optimizer, OPTIMIZERS)


def _check_reference(reference: object) -> None:
    if reference is None:
        return
    if not isinstance(reference, tuple) or len(reference) != 2:
        raise TypeError(
            "reference must be a tuple of a LoRAConfig and the learning rate at which it trains "
            f"well, got {reference!r}"
        )
    if not isinstance(reference[0], LoRAConfig):
        raise TypeError(
            f"reference[0] must be a LoRAConfig, got {type(reference[0]).__name__}; the learning "
            "rate comes second"
        )
    check_positive(reference[1], "the learning rate of reference")


def _check_base(model: nn.Module) -> None:
    """Raises unless the model can be adapted and has no adapters yet."""
    if hasattr(model, "peft_config"):
        raise TypeError("this model has PEFT's adapters: call suggest before get_peft_model")
    check_model(model)
    reshard(model)
    record = record_of(model)
    if record is not None:
        raise ValueError(
            f"this model has adapters ({', '.join(record.configs)}), and a start is measured on "
            "the base: call suggest before add_lora, or after unload_lora"
        )


@dataclass(frozen=True)
class _Data:
    """Data that some starts are computed from."""

    gradients: Mapping[str, Tensor] | None
    activations: Mapping[str, Any] | None
    originals: Mapping[str, Tensor] | str | Path | None

    def share(self, initializer: Initializer, starts: Sequence[Initializer]) -> _Data:
        """The data for `initializer`, without what only others of the `starts` need."""

        def is_for(need: str) -> bool:
            others = any(getattr(other, need) for other in starts)
            return getattr(initializer, need) or not others

        return _Data(
            self.gradients if is_for("needs_gradient") else None,
            self.activations if is_for("needs_activations") else None,
            self.originals if is_for("compensates") else None,
        )


def _step_size(
    model: nn.Module,
    config: LoRAConfig,
    data: _Data,
    ratio: float,
    limit: int | None,
    progress: bool,
) -> tuple[StepSize, tuple[str, ...]]:
    """κ of the adapters that `add_lora` would add, and notes on layers that κ leaves out."""
    plans, left = _plans(model, config, data)
    sizes = {plan.name: _size(plan) for plan in plans}
    initializer = config.initializer
    limit = limit if is_slow(initializer) else None
    names = {size.name for size in sampled(list(sizes.values()), limit)}
    chosen = sorted((p for p in plans if p.name in names), key=lambda p: str(sizes[p.name].kind))
    batches = [chosen[k : k + _BATCH] for k in range(0, len(chosen), _BATCH)]
    squares: dict[str, float] = {}
    with torch.no_grad(), _generators_kept(plan.base.device for plan in chosen):
        for batch in tracked(batches, "step sizes", progress):
            plan_starts(batch, initializer, data.gradients, False, data.activations)
            for plan in batch:
                options = plan.options
                squares[plan.name] = start_square(
                    plan.computed_start(),
                    options.scaling,
                    trains=options.trains,
                    ratio=ratio,
                    parts=options.parts,
                )
                plan.start = None
    step = StepSize.of(list(sizes.values()), squares, moving(initializer, ratio))
    if not left:
        return step, ()
    return step, (f"Not in κ: {listed(left)}. Of an embedding, only the tokens that occur move.",)


def _plans(model: nn.Module, config: LoRAConfig, data: _Data) -> tuple[list[LayerPlan], list[str]]:
    """The plans of `add_lora`, and the names of layers without a plan here: embeddings, and layers
    that are adapted as one with an embedding.
    """
    config = with_ties(model, with_task_head(model, config))
    selection = select_layers(model, config)
    config, selection = redistributed(config, selection, data.activations)
    _refuse_sharded(selection.layers)
    originals = None if data.originals is None else OriginalWeights(data.originals)
    plans = plan_layers(model, selection, config, originals)
    waiting = next((plan.name for plan in plans if plan.waits), None)
    if waiting is not None:
        raise ValueError(
            f"{waiting} is on the meta device: call suggest once the weights are loaded"
        )
    check_weights(model, plans, ModelAdapters())
    tied = list(tied_modules(model).values()) if config.ensure_weight_tying else []
    left = [
        plan.name
        for plan in plans
        if plan.base.kind == EMBEDDING or any(plan.base.module is module for module in tied)
    ]
    if len(left) == len(plans):
        raise ValueError(
            f"only embeddings are adapted ({listed(left)}), of which only tokens that occur move: "
            "no learning rate follows from their start"
        )
    return [plan for plan in plans if plan.name not in left], left


def _refuse_sharded(bases: Mapping[str, BaseLayer]) -> None:
    """Raises ValueError if this process does not have the whole weights."""
    sharded = next((name for name, base in bases.items() if base.sharded), None)
    if sharded is not None:
        raise ValueError(f"{sharded} is sharded: call suggest before the model is sharded")
    if first_rank_loads(bases.values()):
        raise ValueError(
            "only the first process has the weights (FSDP_CPU_RAM_EFFICIENT_LOADING): call suggest "
            "in one process, or use the command lora-kernels suggest on the checkpoint"
        )


def _size(plan: LayerPlan) -> LayerSize:
    (rows, cols), options = plan.base.shape, plan.options
    if options.parts:
        rows = sum(end - begin for begin, end in options.parts)
    entries = rows * cols * (plan.base.num_experts or 1)
    r = options.r // max(1, len(options.parts))  # that of a part
    return LayerSize(plan.name, plan.base.shape, r, options.scaling, entries)


@contextmanager
def _generators_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restores torch's global generators of the CPU and of these devices."""
    others = {device for device in devices if device.type != "cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in others}:
            own = [device for device in others if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=own, device_type=kind))
        yield
