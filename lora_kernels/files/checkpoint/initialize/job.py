"""One run of `initialize`: what it does for each tensor, for each shard, and at the end."""

from __future__ import annotations

import math
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...._utils.progress import ByteCounter
from ....init import Initializer, LoRAM, Start
from ....init.start import check_residual_fits, checked
from ....model.config import LoRAConfig
from ....ops.loram_init import log_gain
from ...io.blocks import Piece
from ...io.journal import JournaledFolder
from ...io.pipeline import Actions, Shard, rewrite
from ..experts import Matrix, Part, StoredStack
from ..folder import ModelFolder
from ..weights import StoredWeight
from .adapter import write_adapter
from .factors import FactorFile, StartRecord, read_records
from .recent import RecentStarts


@dataclass(frozen=True)
class InitSummary:
    """The result of `initialize`.

    `layers` is the number of layers with a start. All ranks together read `size` bytes of the
    shards in this run, and `resumed` bytes in earlier runs. `skipped` is {name: reason} of the
    layers without a start. `assumption` says what was assumed about a model that transformers does
    not know; else it is empty.
    """

    layers: int
    size: int
    resumed: int
    residual: str
    skipped: dict[str, str] = field(default_factory=dict)
    assumption: str = ""


class Job:
    """One run: what it does for each tensor, for each shard, and at the end."""

    def __init__(
        self,
        work: JournaledFolder,
        folder: ModelFolder,
        config: LoRAConfig,
        residual: str,
        weights: Sequence[StoredWeight | StoredStack],
        device: torch.device,
        seed: int,
    ) -> None:
        self.work, self.folder, self.config = work, folder, config
        self.initializer, self.residual = config.initializer, residual
        self.device, self.seed = device, seed
        self.weights = weights
        self.factors: dict[str, FactorFile] = {}
        self._lock = threading.Lock()
        self._recent = RecentStarts()
        self._uses: Counter[str] = Counter()  # how many parts of a matrix this process edits
        self._places = {
            part.key: (matrix, part)
            for weight in weights
            for matrix in weight.matrices()
            for part in self._edited(matrix)
        }

    def run(self, dtype: torch.dtype | None, progress: ByteCounter) -> InitSummary:
        work = self.work
        absorb = self.residual == "absorb"
        edited: dict[Path, set[str]] = {}
        for _, part in self._places.values():
            edited.setdefault(part.tensor.file, set()).add(part.tensor.name)
        shards = self.folder.shards(
            edited,
            work if absorb else None,
            dtype,
            sliced={name for name, index in self._places if index is not None},
        )
        remaining = work.remaining(shards)
        own = work.share(remaining)
        files = {shard.source for shard in own}
        parts = [(matrix, p) for matrix, p in self._places.values() if p.tensor.file in files]
        self._uses = Counter(matrix.title for matrix, _ in parts)
        advanced = work.watched(progress(sum(shard.size for shard in own)))
        rewrite(own, Actions(self.edit, self.finished, advanced))
        if work.gathered() and not work.completed:
            if absorb:
                self.folder.copy_others(work)
            records = {
                (record.name, record.expert): (record, self._factor_path(shard))
                for shard in shards
                for record in read_records(work.finished[shard.name])
            }
            config = replace(self.config, residual=self.residual)
            write_adapter(work, self.folder, config, self.weights, records)
            if absorb:
                self.folder.publish(work, shards)
        work.complete()
        size = sum(shard.size for shard in remaining)
        resumed = sum(shard.size for shard in shards) - size
        return InitSummary(len(self.weights), size, resumed, self.residual)

    def edit(self, shard: Shard, piece: Piece, weight: Tensor) -> None:
        """Computes the start of the matrix to which a tensor or slice belongs, and subtracts it
        (absorb). Only the first part of each matrix records the start in its shard.
        """
        matrix, part = self._places[piece.name, piece.index]
        own = part.matrix(weight)
        here = _joined(matrix, part, own).to(self.device)
        first = part is matrix.parts[0]
        plain = self.initializer == LoRAM()  # its β gives the norm, without another pass
        norm = 0.0
        # The current device belongs to a thread: without this, kernels would run on the first GPU.
        with torch.accelerator.device_index(self.device.index):
            if first and not plain:
                norm = math.sqrt(torch.ops.lora.frobenius_stats([here])[0, 1])
            start = self._started(matrix, here)
        if self.residual == "absorb" and here is not own:
            own.copy_(here[part.rows])
        if first:
            self._record(shard, matrix, start, norm)

    def finished(self, shard: Shard) -> None:
        """Records the shard and its starts in the journal."""
        factors = self.factors.pop(shard.name, None)
        record = factors.close() if factors else {"starts": []}
        self.work.finish(shard.name, record, in_place=shard.target is not None)

    def _edited(self, matrix: Matrix) -> Sequence[Part]:
        """The parts to edit. Without an edit, the start is computed with the first part only."""
        subtracts = self.residual == "absorb" and self.initializer.changes_base
        return matrix.parts if subtracts else matrix.parts[:1]

    def _started(self, matrix: Matrix, weight: Tensor) -> Start:
        """The start of W [out, in]; with "absorb" it is also subtracted from W."""
        r, scaling = self.config.layer_rank(matrix.layer), self.config.layer_scaling(matrix.layer)
        initializer = self._seeded(matrix.title)
        if self.residual == "absorb" and len(matrix.parts) == 1:
            start = initializer.absorb_(weight, r, scaling)
        else:
            make = partial(_made, initializer, weight, r, scaling)
            start = self._recent.take(matrix.title, self._uses[matrix.title], make)
            if self.residual == "absorb" and initializer.changes_base:
                check_residual_fits(weight, start, scaling)
                initializer.take_out_(weight, start, scaling)
        if start.lora_R is not None and self.residual == "absorb":
            raise ValueError(
                f"{self.config.init_lora_weights!r} trains an R between frozen factors, which PEFT "
                "does not have: use residual='implicit'"
            )
        return start

    def _record(self, shard: Shard, matrix: Matrix, start: Start, norm: float) -> None:
        """Adds a start to the starts of the shard."""
        name, (rows, cols) = matrix.layer, matrix.shape
        r, beta = self.config.layer_rank(name), None if start.beta is None else float(start.beta)
        if self.initializer == LoRAM() and beta is not None:  # β² = ‖W‖ √(Q/r)
            norm = beta**2 * math.sqrt(r / log_gain(r, rows, cols))
        subtracted = self.initializer.changes_base
        record = StartRecord(
            name=name,
            expert=matrix.expert,
            r=r,
            shape=(rows, cols),
            dtype="F64" if start.lora_A.dtype == torch.float64 else "F32",
            scaling=self.config.layer_scaling(name),
            lora_alpha=self.config.layer_alpha(name),
            weight_norm=norm,
            residual=self.residual,
            beta=beta if subtracted else None,
            kept=subtracted and beta is None,
            has_R=start.lora_R is not None,
            trains=self.initializer.trains,
        )
        with self._lock:
            if shard.name not in self.factors:
                self.factors[shard.name] = FactorFile(self._factor_path(shard))
        self.factors[shard.name].append(record, start)

    def _factor_path(self, shard: Shard) -> Path:
        return self.work.path(f"{shard.name}.factors")

    def _seeded(self, title: str) -> Initializer:
        """The initializer, with a seed for this matrix if it would use torch's generator, so that
        the start does not depend on the order of the layers.
        """
        initializer = self.initializer
        if getattr(initializer, "seed", 0) is not None:
            return initializer
        if not is_dataclass(initializer):
            raise TypeError(f"{type(initializer).__name__} must be a dataclass to get a seed")
        return replace(initializer, seed=zlib.crc32(f"{self.seed} {title}".encode()))


def _joined(matrix: Matrix, part: Part, own: Tensor) -> Tensor:
    """W [out, in], whose edited part is `own`: `own` itself, or a copy that has the other parts."""
    if len(matrix.parts) == 1:
        return own
    return torch.cat([own if p is part else p.load().to(own.dtype) for p in matrix.parts])


def _made(initializer: Initializer, weight: Tensor, r: int, scaling: float) -> Start:
    return checked(initializer(weight, r, scaling), weight, r)
