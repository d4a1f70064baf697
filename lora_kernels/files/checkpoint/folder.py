"""The folder of a Hugging Face model: its files, the names of its modules, and its copies."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._utils.model_files import INDEX, model_files, read_json
from ..._utils.safetensors import DTYPES, Entry, Layout, read_layout
from ...layers.kinds import is_conv1d
from ..io.blocks import divide
from ..io.journal import JournaledFolder, identity
from ..io.pipeline import Shard
from .architecture import Architecture, read_architecture
from .residual import is_start
from .weights import StoredWeight, is_head, is_transposed, stored_weights

CONFIG = "config.json"
# Files that hold the unchanged weights in other formats: a copy with new weights leaves them out.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
            ".onnx_data", ".ot", ".tflite", ".index.json")  # fmt: skip


# For models that transformers does not know: {type of a model: the first part of its modules'
# names, which may be missing in the files}.
_PREFIXES = {"gpt2": "transformer", "openai-gpt": "transformer", "bloom": "transformer"}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class ModelFolder:
    """A folder with `config.json` and safetensors files, with an index if there are several.

    `kind` is the name of a class of transformers to use instead of the configuration's, if the
    adapter's task needs another head; `num_labels` is the size of that head. `vocab_size` is the
    size of a resized vocabulary.

    Raises:
        ValueError: files are damaged or do not belong to a model.
        FileNotFoundError: files are missing.

    """

    path: Path
    kind: str = ""
    num_labels: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.path.is_file():
            raise ValueError(f"{self.path} is a file: give the folder of a model")
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist")
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(f"{self.path} has no {CONFIG}: give the folder of a model")
        kinds = {"architectures": list, "model_type": str, "text_config": dict}
        for name, kind in kinds.items():
            if not isinstance(self.config.get(name) or kind(), kind):
                raise ValueError(
                    f"{self.path / CONFIG} has {name} = {self.config[name]!r}, which is not that "
                    "of a model"
                )

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / CONFIG)

    @cached_property
    def layouts(self) -> dict[Path, Layout]:
        """The layouts of the shards, in the order of the index."""
        files = list(model_files(self.path))
        for file in files:
            if file.parent != self.path:
                raise ValueError(f"{INDEX} names {file}, which is not in {self.path} itself")
        layouts = {file: read_layout(file) for file in files}
        owners: dict[str, Path] = {}
        for file, layout in layouts.items():
            for entry in layout.entries:
                if owners.setdefault(entry.name, file) != file:
                    raise ValueError(
                        f"{entry.name!r} is in both {owners[entry.name].name} and {file.name} of "
                        f"{self.path}: it is unclear which of the two the model uses"
                    )
        return layouts

    @cached_property
    def _read_architecture(self) -> Architecture | str:
        return read_architecture(
            self.path, self.stored_names, self.kind, self.num_labels, self.vocab_size
        )

    @property
    def architecture(self) -> Architecture | None:
        """The model that transformers makes of the folder; None if it cannot."""
        found = self._read_architecture
        return None if isinstance(found, str) else found

    @property
    def assumption(self) -> str:
        """What is assumed about the layers, and why, if the architecture is unknown; else ""."""
        found = self._read_architecture
        if not isinstance(found, str):
            return ""
        return (
            f"{found}: it is assumed that every 2-D weight is that of a linear layer unless its "
            "name is one of an embedding, and that its name in the files is its name in the model"
        )

    @cached_property
    def entries(self) -> dict[str, tuple[Path, Entry]]:
        """The file and the entry of each tensor, by its name in the files."""
        layouts = self.layouts.items()
        return {entry.name: (file, entry) for file, layout in layouts for entry in layout.entries}

    @property
    def stored_names(self) -> list[str]:
        """The names of all tensors in the files."""
        return list(self.entries)

    @cached_property
    def prefix(self) -> str:
        """The prefix that the names in the files lack, if the architecture is unknown. It is ""
        except for some checkpoints that were saved without their output head.
        """
        prefix = _PREFIXES.get(self.config.get("model_type", ""))
        kinds = self.config.get("architectures") or [""]
        bare = prefix and not any(name.startswith(f"{prefix}.") for name in self.stored_names)
        headless = re.fullmatch(r"(GPT2|OpenAIGPT|Bloom)Model", str(kinds[0]))
        return f"{prefix}." if bare and not headless else ""

    def named_weights(
        self, targets: str | Sequence[str], exclude: str | Sequence[str] | None
    ) -> tuple[list[StoredWeight], dict[str, str]]:
        """The weights chosen by their names in the files, and {name: reason} for the others."""
        found = stored_weights(self.path, targets, exclude)
        weights = [replace(weight, name=self.module_name(weight.name)) for weight in found]
        skipped = {
            weight.name: "experts and routers of mixtures are not linear layers in a model"
            for weight in weights
            if self._in_mixture(weight.name)
        }
        return [weight for weight in weights if weight.name not in skipped], skipped

    def _in_mixture(self, layer: str) -> bool:
        """Whether the layer is an expert or a router of a mixture. These are not linear layers in
        the model: since version 5, transformers loads all experts into 3-D parameters.
        """
        owner, _, last = layer.rpartition(".")
        router = last in ("gate", "router") and f"{owner}.experts" in self.module_names
        return router or ".experts." in layer

    def is_transposed(self, layer: str) -> bool:
        """Whether the layer with that name in the model is a Conv1D, stored [in, out]."""
        if self.architecture is None:
            return is_transposed(self.config, layer)
        return is_conv1d(self.architecture.modules.get(layer))

    @property
    def task_type(self) -> str | None:
        """PEFT's name for the model's task, if the name of the model's class tells the task and
        PEFT's class for the task can run the model: "SEQ_2_SEQ_LM" needs token ids.
        """
        kind = str((self.config.get("architectures") or [""])[0])
        main_input = "input_ids"
        if self.architecture is not None:
            kind = type(self.architecture.model).__name__
            main_input = str(getattr(self.architecture.model, "main_input_name", main_input))
        if self.config.get("is_encoder_decoder"):
            is_text = kind.endswith("ForConditionalGeneration") and main_input == "input_ids"
            return "SEQ_2_SEQ_LM" if is_text else None
        return next((task for end, task in _TASKS.items() if kind.endswith(end)), None)

    @cached_property
    def tied(self) -> bool:
        """Whether the output head shares the input embedding's weight: as the configuration says,
        or else if no head is stored.
        """
        for config in (self.config, self.config.get("text_config") or {}):
            if "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return not any(is_head(name.rpartition(".")[0]) for name in self.stored_names)

    @cached_property
    def tensors(self) -> dict[str, str]:
        """{name in the model's state_dict: name in the files} of the tensors. Tensors that the
        model renames are also found by their names in the files, which older adapters use.
        """
        if self.architecture is None:
            return {self.module_name(name): name for name in self.stored_names}
        return {name: name for name in self.stored_names} | self.architecture.stored

    @cached_property
    def module_names(self) -> list[str]:
        """All modules of the model; if the model is unknown, all that contain a tensor."""
        if self.architecture is not None:
            return list(self.architecture.modules)
        found: dict[str, None] = {}
        for name in self.tensors:
            parts = name.split(".")
            found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts)))
        return list(found)

    def module_name(self, stored: str) -> str:
        """The name in the model of the tensor or module that the files call `stored`, if the
        architecture is unknown.
        """
        head = stored.partition(".")[0] in ("lm_head", "score", "classifier")
        return stored if head else self.prefix + stored

    @cached_property
    def others(self) -> list[Path]:
        """The files that are copied unchanged, as relative paths: tokenizer, code, license ..."""
        return sorted(self._walk(self.path))

    def identities(self) -> dict[str, str]:
        """The `identity` of each file that a copy depends on."""
        inputs = {file.name: identity(file) for file in self.layouts}
        return inputs | {str(n): identity(self.path / n) for n in (Path(CONFIG), *self.others)}

    def shards(
        self,
        edited: dict[Path, set[str]],
        work: JournaledFolder | None = None,
        dtype: torch.dtype | None = None,
        dropped: Collection[str] = (),
        added: Mapping[str, Tensor] | None = None,
        sliced: Collection[str] = (),
    ) -> list[Shard]:
        """The shards and their blocks. `edited` names the tensors to edit in each file; `sliced`
        names those of them that are edited slice by slice. Without `work` nothing is written, and
        only edited tensors are read. The target lacks the tensors in `dropped`, and its last shard
        also has the tensors in `added`.
        """
        shards = []
        for file, layout in self.layouts.items():
            names = edited.get(file, set())
            last = added if added and file == list(self.layouts)[-1] else {}
            shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in last.items()}
            kept = layout.cast(dtype).edited(dropped, {})
            target = work.path(file.name) if work else None
            blocks = divide(layout, kept, names, only_edited=work is None, sliced=sliced)
            shards.append(Shard(file, layout, target, kept.edited((), shapes), blocks, last))
        return shards

    def copy_others(self, work: JournaledFolder) -> None:
        """Copies all files except the shards, the index and `config.json`."""
        for name in self.others:
            shutil.copyfile(self.path / name, work.path("content"))
            work.place("content", name)

    def publish(
        self,
        work: JournaledFolder,
        shards: Sequence[Shard],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the index, and then `config.json`, with which the folder becomes a model.
        `options` are new values in `config.json`.
        """
        layouts = [shard.target_layout for shard in shards]
        changed = any(shard.target_layout is not shard.source_layout for shard in shards)
        if (self.path / INDEX).is_file():
            content = (self.path / INDEX).read_bytes()
            if changed:
                content = pretty(self._new_index(shards))
            work.put(INDEX, content)
        content = (self.path / CONFIG).read_bytes()
        config = dict(self.config) | dict(options or {})
        floats = {e.dtype for layout in layouts for e in layout.entries} & DTYPES.keys()
        if changed and len(floats) == 1:
            dtype = str(DTYPES[floats.pop()]).removeprefix("torch.")
            config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
        if config != self.config:
            content = pretty(config)
        work.settle()
        work.put(CONFIG, content)

    def _new_index(self, shards: Sequence[Shard]) -> dict[str, Any]:
        """The index with the size and the names of these shards."""
        index = read_json(self.path / INDEX)
        size = sum(shard.target_layout.data_size for shard in shards)
        index.setdefault("metadata", {})["total_size"] = size
        files = {entry.name: s.name for s in shards for entry in s.target_layout.entries}
        kept = {name: file for name, file in index["weight_map"].items() if name in files}
        index["weight_map"] = kept | {n: f for n, f in files.items() if n not in kept}
        return index

    def _walk(self, folder: Path) -> Iterator[Path]:
        for entry in os.scandir(folder):
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name.endswith(_WEIGHTS):
                continue
            if entry.is_dir(follow_symlinks=False):
                if not is_start(path):  # the start belongs to these very weights
                    yield from self._walk(path)
            elif entry.is_file() and path != self.path / CONFIG:
                yield path.relative_to(self.path)


def check_apart(model: Path, out: Path) -> None:
    """Raises ValueError if one of the two folders is inside the other."""
    one, other = model.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{out} and {model} are inside each other: write into another folder")


def check_outside(adapter: Path, out: Path) -> None:
    """Raises ValueError if the adapter is inside the folder to be written, or is that folder."""
    one, other = adapter.resolve(), out.resolve()
    if one == other or other in one.parents:
        raise ValueError(f"{adapter} is inside {out}, which is to be written: use another folder")


def pretty(content: dict[str, Any]) -> bytes:
    """JSON with line breaks."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
