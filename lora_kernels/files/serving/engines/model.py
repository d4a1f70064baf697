"""What a base model's configuration tells: the classes, the dtype, and the names and shapes of the
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
# The module of multimodal models that holds the text model.
TEXT_MODEL = "language_model"
_BLOCK = re.compile(r"\.\d+\.")
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.[^.]+")

FOUND, TEXT, SERVED, RENAMED, MISSING = "found", "text", "served", "renamed", "missing"


def matrix_shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear layer; (hidden, vocabulary) of an embedding; None for other modules."""
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
        kind: FOUND: the base has a module of this name. TEXT: the name is that of a text model
            alone, which the base has inside another model. SERVED: the same, after
            "language_model.", as servers call it. RENAMED: the name is an older one of
            transformers. MISSING: there is no such module.
        name: the module's name, or the most similar name; None if no name is similar.

    """

    kind: str
    name: str | None = None


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        path: the model's folder, or its `config.json`.
        config: the content of `config.json`.
        architecture: the model on the meta device; None if it is unknown.
        unknown: why the architecture is unknown.
        assumed: the class that is assumed if the configuration names none.
        older: {older name of a module: module} for the layers of the adapter, by transformers'
            table of renamed modules.

    """

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture | None
    unknown: str = ""
    assumed: str = ""
    older: Mapping[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """The names of the classes in the configuration, or of the assumed class."""
        found = self.config.get("architectures")
        if isinstance(found, list) and found:
            return [str(name) for name in found]
        return [self.assumed] if self.assumed else []

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The text model's configuration if there is one; else the whole configuration."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    def option(self, name: str) -> Any:
        """The value of an option; the text model's has priority."""
        value = self.text_config.get(name)
        return self.config.get(name) if value is None else value

    def is_tied(self, name: str) -> bool | None:
        """Whether the layer shares its weight with another layer; None if that is unknown.

        The built model knows more than the configuration file, because the classes have defaults.
        """
        if self.architecture is not None:
            place = self.place(name)
            return bool(self.architecture.tied(f"{place.name or name}.weight"))
        value = self.option("tie_word_embeddings")
        return None if value is None else bool(value)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None if the configuration does not say."""
        for config in (self.config, self.text_config):
            for option in ("dtype", "torch_dtype"):
                found = _DTYPES.get(str(config.get(option)).removeprefix("torch."))
                if found is not None:
                    return found
        return None

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules by name; {} if they are unknown."""
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
        """(out, in) of a linear layer; (hidden, vocabulary) of an embedding; None for others."""
        return matrix_shape(self.modules.get(name))

    def place(self, name: str) -> Place:
        """Where the layer of that name is. The modules must be known."""
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
        """Whether the place is in the text model of a multimodal model."""
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
        """The module that shares the longest end of its name with `name`, if only one module has
        it, or only one in the text model.
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

    `layers` are the names of an adapter's layers, which may include older names of modules.

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: the file is not a configuration.

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
    """{older name: module} for the layers that have no module of their name."""
    names = {
        f"{name}.weight": name for name in layers if base.place(name).kind in (SERVED, MISSING)
    }
    if not names:
        return {}
    ends = tuple({".".join(name.split(".")[-3:]) for name in names})
    # The model's other weights are added: otherwise the names would look like another model's.
    own = architecture.parameters
    weights = [n for n in own if n.endswith(".weight") and not n.endswith(ends)]
    read = read_architecture(base.path, [*weights, *names], base.assumed)
    if isinstance(read, str):
        return {}
    found = {names[old]: new.removesuffix(".weight")
             for new, old in read.stored.items() if old in names}  # fmt: skip
    # Experts, whose many tensors become one.
    taken = {*read.stored.values(), *weights}
    for name in (n for n in names if n not in taken and _EXPERT.fullmatch(names[n])):
        block = _BLOCK.search(name)
        same = [new for new in sorted(read.converted) if block and block[0] in new]
        if same and name not in read.unused.values():
            found[names[name]] = same[0]
    # transformers itself adds or removes the first part of names for models without a head.
    return {old: new for old, new in found.items()
            if not new.endswith(f".{old}") and not old.endswith(f".{new}")}  # fmt: skip


def _likely_class(path: Path) -> str:
    """The first class that transformers has for a configuration that names none; the class of a
    language model has priority. "" if there is none.
    """
    try:
        return next(iter(classes_for(path, None)), "")
    except Exception:  # any configuration may come here; read_architecture says more
        return ""
