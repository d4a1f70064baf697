"""A checkpoint's model, built from its configuration on the meta device: its modules, and where the
files store their weights.

transformers gives modules other names than older files have, splits and joins tensors while it
loads them, and ties some to others. Only the model itself, and transformers' own table of
conversions, say which tensor of a file is the weight of which layer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

# No code of the model's folder is run, and nobody is asked whether to run it.
_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# transformers' names of PEFT's tasks.
_TASKS = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
}


@dataclass(frozen=True)
class Architecture:
    """A model without values, and the names of its tensors in the files.

    Attributes:
        model: on the meta device, of the class that `config.json` names.
        stored: {name of a parameter or buffer: name in the files} of tensors that are loaded as
            they are.
        converted: the names of parameters that loading computes from one or more stored tensors.
        unused: the names in the files that the model does not load, under the names that they would
            have in the model.

    """

    model: nn.Module
    stored: dict[str, str]
    converted: frozenset[str]
    unused: dict[str, str] = field(default_factory=dict)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules but the model itself, under all their names."""
        return {n: m for n, m in self.model.named_modules(remove_duplicate=False) if n}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters under all their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def tied(self, name: str) -> list[str]:
        """The names of a parameter in other modules, with which the module shares it."""
        own = self._owner(name)
        names = self._names.get(id(self.parameters.get(name)), ())
        return [n for n in names if self._owner(n) is not own]

    def _owner(self, name: str) -> nn.Module | None:
        return self.modules.get(name.rpartition(".")[0])

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            found.setdefault(id(parameter), []).append(name)
        return found


def read_architecture(
    path: Path,
    tensors: Iterable[str],
    kind: str = "",
    num_labels: int | None = None,
    vocab_size: int | None = None,
) -> Architecture | str:
    """The architecture of the model in the folder `path`, whose files have these tensors; or the
    reason why it is not known.

    `kind` is the name of another class than the configuration names; `num_labels` of a classifier
    and `vocab_size` replace the configuration's.
    """
    if find_spec("transformers") is None:
        return "transformers is not installed"
    with _quiet():
        model = _model_on_meta(path, kind, num_labels, vocab_size)
        if isinstance(model, str):
            return model
        return _matched(model, tensors)


def _model_on_meta(
    path: Path, kind: str, num_labels: int | None, vocab_size: int | None
) -> nn.Module | str:
    """The model of the class that `config.json` names, or the reason why there is none."""
    import transformers

    options = _OPTIONS if num_labels is None else {**_OPTIONS, "num_labels": num_labels}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        if vocab_size is not None:
            config.get_text_config().vocab_size = vocab_size
        cls = model_class(config, kind)
        if cls is None:
            return f"transformers has no model of the type {config.model_type!r}"
        with torch.device("meta"):
            model = cls._from_config(config)
        model.tie_weights()
    except Exception as error:  # a stranger's configuration; huggingface_hub has its own errors
        first = " ".join(str(error).split()) or type(error).__name__
        return f"transformers cannot build it from its configuration ({first})"
    return model


def model_class(config: Any, kind: str = "") -> Any:
    """The class of transformers that is called `kind`, that the configuration names, or that of its
    base model; None if there is none.
    """
    import transformers

    for name in (kind, *(config.architectures or ())):
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.MODEL_MAPPING.get(type(config), None)


def classes_for(path: Path, task_type: str | None) -> list[str]:
    """The names of the classes that transformers has for the model in a folder, those for PEFT's
    task first.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    config = type(AutoConfig.from_pretrained(path, **_OPTIONS))
    mappings = {name: value for name, value in vars(auto).items() if name.endswith("_MAPPING")}
    first = [f"MODEL_FOR_{_TASKS[task_type]}_MAPPING"] if task_type in _TASKS else []
    first += [f"MODEL_FOR_{task}_MAPPING" for task in _TASKS.values()]
    found: dict[str, None] = {}
    for name in dict.fromkeys([*first, *mappings]):
        classes = mappings[name].get(config, ()) if name in mappings else ()
        for cls in classes if isinstance(classes, (list, tuple)) else (classes,):
            found[cls.__name__] = None
    return list(found)


def _matched(model: nn.Module, tensors: Iterable[str]) -> Architecture | str:
    """Matches the names in the files with the model's, as `from_pretrained` does."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return "this version of transformers (before 5) has no table of renamed modules"
    foreign: Any = model  # a transformers.PreTrainedModel
    mapping = get_model_conversion_mapping(foreign)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), foreign.base_model_prefix
    results = {
        source: entry.target_patterns for entry in converters for source in entry.source_patterns
    }
    stored, converted, unused = {}, set(), {}
    for name in sorted(tensors, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:
            new, pattern = rename_source_key(name, [], [], prefix, known)
        # A converter may split a tensor into several, of which `new` is the first.
        parts = [] if pattern is None else results[pattern]
        made = {new.replace(parts[0], part) for part in parts} & known.keys()
        if made:
            converted |= made
        elif new in known:
            stored[new] = name
        else:
            unused[new] = name
    weights = [name for name in (*stored, *converted, *unused) if name.endswith(".weight")]
    foreign_weights = [name for name in weights if name in unused]
    if foreign_weights and 2 * len(foreign_weights) >= len(weights):
        return (
            f"{type(model).__name__}, the class in its configuration, does not have most of the "
            f"weights in its files ({foreign_weights[0]} ...)"
        )
    return Architecture(model, stored, frozenset(converted), unused)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what transformers says while it builds a model that is not used for computing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
