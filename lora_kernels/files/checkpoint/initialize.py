"""The starts of a checkpoint that need not fit into memory, and the base that lacks them."""

from __future__ import annotations

import json
import math
import threading
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..._utils.checks import as_integer
from ..._utils.progress import ByteCounter, uncounted
from ..._utils.version import __version__
from ...init import Initializer, LoRAM
from ...init.base import refuse_implicit
from ...init.start import checked
from ...model.config import AdapterState, LoRAConfig
from ...ops.loram_init import log_gain
from ..adapter.folder import NATIVE_FILE
from ..adapter.peft_format import to_peft
from ..adapter.recipe import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    METADATA,
    NATIVE_TYPE,
    START,
    config_to_dict,
    recipe_to_json,
)
from ..adapter.tensors import native_tensors
from ..io.journal import UnfinishedFolder, identity
from ..io.pipeline import Actions, Shard, run
from .factors import FactorFile, StartRecord, read_records, write_tensors
from .folder import CONFIG, ModelFolder, check_apart, check_space, pretty
from .residual import ADAPTER, is_start
from .weights import StoredWeight, is_embedding, is_head, stored_weights


@dataclass(frozen=True)
class Summary:
    """What was done: how many layers started, and how many of the shards' bytes were read and
    written in this run and `resumed` from an earlier one. `left_out` are experts and routers of
    mixtures, which are no linear layers in a model.
    """

    layers: int
    size: int
    resumed: int
    residual: str
    left_out: int = 0


def initialise(
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
) -> Summary:
    """Starts the linear layers of the model in the folder `model`, tensor by tensor.

    `residual` "absorb", which "auto" is for a start that has to be taken out: `out` becomes the
    model with W − s·B₀A₀ in place of W and `out`/adapter the start, as a PEFT adapter of this
    base: training starts from the original model. "implicit", which "auto" is for the others: `out`
    becomes the start as a native adapter of the original base.

    Experts and routers of mixtures do not start, whatever is chosen: in transformers' models they
    are no linear layers. All other tensors keep their bytes, all files their names, headers and
    order. `dtype` casts floats of 16 bits and more; a weight is rounded once, after the start was
    taken out. Starts that are drawn have a seed of their own for each layer, of `seed` and its
    name.

    A run that was killed goes on where it was, if it is repeated; the result is the same to the
    last byte. Peak memory is the largest of the tensors that start, with its cast copy if there is
    one (between the two 16-bit dtypes also one in float32), and 128 MiB; beside what the start
    itself takes. `sync` waits for the disk before the folder is complete, as `cp` does not.
    `progress(total)` gives a function that is told of bytes that are done.

    Raises:
        ValueError: a weight without a start, a value out of range, files that are no model; nothing
            is left in `out`.
        FileNotFoundError: no such folder, or a file is missing.
        OSError: `out` is in use or the disk is full; a repeated run goes on.

    """
    initializer = config.initializer
    if initializer.needs_gradient:
        raise ValueError(
            f"{config.init_lora_weights!r} starts from the loss gradients of the weights, which "
            "files do not tell: load the model and use lora_kernels.capture_gradients and add_lora"
        )
    for option, none in (
        ("modules_to_save", None),
        ("bias", "none"),
        ("layers_to_transform", None),
    ):
        if getattr(config, option) != none:
            raise ValueError(
                f"{option} is for models that are loaded: give target_modules and exclude_modules"
            )
    residual = config.residual
    if residual == "auto":
        residual = "absorb" if initializer.changes_base else "implicit"
    refuse_implicit(initializer, residual)
    if residual == "implicit" and dtype is not None:
        raise ValueError("dtype is for a base that is written; residual='implicit' writes none")
    where = _device(device)
    check_apart(model, out)
    folder = ModelFolder(model)
    if is_start(model / ADAPTER):
        raise ValueError(f"{model} lacks a start already: take the model it was made from")
    chosen = stored_weights(folder.path, config.target_modules, config.exclude_modules)
    weights = [weight for weight in chosen if not folder.in_mixture(weight.name)]
    _check_weights(folder, config, residual, weights)
    job = _Job(out, folder, config, initializer, residual, weights, where, seed)
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
    inputs = {file.name: identity(file) for file in folder.layouts}
    inputs |= {str(name): identity(model / name) for name in (CONFIG, *folder.others)}
    with UnfinishedFolder(out, task, inputs, overwrite, sync) as work:
        try:
            done = job.run(work, dtype, progress)
        except (ValueError, TypeError):
            work.abandon()
            raise
    return replace(done, left_out=len(chosen) - len(weights))


def _device(name: str) -> torch.device:
    """That device, which is there."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here: {first}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' has no numbers: take cpu, cuda ...")
    return device


def _check_weights(
    folder: ModelFolder, config: LoRAConfig, residual: str, weights: list[StoredWeight]
) -> None:
    """Raises if there is nothing that can start, or something that cannot."""
    if not weights:
        raise ValueError(
            "only experts and routers of a mixture are chosen, which are no linear layers in a "
            "model: take those of the attention"
        )
    for weight in weights:
        if is_embedding(weight.name):
            raise ValueError(f"{weight.name} is an embedding by its name, not a linear layer")
        if residual == "absorb" and is_head(weight.name) and folder.tied:
            raise ValueError(
                f"{weight.name} is tied to the embedding, which a start must not be taken out of: "
                "take residual='implicit'"
            )
        r, full = config.layer_rank(weight.name), min(weight.tensor.shape)
        if r > full:
            raise ValueError(
                f"rank {r} is larger than min(n, m) = {full} of {weight.name}: take a smaller one, "
                "or exclude this layer"
            )


class _Job:
    """One run: what happens to each weight, to each shard, and at the end."""

    def __init__(
        self,
        out: Path,
        folder: ModelFolder,
        config: LoRAConfig,
        initializer: Initializer,
        residual: str,
        weights: list[StoredWeight],
        device: torch.device,
        seed: int,
    ) -> None:
        self.out, self.folder, self.config = out, folder, config
        self.initializer, self.residual = initializer, residual
        self.device, self.seed = device, seed
        self.weights = {weight.tensor.name: weight for weight in weights}
        self.factors: dict[str, FactorFile] = {}
        self.work: UnfinishedFolder | None = None
        self._lock = threading.Lock()

    def run(
        self, work: UnfinishedFolder, dtype: torch.dtype | None, progress: ByteCounter
    ) -> Summary:
        self.work = work
        absorb = self.residual == "absorb"
        edited: dict[Path, set[str]] = {}
        for name, weight in self.weights.items():
            edited.setdefault(weight.tensor.file, set()).add(name)
        shards = self.folder.shards(edited, work if absorb else None, dtype)
        left = work.left(shards)
        size = sum(shard.size for shard in left)
        if absorb:
            check_space(self.out, sum(shard.target_layout.file_size for shard in left))
        run(left, Actions(self.edit, self.finished, progress(size)))
        if not work.completed and absorb:
            self.folder.copy_others(work)
            self._write_start(shards)
            self.folder.publish(work, shards)
        elif not work.completed:
            self._write_native(shards)
        work.complete()
        resumed = sum(shard.size for shard in shards) - size
        return Summary(len(self.weights), size, resumed, self.residual)

    def edit(self, shard: Shard, name: str, weight: Tensor) -> None:
        """Makes the start of one weight, and takes it out of it."""
        stored = self.weights[name]
        if stored.transposed:
            weight = weight.T
        r, scaling = self.config.layer_rank(stored.name), self.config.layer_scaling(stored.name)
        initializer = self._seeded(stored.name)
        here = weight.to(self.device)
        plain = initializer == LoRAM()  # whose β tells the norm, without another pass
        norm = None if plain else math.sqrt(torch.ops.lora.frobenius_stats([here])[0, 1])
        if self.residual == "absorb":
            start = initializer.absorb_(here, r, scaling)
            if here is not weight:
                weight.copy_(here)
        else:
            start = checked(initializer(here, r, scaling), here, r)
        if start.lora_R is not None and self.residual == "absorb":
            raise ValueError(
                f"{self.config.init_lora_weights!r} trains an R between frozen factors, which "
                "PEFT has not: take residual='implicit'"
            )
        beta = None if start.beta is None else float(start.beta)
        if norm is None:  # β² = ‖W‖ √(Q/r)
            norm = beta**2 * math.sqrt(r / log_gain(r, *here.shape))
        taken_out = initializer.changes_base
        record = StartRecord(
            name=stored.name,
            r=r,
            shape=tuple(here.shape),
            dtype="F64" if start.lora_A.dtype == torch.float64 else "F32",
            scaling=scaling,
            lora_alpha=self.config.layer_alpha(stored.name),
            weight_norm=norm,
            residual=self.residual,
            beta=beta if taken_out else None,
            kept=taken_out and beta is None,
            has_R=start.lora_R is not None,
        )
        with self._lock:
            if shard.name not in self.factors:
                self.factors[shard.name] = FactorFile(self._factor_path(shard))
        self.factors[shard.name].append(record, start)

    def finished(self, shard: Shard) -> None:
        """Journals the shard with its starts."""
        factors = self.factors.pop(shard.name, None)
        record = factors.close() if factors else {"starts": []}
        self.work.finish(shard.name, record, in_place=shard.target is not None)

    def _factor_path(self, shard: Shard) -> Path:
        return self.work.path(f"{shard.name}.factors")

    def _seeded(self, name: str) -> Initializer:
        """With a seed of its own if it would draw from torch's generator: a layer's start does not
        depend on which were made before it.
        """
        if getattr(self.initializer, "seed", 0) is not None:
            return self.initializer
        return replace(self.initializer, seed=zlib.crc32(f"{self.seed} {name}".encode()))

    def _starts(
        self, shards: list[Shard], base: Path
    ) -> tuple[AdapterState, list[tuple[Path, int, int]]]:
        """The adapter, with factors on the meta device, and where their bytes are."""
        found = {
            record.name: (record, self._factor_path(shard))
            for shard in shards
            for record in read_records(self.work.finished[shard.name])
        }
        layers, parts = {}, []
        for weight in self.weights.values():
            record, path = found[weight.name]
            layers[self.folder.module_name(weight.name)] = record.state()
            parts.append((path, record.offset, record.size))
        config = replace(self.config, residual=self.residual)
        return AdapterState(config, layers, base_model=str(base)), parts

    def _write_start(self, shards: list[Shard]) -> None:
        """The adapter of the residual base, for PEFT: on this base nothing is to be taken out."""
        state, parts = self._starts(shards, self.out)
        plain = {
            name: replace(layer, beta=None, start_A=None, start_B=None)
            for name, layer in state.layers.items()
        }
        config = replace(state.config, task_type=self.folder.task_type)
        conv1d = any(weight.transposed for weight in self.weights.values())
        values, tensors = to_peft(
            replace(state, config=config, layers=plain), self.folder.module_names, conv1d
        )
        values["inference_mode"] = False
        recipe = recipe_to_json(
            state.layers, START, state.config, state.base_model, original=str(self.folder.path)
        )
        write_tensors(self.work.path(ADAPTER_FILE), tensors, parts, {METADATA: recipe})
        self.work.place(ADAPTER_FILE, Path(ADAPTER) / ADAPTER_FILE)
        self.work.put(Path(ADAPTER) / ADAPTER_CONFIG, pretty(values))

    def _write_native(self, shards: list[Shard]) -> None:
        """The adapter of the original base."""
        state, parts = self._starts(shards, self.folder.path)
        recipe = recipe_to_json(state.layers, "native", state.config, state.base_model)
        tensors = native_tensors(state)
        write_tensors(self.work.path(NATIVE_FILE), tensors, parts, {METADATA: recipe})
        self.work.place(NATIVE_FILE, NATIVE_FILE)
        self.work.settle()
        self.work.put(ADAPTER_CONFIG, pretty({"peft_type": NATIVE_TYPE, **json.loads(recipe)}))
