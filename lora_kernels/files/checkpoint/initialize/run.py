"""Computes starts for a checkpoint that may be larger than memory; writes the residual base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...._utils.checks import as_integer
from ...._utils.progress import ByteCounter, uncounted
from ...._utils.version import __version__
from ....init import Initializer
from ....init.base import refuse_implicit
from ....model.config import LoRAConfig
from ...adapter.recipe import config_to_dict
from ...io.journal import ALONE, JournaledFolder, Ranks
from ..experts import StoredStack
from ..folder import ModelFolder, check_apart
from ..residual import ADAPTER, is_start
from ..weights import StoredWeight, chosen_weights, is_all_linear, is_embedding, is_head
from .job import InitSummary, Job

Weights = Sequence[StoredWeight | StoredStack]


def initialize(
    model: Path,
    out: Path,
    config: LoRAConfig,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    sync: bool = False,
    progress: ByteCounter = uncounted,
    ranks: Ranks = ALONE,
) -> InitSummary:
    """Computes starts for the linear layers of the model in the folder `model`, tensor by tensor,
    and for the experts whose parameters `target_parameters` names.

    With `residual` "absorb" ("auto" for a start that is not zero), `out` becomes the residual base:
    the model with W − s·B₀A₀ in place of W. `out`/adapter becomes the start, as a PEFT adapter of
    this base, so that training starts from the original model. With "implicit" ("auto" for the
    other starts), `out` becomes the start as a native adapter of the original base.

    The layers are those that `add_lora` would adapt in the model that transformers makes of the
    folder, without those that PEFT would not find again. The adapter has their names in that model.
    All other tensors keep their bytes; all files keep their names, headers and order. `dtype` casts
    floats of 16 bits and more; a weight is rounded once, after the start was subtracted. Each
    random start has its own seed, derived from `seed`, the layer's name and the expert's number.

    A killed run continues when it is repeated, and the result is the same to the last byte. Peak
    memory is the sum of the largest tensor that gets a start, its cast copy if there is one
    (between the two 16-bit dtypes also a copy in float32), 128 MiB, and the memory that computing
    the start takes. Experts that the files hold in one tensor are edited one by one. An expert that
    they hold in two tensors is joined, which takes two copies of it. Writing the adapter takes the
    factors of the experts of one block. `sync` waits for the disk before the folder is complete,
    which `cp` does not. `progress(total)` returns a function that is called with each number of
    bytes done.

    With several `ranks`, each of these processes calls this function with the same arguments. Each
    rewrites its own shards, on its own GPU if `device` has no number. Rank 0 writes all other
    files, and all ranks return when the folder is complete. The result has the same bytes as with
    one process, and a repeated run may have another number of ranks. An error on one rank is raised
    on all. A shard is not divided: if the model is one file, rank 0 does all the work.

    Raises:
        ValueError: a weight cannot get a start, a value is out of range, or the files are not a
            model; nothing is left in `out`.
        FileNotFoundError: the folder or a file is missing.
        OSError: `out` is in use, the disk is full, or another rank ended or did not come; a
            repeated run continues.

    """
    initializer = config.initializer
    _refuse_data(config)
    for option, none in (
        ("modules_to_save", None),
        ("bias", "none"),
        ("layers_to_transform", None),
        ("fused_parts", {}),
    ):
        if getattr(config, option) != none:
            raise ValueError(
                f"{option} is for models that are loaded: use target_modules and exclude_modules"
            )
    residual = config.residual
    if residual == "auto":
        residual = "absorb" if initializer.changes_base else "implicit"
    refuse_implicit(initializer, residual)
    if residual == "implicit" and dtype is not None:
        raise ValueError("dtype is for a base that is written; residual='implicit' writes none")
    check_apart(model, out)
    folder = ModelFolder(model)
    if is_start(model / ADAPTER):
        raise ValueError(
            f"{model} is a residual base, from which a start was subtracted already: use the model "
            "it was made from"
        )
    weights, skipped = _choose(folder, config, residual)
    if residual == "absorb" and config.lora_dropout and any(map(_of_experts, weights)):
        raise ValueError(
            "lora_dropout must be 0: PEFT, which is to train the adapter, has none for experts"
        )
    place = _device(device, ranks)
    task = {
        "command": "init",
        "version": __version__,
        "torch": torch.__version__,
        **config_to_dict(config),
        "residual": residual,
        "dtype": str(dtype),
        "device": device,
        "seed": as_integer(seed, "seed"),
    }
    with JournaledFolder(out, task, folder.identities(), overwrite, sync, ranks) as work:
        job = Job(work, folder, config, residual, weights, place, seed)
        done = job.run(dtype, progress)
    return replace(done, skipped=skipped, assumption=folder.assumption)


def starts_from_files(initializer: Initializer) -> bool:
    """Whether the start is computed from the weight alone, and a start's files can hold it."""
    others = (initializer.needs_gradient, initializer.needs_activations, initializer.has_diag)
    return not any(others)


def _refuse_data(config: LoRAConfig) -> None:
    """Raises ValueError for a start that needs more than the weight, or that a start's files cannot
    hold.
    """
    initializer, name = config.initializer, config.init_lora_weights
    sources = {"gradients": "loss gradients of the weights", "activations": "inputs of the layers"}
    needed = {
        "gradients": initializer.needs_gradient,
        "activations": initializer.needs_activations,
    }
    for what, source in sources.items():
        if needed[what]:
            raise ValueError(
                f"{name!r} starts from the {source}, which a file does not have: load the model "
                f"and use lora_kernels.capture_{what} and add_lora"
            )
    if config.use_dora:
        raise ValueError(
            "use_dora=True measures the rows of the weights, which is not done here: load the "
            "model and use add_lora"
        )
    if initializer.has_diag:
        raise ValueError(f"{name!r} trains a diagonal between A and B: load the model and add_lora")


def _device(name: str, ranks: Ranks) -> torch.device:
    """The device with that name; raises ValueError if it cannot be used. If the name has no number,
    each rank on a machine gets an accelerator of its own.
    """
    try:
        device = torch.device(name)
        if device.index is None and device.type not in ("cpu", "meta") and ranks.world_size > 1:
            count, needed = torch.accelerator.device_count(), ranks.local_world_size
            if 0 < count < needed:  # the same error on all ranks
                raise ValueError(
                    f"device {name!r} gives each of {needed} ranks on a machine its own, and there "
                    f"are {count}: start as many ranks, or use {device.type}:0 for all"
                )
            device = torch.device(device.type, ranks.local_rank)
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here: {first}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' has no numbers: use cpu, cuda ...")
    return device


def _of_experts(weight: StoredWeight | StoredStack) -> bool:
    return isinstance(weight, StoredStack)


def _choose(
    folder: ModelFolder, config: LoRAConfig, residual: str
) -> tuple[Weights, dict[str, str]]:
    """The weights that get a start, and the reasons for the others."""
    absorb = residual == "absorb"
    weights: Weights
    if folder.architecture is not None:
        weights, skipped = chosen_weights(
            folder.architecture, folder.path, folder.entries, config, absorb
        )
    elif config.target_parameters:
        raise ValueError(
            f"target_parameters needs a model that transformers knows: {folder.assumption}"
        )
    else:
        weights, skipped = folder.named_weights(config.target_modules or (), config.exclude_modules)
        _check_named(folder, absorb, weights)
    largest = {weight.name: min(weight.shape) for weight in weights}
    small = {name: full for name, full in largest.items() if config.layer_rank(name) > full}
    unasked = is_all_linear(config.target_modules or ()) and not config.rank_pattern
    linear = {weight.name for weight in weights if not _of_experts(weight)}
    if unasked and small.keys() <= linear and len(small) < len(weights):
        reasons = {n: f"r = {config.r} is larger than min(out, in) = {k}" for n, k in small.items()}
        return [weight for weight in weights if weight.name not in small], skipped | reasons
    for name, full in small.items():
        raise ValueError(
            f"rank {config.layer_rank(name)} is larger than min(n, m) = {full} of {name}: use a "
            "smaller one, or exclude this layer"
        )
    return weights, skipped


def _check_named(folder: ModelFolder, absorb: bool, weights: list[StoredWeight]) -> None:
    """Raises ValueError if a weight chosen by name cannot get a start, or there is none."""
    if not weights:
        raise ValueError(
            "only experts and routers of a mixture are chosen, which are not linear layers in a "
            "model: choose layers of the attention"
        )
    for weight in weights:
        if is_embedding(weight.name):
            raise ValueError(f"{weight.name} is an embedding by its name, not a linear layer")
        if absorb and is_head(weight.name) and folder.tied:
            raise ValueError(
                f"{weight.name} is tied to the embedding, from which no start must be subtracted: "
                "use residual='implicit'"
            )
