"""The base model as far as its configuration tells: classes, dtype, and the names and shapes of its
modules, which transformers builds without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...._utils.model_files import read_json
from ....layers.kinds import is_conv1d
from ...checkpoint.architecture import Architecture, classes_for, read_architecture
from ...checkpoint.folder import CONFIG
from ..stored import plain_name

_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float": torch.float32,
    "float16": torch.float16, "half": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
# Where multimodal models keep the text model.
TEXT_MODEL = "language_model"
_BLOCK = re.compile(r"\.\d+\.")
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.[^.]+")

FOUND, TEXT, SERVED, RENAMED, MISSING = "found", "text", "served", "renamed", "missing"


def matrix_shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear layer; (hidden, vocabulary) of an embedding; None of others."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return None
    if weight is None or weight.dim() != 2:
        return None
    rows, cols = weight.shape
    return (cols, rows) if is_conv1d(module) else (rows, cols)


@dataclass(frozen=True)
class Place:
    """Where a layer of an adapter is in the base.

    Attributes:
        kind: FOUND: the base has a module of this name. TEXT: the name is that of the text model
            alone, and the base has it inside another model. SERVED: the same after
            "language_model.", as servers call it. RENAMED: an older name of transformers. MISSING:
            no module.
        name: the module, or the most similar one; None if nothing is similar.

    """

    kind: str
    name: str | None = None


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        path: its folder, or its `config.json`.
        config: the content of `config.json`.
        architecture: the model on the meta device; None if it is not known.
        unknown: why it is not known.
        assumed: the class that is taken for granted, if the configuration names none.
        older: {older name of a module: module}, by transformers' table of renamed modules, for the
            layers of the adapter.

    """

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture | None
    unknown: str = ""
    assumed: str = ""
    older: Mapping[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """The names in the configuration, or the one that is assumed."""
        found = self.config.get("architectures")
        if isinstance(found, list) and found:
            return [str(name) for name in found]
        return [self.assumed] if self.assumed else []

    @property
    def text_config(self) -> Mapping[str, Any]:
        """That of the text model, if it is one of several; else the whole configuration."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    def option(self, name: str) -> Any:
        """An option, of the text model first."""
        value = self.text_config.get(name)
        return self.config.get(name) if value is None else value

    def is_tied(self, name: str) -> bool | None:
        """Whether the layer has its weight from another one; None if that is not known.

        The built model knows more than its configuration file, whose classes have defaults.
        """
        if self.architecture is not None:
            place = self.place(name)
            return bool(self.architecture.tied(f"{place.name or name}.weight"))
        value = self.option("tie_word_embeddings")
        return None if value is None else bool(value)

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the weights; None if the configuration does not say."""
        for config in (self.config, self.text_config):
            for option in ("dtype", "torch_dtype"):
                found = _DTYPES.get(str(config.get(option)).removeprefix("torch."))
                if found is not None:
                    return found
        return None

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """{} if they are not known."""
        return {} if self.architecture is None else self.architecture.modules

    @cached_property
    def is_multimodal(self) -> bool:
        """Whether the text model is inside another one."""
        return any(TEXT_MODEL in name.split(".") for name in self.modules)

    @cached_property
    def linear_names(self) -> frozenset[str]:
        """The last parts of the names of linear layers and embeddings."""
        kinds = (nn.Linear, nn.Embedding)
        found = {n.rpartition(".")[2] for n, m in self.modules.items()
                 if isinstance(m, kinds) or is_conv1d(m)}  # fmt: skip
        return frozenset(found)

    def shape(self, name: str) -> tuple[int, int] | None:
        """(out, in) of a linear layer; (hidden, vocabulary) of an embedding; None of others."""
        return matrix_shape(self.modules.get(name))

    def place(self, name: str) -> Place:
        """Where the layer of that name is; the modules have to be known."""
        module = plain_name(name)
        if module in self.modules:
            return Place(FOUND, module)
        expert = _EXPERT.fullmatch(module)
        if expert:
            experts = self.place(expert[1])
            if experts.kind != MISSING and experts.name is not None:
                return Place(experts.kind, experts.name + module.removeprefix(expert[1]))
        inner = self._text_modules.get(module)
        if inner is not None:
            return Place(TEXT, inner)
        inner = self._text_modules.get(module.removeprefix(f"{TEXT_MODEL}."))
        if inner is not None:
            return Place(SERVED, inner)
        if module in self.older:
            return Place(RENAMED, self.older[module])
        return Place(MISSING, self._similar(module))

    def is_text(self, place: Place) -> bool:
        """Whether a layer is one of the text model of a multimodal model."""
        parts = (place.name or "").split(".")
        return TEXT_MODEL in parts or parts[-1] == "lm_head"

    @cached_property
    def _text_modules(self) -> dict[str, str]:
        """{name in the text model alone: name in the base}."""
        found = {}
        for name in self.modules:
            before, part, rest = name.partition(f"{TEXT_MODEL}.")
            if part and (not before or before.endswith(".")):
                found[rest if rest.startswith(("model.", "lm_head")) else f"model.{rest}"] = name
        return {text: name for text, name in found.items() if text not in self.modules}

    def _similar(self, name: str) -> str | None:
        """The module whose name ends with the longest end of `name`, if there is only one, or only
        one in the text model.
        """
        parts = name.split(".")
        for start in range(1, len(parts)):
            end = "." + ".".join(parts[start:])
            found = [module for module in self.modules if f".{module}".endswith(end)]
            inside = [module for module in found if TEXT_MODEL in module.split(".")]
            for modules in (found, inside):
                if len(modules) == 1:
                    return modules[0]
            if found:
                return None
        return None


def read_base(path: Path, layers: Iterable[str] = ()) -> BaseModel:
    """Reads the configuration of a base: a folder with `config.json`, or the file itself.

    `layers` are the names of an adapter's layers, some of which may be older names of modules.

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: it is no configuration.

    """
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give the folder of a model, or its {CONFIG}")
    config = read_json(file)
    if "peft_type" in config:
        raise ValueError(
            f"{file} is the configuration of an adapter: give the folder of the model that it was "
            "trained on, or the model's config.json"
        )
    if "_class_name" in config and "architectures" not in config:
        return BaseModel(path, config, None, "it is a model of diffusers")
    kind = "" if config.get("architectures") else _likely_class(path)
    found = read_architecture(path, [], kind)
    if isinstance(found, str):
        return BaseModel(path, config, None, found)
    base = BaseModel(path, config, found, assumed=kind)
    return replace(base, older=_older_names(base, found, {plain_name(name) for name in layers}))


def _older_names(base: BaseModel, architecture: Architecture, layers: set[str]) -> dict[str, str]:
    """{older name: module} of layers that have no module of their name."""
    names = {
        f"{name}.weight": name for name in layers if base.place(name).kind in (SERVED, MISSING)
    }
    if not names:
        return {}
    ends = tuple({".".join(name.split(".")[-3:]) for name in names})
    # The model's other weights are given, too, so that these are not taken for a stranger's.
    own = architecture.parameters
    weights = [n for n in own if n.endswith(".weight") and not n.endswith(ends)]
    read = read_architecture(base.path, [*weights, *names], base.assumed)
    if isinstance(read, str):
        return {}
    found = {names[old]: new.removesuffix(".weight")
             for new, old in read.stored.items() if old in names}  # fmt: skip
    # Experts, of which many tensors become one.
    taken = {*read.stored.values(), *weights}
    for name in (n for n in names if n not in taken and _EXPERT.fullmatch(names[n])):
        block = _BLOCK.search(name)
        same = [new for new in sorted(read.converted) if block and block[0] in new]
        if same and name not in read.unused.values():
            found[names[name]] = same[0]
    # A beginning that is added or left out is transformers' way with headless models.
    return {old: new for old, new in found.items()
            if not new.endswith(f".{old}") and not old.endswith(f".{new}")}  # fmt: skip


def _likely_class(path: Path) -> str:
    """The first class that transformers has for a configuration that names none: that of a language
    model, if there is one; "" if it has none.
    """
    try:
        return next(iter(classes_for(path, None)), "")
    except Exception:  # a stranger's configuration; read_architecture says more
        return ""
