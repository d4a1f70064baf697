"""The model of a checkpoint, built from its configuration on the meta device: its modules, and
which tensors of the files hold their weights.

transformers may give modules other names than the files have, splits and joins tensors while it
loads them, and ties some tensors to others. Only the model and transformers' table of conversions
tell which tensor of a file is the weight of which layer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Code in the model's folder is never run, and the user is not asked whether to run it.
_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# transformers' names for PEFT's tasks.
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
        model: the model on the meta device, of the class that `config.json` names.
        stored: {name of a parameter or buffer: name in the files} of the tensors that are loaded
            unchanged.
        sources: {name of a parameter: the tensors from which loading computes it}; the tensors are
            {name before the conversion: name in the files}.
        unused: {name that the tensor would have in the model: name in the files} of the tensors
            that the model does not load.
        names: transformers' rules for the names in the files.

    """

    model: nn.Module
    stored: dict[str, str]
    sources: Mapping[str, Mapping[str, str]]
    unused: dict[str, str] = field(default_factory=dict)
    names: StoredNames | None = None

    @property
    def converted(self) -> Collection[str]:
        """The names of parameters that loading computes from one or more stored tensors."""
        return self.sources.keys()

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules except the model itself, under all their names."""
        return {n: m for n, m in self.model.named_modules(remove_duplicate=False) if n}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters under all their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def tied(self, name: str) -> list[str]:
        """The parameter's names in other modules that share it."""
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
    reason why it is unknown.

    `kind` is the name of a class to use instead of the configuration's. `num_labels` of a
    classifier and `vocab_size` replace the configuration's values.
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
    except Exception as error:  # any configuration may come; huggingface_hub has its own errors
        first = " ".join(str(error).split()) or type(error).__name__
        return f"transformers cannot build it from its configuration ({first})"
    return model


def model_class(config: Any, kind: str = "") -> Any:
    """The class of transformers that is called `kind`, or that the configuration names, or else the
    class of its base model; None if there is none.
    """
    import transformers

    for name in (kind, *(config.architectures or ())):
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.MODEL_MAPPING.get(type(config), None)


def classes_for(path: Path, task_type: str | None) -> list[str]:
    """The names of transformers' classes for the model in a folder; the classes for PEFT's task
    come first.
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


class StoredNames:
    """transformers' rules by which `from_pretrained` maps a name in the files to a tensor of the
    model.

    Raises:
        ImportError: transformers is older than version 5.

    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import conversion_mapping
        from transformers import core_model_loading as loading

        foreign: Any = model  # a transformers.PreTrainedModel
        mapping = conversion_mapping.get_model_conversion_mapping(foreign)
        self._loading: Any = loading
        self._renamings = [e for e in mapping if isinstance(e, loading.WeightRenaming)]
        self._converters = [e for e in mapping if isinstance(e, loading.WeightConverter)]
        self._known, self._prefix = model.state_dict(), foreign.base_model_prefix

    def sorted(self, names: Iterable[str]) -> list[str]:
        """The names in the order in which they are loaded: expert 2 before expert 10."""
        return sorted(names, key=self._loading.dot_natural_key)

    def in_model(self, name: str) -> tuple[str, str | None]:
        """The name of the tensor in the model, and the pattern of the conversion that computes it,
        if any. If the conversion makes several tensors, the name is that of the first.
        """
        rename, rules = self._loading.rename_source_key, (self._renamings, self._converters)
        new, pattern = rename(name, *rules, self._prefix, self._known)
        if new not in self._known and name in self._known:
            new, pattern = rename(name, [], [], self._prefix, self._known)
        return new, pattern

    def made(self, new: str, pattern: str) -> list[str]:
        """The tensors that a conversion makes; `new` and `pattern` are the result of `in_model`."""
        targets = next(c.target_patterns for c in self._converters if pattern in c.source_patterns)
        return [name for t in targets if (name := new.replace(targets[0], t)) in self._known]

    def before_conversion(self, name: str) -> str:
        """The name after all renamings but before a conversion. All names that files may have for a
        tensor lead to the same name.
        """
        renamed = self._loading.apply_renamings(name, self._renamings)
        converted, _ = self._loading.apply_converters(renamed, self._converters)
        new, _ = self.in_model(name)
        prefix = f"{self._prefix}."
        if new == prefix + converted:
            return prefix + str(renamed)
        return str(renamed).removeprefix(prefix if converted == prefix + new else "")


def _matched(model: nn.Module, tensors: Iterable[str]) -> Architecture | str:
    """Matches the names in the files with the model's, as `from_pretrained` does."""
    try:
        names = StoredNames(model)
    except ImportError:
        return "this version of transformers (before 5) has no table of renamed modules"
    known = model.state_dict()
    stored: dict[str, str] = {}
    unused: dict[str, str] = {}
    sources: dict[str, dict[str, str]] = {}
    for name in names.sorted(tensors):
        new, pattern = names.in_model(name)
        made = [] if pattern is None else names.made(new, pattern)
        for parameter in made:
            sources.setdefault(parameter, {})[names.before_conversion(name)] = name
        if not made and new in known:
            stored[new] = name
        elif not made:
            unused[new] = name
    weights = [name for name in (*stored, *sources, *unused) if name.endswith(".weight")]
    foreign_weights = [name for name in weights if name in unused]
    if foreign_weights and 2 * len(foreign_weights) >= len(weights):
        return (
            f"{type(model).__name__}, the class in its configuration, does not have most of the "
            f"weights in its files ({foreign_weights[0]} ...)"
        )
    return Architecture(model, stored, sources, unused, names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' messages while it builds a model that is not used for computing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
