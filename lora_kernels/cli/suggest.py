"""`lora-kernels suggest`: suggests a learning rate for a start on the weights of a checkpoint."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .._utils.checks import check_positive
from .._utils.progress import tracked
from ..files.adapter.folder import is_adapter
from ..files.adapter.recipe import config_to_dict
from ..files.checkpoint.folder import CONFIG, ModelFolder
from ..files.checkpoint.residual import ADAPTER, is_start
from ..files.checkpoint.weights import StoredWeight, chosen_weights, is_all_linear, stored_weights
from ..init import Initializer, get_initializer, initializer_names
from ..init.start import checked
from ..model.config import LoRAConfig
from ..model.starts import naming
from ..training.rescaling.scaling import with_scaling
from ..training.rescaling.step_size import (
    LAYERS,
    LayerSize,
    StepSize,
    is_slow,
    moving,
    sampled,
    start_square,
)
from ..training.rescaling.suggestion import Suggestion, make_suggestion, reference_text
from ._options import Commands, add_command, add_path, add_start, add_targets, targets_of

_DESCRIPTION = """\
Suggests a learning rate of Adam for a start, and lora_alpha if none is given.

One step of Adam at the rate eta changes a weight W by a matrix whose entries have the root mean
square eta * kappa. kappa is measured on the start that each layer would get; setups with equal
eta * kappa are assumed to train alike (arXiv 2507.06558, propositions 1 and 2). The best
eta * kappa is taken from a study of small models, or from a configuration whose learning rate you
know: see --reference-lr and the other options of the reference.

The weights are read one at a time: peak memory is the size of the largest one and its start. A
start that needs an SVD is computed for some layers of each kind, evenly spaced (--layers).
"""
_EXAMPLES = """\
examples:
  lora-kernels suggest models/Llama-3-8B --method loram -r 16
  lora-kernels suggest models/Llama-3-8B --method pissa -r 64 --lora-alpha 64 --layers 2
  lora-kernels suggest models/Llama-3-8B --method loram -r 16 --lora-alpha 16 \\
      --reference-method lora --reference-r 16 --reference-alpha 32 --reference-lr 2e-4
  lora-kernels suggest model-00001-of-00004.safetensors --method lora --ratio 16 --json
"""
_ALL = "all"
_SOURCES = {"gradients": "loss gradients of the weights", "activations": "inputs of the layers"}


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "suggest", "a learning rate for a start", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "PATH", "folder of a Hugging Face model, or a .safetensors file")
    names = [name for name in initializer_names() if not _needs(get_initializer(name))]
    add_start(parser, names)
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="s is ALPHA / r (default: suggested)"
    )
    parser.add_argument(
        "--rslora", "--use-rslora", action="store_true", help="s is ALPHA / sqrt(r)"
    )
    parser.add_argument(
        "--ratio",
        type=float,
        default=1.0,
        help="B's learning rate divided by A's (LoRA+; default 1)",
    )
    add_targets(parser)
    parser.add_argument(
        "--exclude", nargs="+", metavar="NAME", help="layers to exclude, as for --targets"
    )
    reference = parser.add_argument_group("a configuration that trains well on this model")
    reference.add_argument(
        "--reference-lr", type=float, metavar="LR", help="its learning rate, the same for A and B"
    )
    reference.add_argument("--reference-method", metavar="NAME", help="its start (default lora)")
    reference.add_argument("--reference-r", type=int, metavar="R", help="its rank (default -r)")
    reference.add_argument(
        "--reference-alpha", type=float, metavar="ALPHA", help="its s is ALPHA / r (default 8)"
    )
    reference.add_argument(
        "--reference-rslora", action="store_true", help="its s is ALPHA / sqrt(r)"
    )
    parser.add_argument(
        "--layers",
        type=_limit,
        default=LAYERS,
        metavar="N",
        help=f"layers of each kind for which a slow start is computed, or {_ALL} (default "
        f"{LAYERS})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_suggest)


def _suggest(options: argparse.Namespace) -> None:
    check_positive(options.ratio, "--ratio")
    shared = {"target_modules": targets_of(options), "exclude_modules": options.exclude}
    config = LoRAConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        use_rslora=options.rslora,
        init_lora_weights=options.method,
        **shared,
    )
    config, why = with_scaling(config)
    reference = _reference(options, shared)
    for own in (config, reference):
        if own is not None:
            _refuse_data(own)

    def measured(of: LoRAConfig, ratio: float) -> StepSize:
        weights = _weights(options.path, of)
        return _step_size(weights, of, ratio, options.layers)

    product, text = None, ""
    if reference is not None:
        step = measured(reference, 1.0)
        product = step.product(options.reference_lr)
        text = reference_text(reference, step, options.reference_lr)
    found = make_suggestion(
        config,
        measured(config, options.ratio),
        product=product,
        reference=text,
        ratio=options.ratio,
        notes=(why,) if why else (),
    )
    print(_json(found) if options.json else found)


def _reference(options: argparse.Namespace, shared: dict[str, Any]) -> LoRAConfig | None:
    """The configuration of the options --reference-*; None if there are none."""
    rate = options.reference_lr
    others = ("reference_method", "reference_r", "reference_alpha", "reference_rslora")
    given = [name for name in others if getattr(options, name)]
    if rate is None:
        if given:
            name = given[0].replace("_", "-")
            raise ValueError(f"--{name} needs the learning rate of that reference: --reference-lr")
        return None
    check_positive(rate, "--reference-lr")
    return LoRAConfig(
        r=options.r if options.reference_r is None else options.reference_r,
        lora_alpha=options.reference_alpha,
        use_rslora=options.reference_rslora,
        init_lora_weights=options.reference_method or "lora",
        **shared,
    )


def _weights(path: Path, config: LoRAConfig) -> list[StoredWeight]:
    """The weights of the layers to adapt: in a model's folder those that `init` would choose, in a
    file those that `inspect` would choose.
    """
    if is_adapter(path):
        raise ValueError(f"{path} is an adapter: give the model that it adapts")
    if is_start(path / ADAPTER):
        raise ValueError(
            f"{path} is a residual base, from which a start was subtracted already: use the model "
            "it was made from"
        )
    targets, exclude = config.target_modules or (), config.exclude_modules
    if not (path / CONFIG).is_file():
        weights = stored_weights(path, targets, exclude)
    else:
        folder = ModelFolder(path)
        if folder.architecture is None:
            weights, _ = folder.named_weights(targets, exclude)
        else:
            found, _ = chosen_weights(
                folder.architecture, path, folder.entries, config, absorb=False
            )
            weights = [weight for weight in found if isinstance(weight, StoredWeight)]
    if is_all_linear(targets):  # leaves out layers that are too small, as `init` does
        weights = [own for own in weights if config.layer_rank(own.name) <= min(own.shape)]
    if not weights:
        raise ValueError(f"no layer of {path} is left to adapt with r = {config.r}")
    return weights


def _step_size(
    weights: Sequence[StoredWeight], config: LoRAConfig, ratio: float, limit: int | None
) -> StepSize:
    """κ of the starts of these weights, which are loaded one at a time."""
    initializer = config.initializer
    sizes = [
        LayerSize(
            own.name,
            own.shape,
            config.layer_rank(own.name),
            config.layer_scaling(own.name),
            math.prod(own.shape),
        )
        for own in weights
    ]
    stored = {own.name: own for own in weights}
    chosen = sampled(sizes, limit if is_slow(initializer) else None)
    squares: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random starts have the same numbers in every run
        for size in tracked(chosen, "step sizes"):
            with naming(size.name):
                weight = stored[size.name].load()
                start = checked(initializer(weight, size.r, size.scaling), weight, size.r)
            squares[size.name] = start_square(
                start, size.scaling, trains=initializer.trains, ratio=ratio
            )
    return StepSize.of(sizes, squares, moving(initializer, ratio))


def _needs(initializer: Initializer) -> str | None:
    """What the start is computed from besides W; None if from W alone."""
    if initializer.needs_gradient:
        return "gradients"
    return "activations" if initializer.needs_activations else None


def _refuse_data(config: LoRAConfig) -> None:
    what = _needs(config.initializer)
    if what is not None:
        raise ValueError(
            f"{config.init_lora_weights!r} starts from the {_SOURCES[what]}, which a file does not "
            f"have: load the model and use lora_kernels.suggest with {what}="
            f"capture_{what}(model, batches)"
        )


def _limit(text: str) -> int | None:
    if text == _ALL:
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, or {_ALL}, got {text!r}")
    return int(text)


def _json(found: Suggestion) -> str:
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    return json.dumps(values | {"config": config_to_dict(found.config)}, indent=2)
