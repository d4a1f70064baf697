"""Which layers PEFT adapts when it loads a folder: those that the configuration selects. PEFT
ignores the tensors of other layers without an error.

The rules are in PEFT 0.21.2 in `tuners/tuners_utils.py` (`check_target_module_exists`,
`_maybe_include_all_linear_layers`, `_inject_parameters`), `tuners/lora/model.py` (a table of
targets for each type of model, for configurations without targets) and `tuners/lora/config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from ....._utils.names import ALL_LINEAR
from .....layers.kinds import is_conv1d
from ...remedies import renaming
from ...stored import LINEAR, StoredAdapter, plain_name, selected_name
from ...updates import parameter_of, saved_modules
from ..model import FOUND, RENAMED, SERVED, BaseModel
from ..verdict import Ignored, Verdict

# Output layers, which "all-linear" leaves out, if the base does not tell.
_OUTPUTS = ("lm_head", "embed_out")
_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

Test = Callable[[str], bool]


def unselected(
    verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None
) -> dict[str, Ignored]:
    """The layers that the configuration does not select. Refuses what PEFT does not load."""
    config = adapter.config
    try:
        selects = _selection(verdict, config, base)
    except re.error as error:
        verdict.refuse(
            f"an option that selects layers is not a regular expression: {error}",
            verdict.portable,
        )
        return {}
    if selects is None:
        return {}
    found = {}
    for name, layer in adapter.layers.items():
        parameter = parameter_of(config, layer)
        if parameter is not None:
            chosen = _ends(parameter, config.get("target_parameters") or ())
            options = "target_parameters"
        else:
            chosen = selects(_name_in_base(selected_name(name), base)) and not (
                _is_all_linear(config) and layer.kind != LINEAR
            )
            options = "target_modules"
        if not chosen:
            remedy = _remedy(verdict, name, base)
            if parameter is not None:
                target = ".".join(parameter.split(".")[-2:])
                remedy = f"add {target!r} to target_parameters in adapter_config.json"
            found[name] = Ignored(_reason(config, options), remedy=remedy)
    remedies = {ignored.remedy for ignored in found.values()}
    _refuse_nothing(
        verdict, config, base, selects, remedies.pop() if len(remedies) == 1 else verdict.portable
    )
    return found


def _remedy(verdict: Verdict, name: str, base: BaseModel | None) -> str:
    """A portable folder has full names, which must be the base's: a wrong name needs renaming."""
    return renaming(name, _name_in_base(name, base)) or verdict.portable


def _reason(config: Mapping[str, Any], option: str) -> str:
    others = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    given = [name for name in others if config.get(name) not in (None, [], "", {})]
    if option == "target_parameters":
        given = []
    return f"the configuration ({', '.join([option, *given])}) does not select it"


def _name_in_base(name: str, base: BaseModel | None) -> str:
    """The module's name in the base, where PEFT looks for it."""
    module = plain_name(name)
    if base is None or not base.modules or ".experts" in module:
        return module
    place = base.place(name)
    known = place.kind in (FOUND, RENAMED, SERVED)
    return place.name if known and place.name is not None else module


def _selection(verdict: Verdict, config: Mapping[str, Any], base: BaseModel | None) -> Test | None:
    """Tests whether the configuration selects a module by name; None if that cannot be told."""
    targets = config.get("target_modules")
    if targets is None:
        targets = _targets_of_type(verdict, config, base)
        if targets is None:
            return None
    excluded = _excluded(config)
    if isinstance(targets, str):
        test = _all_linear(base) if _is_all_linear(config) else _matching(targets)
    else:
        ends = tuple(str(target) for target in targets)
        test = _listed(ends, config)
    return lambda name: not excluded(name) and test(name)


def _targets_of_type(verdict: Verdict, config: Mapping[str, Any], base: BaseModel | None) -> Any:
    """PEFT's own targets for the base's type of model; None if they are unknown, or if PEFT refuses
    a configuration without targets.
    """
    parameters = config.get("target_parameters")
    if base is None:
        verdict.notes.append(
            "target_modules is null: PEFT adapts the layers that its table has for the base's type "
            "of model, and ignores other tensors; which these are is not known (--base). "
            f"{verdict.portable}"
        )
        return None
    if find_spec("peft") is None:
        verdict.notes.append(
            "target_modules is null: which layers PEFT's table has for the base's type of model "
            f"is not known, since peft is not installed. {verdict.portable}"
        )
        return None
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    kind = str(base.config.get("model_type"))
    if kind in TABLE:
        return TABLE[kind]
    if not parameters:
        verdict.refuse(
            f"target_modules is null, and PEFT has no targets for the type {kind!r}",
            verdict.portable,
        )
        return None
    return ()


def _refuse_nothing(
    verdict: Verdict,
    config: Mapping[str, Any],
    base: BaseModel | None,
    selects: Test,
    remedy: str,
) -> None:
    """Refuses a selection without any module, as PEFT does."""
    targets = config.get("target_modules")
    if config.get("target_parameters") or config.get("layer_replication"):
        return
    nothing = targets is not None and not targets
    if base is not None and base.modules:
        nothing = not any(selects(name) for name in base.modules if name)
    if nothing:
        verdict.refuse("the configuration selects no module of the base", remedy)


def _is_all_linear(config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _all_linear(base: BaseModel | None) -> Test:
    """Selects all linear layers except the output layer."""
    if base is None or base.architecture is None:
        return lambda name: name.rpartition(".")[2] not in _OUTPUTS
    model: Any = base.architecture.model
    output = model.get_output_embeddings()
    modules = base.modules

    def selects(name: str) -> bool:
        module = modules.get(name)
        if module is None:  # experts: their older names are not names of modules
            return ".experts" in name
        return (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not output

    return selects


def _matching(pattern: str) -> Test:
    compiled = re.compile(pattern)
    return lambda name: compiled.fullmatch(name) is not None


def _listed(targets: tuple[str, ...], config: Mapping[str, Any]) -> Test:
    """Selects full names, or endings inside the blocks that `layers_to_transform` names."""
    blocks = config.get("layers_to_transform")
    patterns = config.get("layers_pattern") or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    indices = [re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.") for pattern in patterns]

    def selects(name: str) -> bool:
        if name in targets or not _ends(name, targets):
            return name in targets
        if blocks is None or blocks == []:
            return True
        matches = (index.match(name) for index in indices or [_INDEX])
        found = next((match for match in matches if match), None)
        if found is None:
            return False
        return int(found["idx"]) in (blocks if isinstance(blocks, list) else [blocks])

    return selects


def _excluded(config: Mapping[str, Any]) -> Test:
    excluded = config.get("exclude_modules") or ()
    pattern = re.compile(excluded) if isinstance(excluded, str) else None
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in saved_modules(config)]

    def excludes(name: str) -> bool:
        by_option = pattern.fullmatch(name) if pattern else _ends(name, excluded)
        return bool(by_option) or any(module.match(name) for module in saved)

    return excludes


def _ends(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)
