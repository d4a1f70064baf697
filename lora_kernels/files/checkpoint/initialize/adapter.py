"""Writes the starts of a run as an adapter whose factors need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...._utils.names import match_names
from ...._utils.peft_names import ADAPTER_CONFIG
from ....layers.state import LayerState
from ....model.config import AdapterState, LoRAConfig, StoredExperts
from ...adapter.content import FolderContent, folder_content
from ...adapter.peft_format.experts.naming import stored_experts
from ...adapter.peft_format.reading import split_tensors
from ...adapter.recipe import NATIVE, START
from ...io.journal import JournaledFolder
from ..experts import StoredStack
from ..folder import ModelFolder, pretty
from ..residual import ADAPTER
from ..weights import StoredWeight
from .factors import Range, StartRecord, stacked, write_tensors

# {(name of the layer, number of the expert): the record and the file of the factors}
Records = Mapping[tuple[str, int | None], tuple[StartRecord, Path]]


def write_adapter(
    work: JournaledFolder,
    folder: ModelFolder,
    config: LoRAConfig,
    weights: Sequence[StoredWeight | StoredStack],
    records: Records,
) -> None:
    """Writes the start: as a PEFT adapter of the residual base (absorb), or as a native adapter of
    the original base.
    """
    _Writer(work, folder, config, weights, records).write()


class _Writer:
    def __init__(
        self,
        work: JournaledFolder,
        folder: ModelFolder,
        config: LoRAConfig,
        weights: Sequence[StoredWeight | StoredStack],
        records: Records,
    ) -> None:
        self.work, self.folder, self.config = work, folder, config
        self.weights, self.records = weights, records
        self.absorb = config.residual == "absorb"
        # The name of an expert's parameter in PEFT's files depends on all adapted parameters of its
        # module.
        self.modules: dict[str, list[StoredStack]] = {}
        for weight in weights:
            if isinstance(weight, StoredStack):
                self.modules.setdefault(weight.name.rpartition(".")[0], []).append(weight)

    def write(self) -> None:
        layers = {weight.name: self._state(weight, loaded=False) for weight in self.weights}
        content = self._content(layers)
        owners = {
            name: module
            for module, weights in self.modules.items()
            for name in self._content({w.name: layers[w.name] for w in weights}).tensors
        }
        if self.absorb:
            self._check_found(content, owners)
        inside = Path(ADAPTER if self.absorb else "")
        path = self.work.path(content.file)
        write_tensors(path, content.tensors, self._contents(content, owners), content.metadata)
        self.work.place(content.file, inside / content.file)
        if not self.absorb:  # the configuration is written last: it completes the folder
            self.work.settle()
        self.work.put(inside / ADAPTER_CONFIG, pretty(content.config))

    def _content(self, layers: Mapping[str, LayerState]) -> FolderContent:
        """The content of a folder that has these layers."""
        base = self.work.out if self.absorb else self.folder.path
        return folder_content(
            AdapterState(
                self.config, dict(layers), base_model=str(base), experts=self._stored_experts
            ),
            START if self.absorb else NATIVE,
            module_names=self.folder.module_names,
            fan_in_fan_out=any(getattr(weight, "transposed", False) for weight in self.weights),
            original=str(self.folder.path),
            task_type=self.folder.task_type,
        )

    @cached_property
    def _stored_experts(self) -> dict[str, StoredExperts]:
        """What checkpoints of the model store for its experts."""
        architecture = self.folder.architecture
        if architecture is None or not self.modules:
            return {}
        return stored_experts(architecture.model)

    def _state(self, weight: StoredWeight | StoredStack, loaded: bool) -> LayerState:
        """The layer, with its factors, or with factors on the meta device unless `loaded`."""
        found = [self.records[matrix.layer, matrix.expert] for matrix in weight.matrices()]
        states = [record.state(path if loaded else None) for record, path in found]
        if isinstance(weight, StoredStack):
            return stacked(states)
        return replace(states[0], kernel=weight.kernel)

    def _contents(
        self, content: FolderContent, owners: Mapping[str, str]
    ) -> Iterator[Range | Tensor]:
        """The content of each tensor of the adapter."""
        linear = (w for w in self.weights if not isinstance(w, StoredStack))
        found = (self.records[weight.name, None] for weight in linear)
        ranges = (part for record, path in found for part in record.ranges(path))
        module = ""
        tensors: dict[str, Tensor] = {}
        for name in content.tensors:
            if name not in owners:
                yield next(ranges)
                continue
            if owners[name] != module:
                module, tensors = owners[name], {}  # frees these before the next ones are loaded
                loaded = {w.name: self._state(w, loaded=True) for w in self.modules[module]}
                tensors = dict(self._content(loaded).tensors)
            yield tensors[name]

    def _check_found(self, content: FolderContent, owners: Mapping[str, str]) -> None:
        """Raises ValueError unless the adapter has both factors of every weight from which a start
        was subtracted, and its `target_modules` match exactly these layers of the model.
        """
        linear = {w.name for w in self.weights if not isinstance(w, StoredStack)}
        targets = content.config["target_modules"]
        found = set(match_names(self.folder.module_names, targets)) if targets else set()
        others = {name: t for name, t in content.tensors.items() if name not in owners}
        stored = set(split_tensors(others)[0]) if others else set()
        missing = self.modules.keys() - set(owners.values())
        if wrong := (linear ^ found) | (linear ^ stored) | missing:
            raise ValueError(
                f"{min(wrong)!r} has a start in the weights or in the adapter only, and nothing "
                "was written: this is an error of lora_kernels, please report it"
            )
