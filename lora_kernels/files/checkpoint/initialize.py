"""Starts the layers of a checkpoint that may be larger than memory; writes the residual base."""

from __future__ import annotations

import math
import threading
import zlib
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..._utils.checks import as_integer
from ..._utils.names import match_names
from ..._utils.peft_names import ADAPTER_CONFIG
from ..._utils.progress import ByteCounter, uncounted
from ..._utils.version import __version__
from ...init import Initializer, LoRAM
from ...init.base import refuse_implicit
from ...init.start import checked
from ...model.config import AdapterState, LoRAConfig
from ...ops.loram_init import log_gain
from ..adapter.content import FolderContent, folder_content
from ..adapter.peft_format.reading import split_tensors
from ..adapter.recipe import NATIVE, START, config_to_dict
from ..io.journal import JournaledFolder
from ..io.pipeline import Actions, Shard, rewrite
from .factors import FactorFile, StartRecord, read_records, write_tensors
from .folder import ModelFolder, check_apart, check_space, pretty
from .residual import ADAPTER, is_start
from .weights import (
    StoredWeight,
    chosen_weights,
    is_all_linear,
    is_embedding,
    is_head,
)


@dataclass(frozen=True)
class InitSummary:
    """The result of `initialize`.

    `layers` have started; `size` bytes of the shards were read in this run, `resumed` in an earlier
    one. `skipped` is {name: reason} of the layers that were left out. `assumption` says what was
    assumed of a model that transformers does not know; else it is empty.
    """

    layers: int
    size: int
    resumed: int
    residual: str
    skipped: dict[str, str] = field(default_factory=dict)
    assumption: str = ""


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
) -> InitSummary:
    """Starts the linear layers of the model in the folder `model`, tensor by tensor.

    With `residual` "absorb" ("auto" for a start that is not zero), `out` becomes the residual base,
    the model with W − s·B₀A₀ in place of W, and `out`/adapter the start, as a PEFT adapter of this
    base: training starts from the original model. With "implicit" ("auto" for the other starts),
    `out` becomes the start as a native adapter of the original base.

    The layers are those that `add_lora` would adapt in the model that transformers makes of the
    folder, as far as PEFT finds them again; the adapter has their names in that model. All other
    tensors keep their bytes; all files keep their names, headers and order.
    `dtype` casts floats of 16 bits and more; a weight is rounded once, after the start was
    subtracted. Each layer's random start has its own seed, derived from `seed` and the layer's
    name.

    A killed run continues when it is repeated, and the result is the same to the last byte. Peak
    memory is the largest of the tensors that start, its cast copy if there is one (between the two
    16-bit dtypes also one in float32), 128 MiB, and the memory of the start itself. `sync` waits
    for the disk before the folder is complete, as `cp` does not. `progress(total)` returns a
    function that is called with each number of bytes done.

    Raises:
        ValueError: a weight cannot start, a value is out of range, or the files are not a model;
            nothing is left in `out`.
        FileNotFoundError: the folder or a file is missing.
        OSError: `out` is in use or the disk is full; a repeated run continues.

    """
    initializer = config.initializer
    if initializer.needs_gradient:
        raise ValueError(
            f"{config.init_lora_weights!r} starts from the loss gradients of the weights, which a "
            "file does not have: load the model and use lora_kernels.capture_gradients and add_lora"
        )
    for option, none in (
        ("modules_to_save", None),
        ("bias", "none"),
        ("layers_to_transform", None),
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
    place = _device(device)
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
    with JournaledFolder(out, task, folder.identities(), overwrite, sync) as work:
        job = _Job(work, folder, config, initializer, residual, weights, place, seed)
        done = job.run(dtype, progress)
    return replace(done, skipped=skipped, assumption=folder.assumption)


def _device(name: str) -> torch.device:
    """The device of that name; raises if it cannot be used."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here: {first}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' has no numbers: use cpu, cuda ...")
    return device


def _choose(
    folder: ModelFolder, config: LoRAConfig, residual: str
) -> tuple[list[StoredWeight], dict[str, str]]:
    """The weights that start, and the reasons for the others."""
    absorb = residual == "absorb"
    if folder.architecture is not None:
        weights, skipped = chosen_weights(
            folder.architecture, folder.path, folder.entries, config, absorb
        )
    else:
        weights, skipped = folder.named_weights(config.target_modules, config.exclude_modules)
        _check_named(folder, absorb, weights)
    largest = {weight.name: min(weight.tensor.entry.shape) for weight in weights}
    small = {name: full for name, full in largest.items() if config.layer_rank(name) > full}
    unasked = is_all_linear(config.target_modules) and not config.rank_pattern
    if unasked and len(small) < len(weights):
        reasons = {n: f"r = {config.r} is larger than min(out, in) = {k}" for n, k in small.items()}
        return [weight for weight in weights if weight.name not in small], skipped | reasons
    for name, full in small.items():
        raise ValueError(
            f"rank {config.layer_rank(name)} is larger than min(n, m) = {full} of {name}: use a "
            "smaller one, or exclude this layer"
        )
    return weights, skipped


def _check_named(folder: ModelFolder, absorb: bool, weights: list[StoredWeight]) -> None:
    """Raises if a weight that was chosen by its name cannot start, or if there are none."""
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


class _Job:
    """One run: its steps for each weight, for each shard, and at the end."""

    def __init__(
        self,
        work: JournaledFolder,
        folder: ModelFolder,
        config: LoRAConfig,
        initializer: Initializer,
        residual: str,
        weights: list[StoredWeight],
        device: torch.device,
        seed: int,
    ) -> None:
        self.work, self.folder, self.config = work, folder, config
        self.initializer, self.residual = initializer, residual
        self.device, self.seed = device, seed
        self.weights = {weight.tensor.name: weight for weight in weights}
        self.factors: dict[str, FactorFile] = {}
        self._lock = threading.Lock()

    def run(self, dtype: torch.dtype | None, progress: ByteCounter) -> InitSummary:
        work = self.work
        absorb = self.residual == "absorb"
        edited: dict[Path, set[str]] = {}
        for name, weight in self.weights.items():
            edited.setdefault(weight.tensor.file, set()).add(name)
        shards = self.folder.shards(edited, work if absorb else None, dtype)
        remaining = work.remaining(shards)
        size = sum(shard.size for shard in remaining)
        if absorb:
            check_space(work.out, sum(shard.target_layout.file_size for shard in remaining))
        rewrite(remaining, Actions(self.edit, self.finished, progress(size)))
        if not work.completed:
            if absorb:
                self.folder.copy_others(work)
            self._write_adapter(shards)
            if absorb:
                self.folder.publish(work, shards)
        work.complete()
        resumed = sum(shard.size for shard in shards) - size
        return InitSummary(len(self.weights), size, resumed, self.residual)

    def edit(self, shard: Shard, name: str, weight: Tensor) -> None:
        """Makes the start of one weight, and subtracts it from the weight (absorb)."""
        stored = self.weights[name]
        if stored.transposed:
            weight = weight.T
        r, scaling = self.config.layer_rank(stored.name), self.config.layer_scaling(stored.name)
        initializer = self._seeded(stored.name)
        here = weight.to(self.device)
        plain = initializer == LoRAM()  # its β determines the norm, without another pass
        norm = 0.0 if plain else math.sqrt(torch.ops.lora.frobenius_stats([here])[0, 1])
        if self.residual == "absorb":
            start = initializer.absorb_(here, r, scaling)
            if here is not weight:
                weight.copy_(here)
        else:
            start = checked(initializer(here, r, scaling), here, r)
        if start.lora_R is not None and self.residual == "absorb":
            raise ValueError(
                f"{self.config.init_lora_weights!r} trains an R between frozen factors, which PEFT "
                "does not have: use residual='implicit'"
            )
        beta = None if start.beta is None else float(start.beta)
        rows, cols = here.shape
        if plain and beta is not None:  # β² = ‖W‖ √(Q/r)
            norm = beta**2 * math.sqrt(r / log_gain(r, rows, cols))
        subtracted = initializer.changes_base
        record = StartRecord(
            name=stored.name,
            r=r,
            shape=(rows, cols),
            dtype="F64" if start.lora_A.dtype == torch.float64 else "F32",
            scaling=scaling,
            lora_alpha=self.config.layer_alpha(stored.name),
            weight_norm=norm,
            residual=self.residual,
            beta=beta if subtracted else None,
            kept=subtracted and beta is None,
            has_R=start.lora_R is not None,
        )
        with self._lock:
            if shard.name not in self.factors:
                self.factors[shard.name] = FactorFile(self._factor_path(shard))
        self.factors[shard.name].append(record, start)

    def finished(self, shard: Shard) -> None:
        """Records the shard and its starts in the journal."""
        factors = self.factors.pop(shard.name, None)
        record = factors.close() if factors else {"starts": []}
        self.work.finish(shard.name, record, in_place=shard.target is not None)

    def _factor_path(self, shard: Shard) -> Path:
        return self.work.path(f"{shard.name}.factors")

    def _seeded(self, name: str) -> Initializer:
        """The initializer with a seed of the layer's own if it would use torch's generator: then a
        start does not depend on the order of the layers.
        """
        initializer = self.initializer
        if getattr(initializer, "seed", 0) is not None:
            return initializer
        if not is_dataclass(initializer):
            raise TypeError(f"{type(initializer).__name__} must be a dataclass to get a seed")
        return replace(initializer, seed=zlib.crc32(f"{self.seed} {name}".encode()))

    def _starts(
        self, shards: list[Shard], base: Path
    ) -> tuple[AdapterState, list[tuple[Path, int, int]]]:
        """The adapter with factors on the meta device, and the files and ranges of their bytes."""
        found = {
            record.name: (record, self._factor_path(shard))
            for shard in shards
            for record in read_records(self.work.finished[shard.name])
        }
        layers, parts = {}, []
        for weight in self.weights.values():
            record, path = found[weight.name]
            layers[weight.name] = record.state()
            parts.append((path, record.offset, record.size))
        config = replace(self.config, residual=self.residual)
        return AdapterState(config, layers, base_model=str(base)), parts

    def _write_adapter(self, shards: list[Shard]) -> None:
        """The start as a PEFT adapter of the residual base, or a native adapter of the original."""
        absorb = self.residual == "absorb"
        state, parts = self._starts(shards, self.work.out if absorb else self.folder.path)
        content = folder_content(
            state,
            START if absorb else NATIVE,
            module_names=self.folder.module_names,
            fan_in_fan_out=any(weight.transposed for weight in self.weights.values()),
            original=str(self.folder.path),
            task_type=self.folder.task_type,
        )
        if absorb:
            self._check_found(content)
        inside = Path(ADAPTER if absorb else "")
        path = self.work.path(content.file)
        write_tensors(path, content.tensors, parts, content.metadata)
        self.work.place(content.file, inside / content.file)
        if not absorb:  # the configuration completes the folder
            self.work.settle()
        self.work.put(inside / ADAPTER_CONFIG, pretty(content.config))

    def _check_found(self, content: FolderContent) -> None:
        """Raises unless the adapter has both factors of every weight from which a start was
        subtracted, and its `target_modules` mean exactly these layers of the model.
        """
        layers = {weight.name for weight in self.weights.values()}
        targets = content.config["target_modules"]
        found = set(match_names(self.folder.module_names, targets))
        stored = set(split_tensors(content.tensors)[0])
        if wrong := (layers ^ found) | (layers ^ stored):
            raise ValueError(
                f"{min(wrong)!r} has a start in the weights or in the adapter only, and nothing "
                "was written: this is an error of lora_kernels, please report it"
            )
