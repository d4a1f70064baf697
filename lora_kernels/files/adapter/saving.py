"""`save_adapter` and `load_adapter`."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.model_files import read_json
from ..._utils.names import without_wrappers
from ..._utils.peft_names import ADAPTER_FILE
from ...init.sharded.agree import from_every, is_first_rank, shared
from ...init.sharded.layout import is_sharded
from ...init.sharded.whole import whole
from ...model.config import AdapterState
from ...model.experts.forward import SUFFIX
from ...model.install import original_weight, unwrapped
from ...model.install.sharded.fsdp import reshard
from ...model.lora import adapter_state, apply_state
from ...model.report import LoRAReport
from ...model.selection import input_embeddings, output_head
from .content import COMPONENTS, DIFFUSERS_FILE, NATIVE_FILE
from .folder import SavedAdapter, read_adapter, write_adapter
from .peft_format.experts.layouts import EACH
from .peft_format.experts.naming import is_converted_by_peft, stored_experts
from .peft_format.experts.placing import placed
from .peft_format.experts.writing import chosen_layout, expert_layers
from .peft_format.loading import differing_in_peft, lost_in_peft
from .peft_format.shapes import LAST_TWICE, attention_of
from .recipe import DIFFUSERS, read_recipe


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str | None = None,
    format: str = "peft",
    compress_to: int | None = None,
    dtype: torch.dtype | str | None = None,
    experts: str = "auto",
    component: str | None = None,
) -> SavedAdapter:
    """Writes an adapter of the model, by default the active one, with `write_adapter`.

    `experts` says how to store adapters of experts that the model has in one parameter. "each": a
    pair of 2-D matrices for each expert, with the names in the model's checkpoint. "stacked": as
    PEFT does since 0.19. "auto": the layout that this model's loaders read, which is "each" if the
    checkpoint has a tensor for each expert and PEFT converts such adapters. Otherwise, and for
    models for which vLLM reads nothing else, it is "stacked".

    `component` is the pipeline's model for format="diffusers": "unet", "transformer",
    "text_encoder" ...; None derives it from the model's class.

    If the vocabulary was resized since the model was loaded, the embeddings are stored too, as PEFT
    does. Warnings name the layers that PEFT will not find in the folder, and the limit of vLLM that
    a larger rank exceeds.

    For a sharded model, all processes have to call this function. The factors are gathered one by
    one, the first process writes, and an error in the first process is raised on all.

    Raises:
        ValueError: there is no adapter of that name; see `write_adapter`; or the processes have
            different layers, as the stages of a pipeline have.

    """
    own = _component(unwrapped(model), format) if component is None else component
    reshard(model)  # after a forward, FSDP2's modules may hold gathered parameters
    sharded = any(map(is_sharded, model.parameters()))
    keep = not sharded or is_first_rank()
    state = adapter_state(model, adapter_name, keep=keep)
    if sharded:
        _check_same_layers(state)

    def loaded_size() -> int | None:
        return _loaded_vocab_size(state.base_model)

    def write() -> SavedAdapter:
        return _written(model, state, folder, format, compress_to, dtype, experts, own)

    # Only the first process reads and writes files; the other processes may not have them.
    size = shared(0, loaded_size) if sharded else loaded_size()
    state.extra = _resized_embeddings(unwrapped(model), size, keep) | state.extra
    return shared(0, write) if sharded else write()


def _check_same_layers(state: AdapterState) -> None:
    """Raises ValueError if processes have different layers: the first writes only its own."""
    layers = from_every([*state.layers])
    if any(own != layers[0] for own in layers):
        raise ValueError(
            "the processes have different layers, as the stages of a pipeline have, and "
            "save_adapter would write those of the first process alone: on all processes of a "
            "stage call lora_kernels.model.lora.adapter_state(model), and on one of them "
            "lora_kernels.files.adapter.folder.write_adapter(folder, state)"
        )


def _written(
    model: nn.Module,
    state: AdapterState,
    folder: str | Path,
    format: str,
    compress_to: int | None,
    dtype: torch.dtype | str | None,
    experts: str,
    component: str,
) -> SavedAdapter:
    """`save_adapter` for an adapter whose factors are gathered."""
    stacks = expert_layers(state)
    if stacks:
        state.experts = stored_experts(unwrapped(model))
    if format != "native":
        _warn_of_second_names(unwrapped(model), state)
        layout = chosen_layout(state, experts) if stacks else ""
        _warn_of_lost_layers(unwrapped(model), state, layout)
        _warn_of_other_updates(unwrapped(model), state)
    if state.config.initializer.rewrites_base and any(
        layer.residual == "absorb" for layer in state.layers.values()
    ):
        warnings.warn(
            f"{type(state.config.initializer).__name__} has given the model another base, and "
            "this adapter belongs to it, not to the original: keep that base too "
            "(model.save_pretrained)",
            stacklevel=4,
        )
    modules = {without_wrappers(n): m for n, m in unwrapped(model).named_modules() if n}
    # Modules that this package has added to the model.
    inside = (*(f"{name}." for name in state.layers), *(f"{name}{SUFFIX}" for name in stacks))
    linear = [n for n, s in state.layers.items() if not s.embedding and n not in stacks]
    saved = write_adapter(
        folder,
        state,
        format=format,
        compress_to=compress_to,
        dtype=dtype,
        module_names=[name for name in modules if not name.startswith(inside)],
        fan_in_fan_out=bool(linear)
        and all(getattr(modules[name], "transposed", False) for name in linear),
        experts=experts,
        component=component,
    )
    if saved.warning:
        warnings.warn(saved.warning, stacklevel=4)
    return saved


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = True,
    residual_base: bool = False,
    expert_order: str = "auto",
    progress: bool = True,
) -> LoRAReport:
    """Adds the adapter in a folder to the model.

    Args:
        model: the base, which may have other adapters.
        folder: written by `save_adapter` or PEFT.
        adapter_name: the adapter's name in the model, where it becomes the active adapter.
        is_trainable: whether the adapter can be trained further.
        residual_base: whether `model` may be a residual base, from whose weights a start was
            subtracted: the base that PEFT made for an adapter of "pissa", "olora", "corda",
            "lora_ga" or "loftq", or that `lora-kernels init` wrote. The adapter belongs to that
            base and is wrong on the original model, and so is what `save_adapter` later writes.
        expert_order: "slowest" for an adapter of experts that Unsloth wrote before September 2026
            (see `read_adapter`).
        progress: whether to show a bar if standard error is a terminal.

    Returns:
        What was adapted, as `add_lora` reports it.

    Raises:
        ValueError: see `read_adapter`; or the adapter does not fit the model, which is then
            unchanged.

    """
    state = read_adapter(folder, residual_base=residual_base, expert_order=expert_order)
    state = placed(state, unwrapped(model))
    _warn_of_padding(unwrapped(model), state, Path(folder))
    return apply_state(
        model, state, adapter_name=adapter_name, is_trainable=is_trainable, progress=progress
    )


def _warn_of_second_names(model: nn.Module, state: AdapterState) -> None:
    """Warns of other names of adapted modules: PEFT replaces a module only under its first name."""
    modules = {without_wrappers(n): m for n, m in model.named_modules(remove_duplicate=False)}

    def place(name: str) -> tuple[nn.Module, str]:
        parent, _, key = name.rpartition(".")
        return modules[parent], key

    first = {modules[name]: place(name) for name in state.layers if name in modules}
    missed = [n for n, module in modules.items() if place(n) != first.get(module, place(n))]
    if missed:
        warnings.warn(
            f"PEFT will not adapt {', '.join(missed[:4])}, which is another name of an adapted "
            "layer: its output differs there. load_adapter adapts both",
            stacklevel=3,
        )


def _warn_of_lost_layers(model: nn.Module, state: AdapterState, layout: str) -> None:
    """Warns of layers that PEFT does not adapt when it loads the folder. `layout` is the layout of
    experts, "" if there are none.
    """
    stacks = expert_layers(state)
    lost = lost_in_peft(model, [name for name in state.layers if name not in stacks])
    if layout == EACH and not is_converted_by_peft(model):
        kind = type(model).__name__
        lost |= dict.fromkeys(stacks, f"it does not read the pairs of each expert of {kind}")
    for reason in dict.fromkeys(lost.values()):
        names = [name for name, why in lost.items() if why == reason]
        warnings.warn(
            f"plain PEFT will leave {len(names)} layers of this adapter bare ({names[0]} ...): "
            f"{reason}. load_adapter and lora-kernels merge are right",
            stacklevel=3,
        )


def _warn_of_other_updates(model: nn.Module, state: AdapterState) -> None:
    """Warns of layers that PEFT finds in the folder but adapts differently."""
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    for reason, names in differing_in_peft(modules, list(state.layers)).items():
        warnings.warn(
            f"plain PEFT computes another update of {len(names)} layers of this adapter "
            f"({names[0]} ...): {reason}. load_adapter and lora-kernels merge are right",
            stacklevel=5,
        )
    projections = [name for name in state.layers if attention_of(name, state.layers)]
    if projections:
        warnings.warn(
            f"PEFT up to {LAST_TWICE} adds the update of {projections[0]} twice (its pull request "
            "3774): the file has half of this lora_B, with which these versions compute the same. "
            "A later PEFT may add it once, and half of it; load_adapter is right in any case",
            stacklevel=5,
        )


def _warn_of_padding(model: nn.Module, state: AdapterState, folder: Path) -> None:
    """Warns of layers that PEFT adapts differently, if the adapter has no recipe: PEFT may have
    trained it.
    """
    if not any(layer.kernel for layer in state.layers.values()):
        return
    files = (ADAPTER_FILE, NATIVE_FILE, DIFFUSERS_FILE)
    if any(read_recipe(folder / file) is not None for file in files):
        return
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    for reason, names in differing_in_peft(modules, list(state.layers)).items():
        warnings.warn(
            f"if PEFT has trained this adapter, {len(names)} of its layers ({names[0]} ...) "
            f"compute another update here: {reason}. Here, as in PEFT's own merged weight, the "
            "update has the padding and dilation of its layer",
            stacklevel=4,
        )


def _component(model: nn.Module, format: str) -> str:
    """The name of the model's class among a pipeline's models, for format="diffusers"; else "".

    Raises:
        ValueError: the class does not tell which model of a pipeline it is.

    """
    if format != DIFFUSERS:
        return ""
    name, origin = type(model).__name__, type(model).__module__.partition(".")[0]
    words = {"unet": "UNet", "controlnet": "ControlNet", "prior": "Prior"}
    words |= {"transformer": "Transformer"}
    found = next((c for c, word in words.items() if word in name), None)
    if origin == "transformers":
        found = "text_encoder"
    if found is None:
        raise ValueError(
            f"which model of a pipeline {name} is, its class does not tell: pass component=, one "
            f"of {', '.join(COMPONENTS)}"
        )
    return found


def _resized_embeddings(model: Any, before: int | None, keep: bool) -> dict[str, Tensor]:
    """{name: weight} of the input embedding and the output head, if the vocabulary's size is not
    `before`, its size in the configuration that the model was loaded from; else {}.
    """
    size = _vocab_size(getattr(model, "config", None))
    if size is None or before is None or size == before:
        return {}
    names = {id(module): without_wrappers(name) for name, module in model.named_modules()}
    found = {}
    for module in (input_embeddings(model), output_head(model)):
        weight = None if module is None else original_weight(module)
        if weight is not None:
            found[f"{names.get(id(module))}.weight"] = whole(weight, keep)
    return found


def _loaded_vocab_size(base_model: str | None) -> int | None:
    """The size of the vocabulary in a model's configuration, if the model is on this machine. Code
    in the model's folder is not run.
    """
    if not base_model or find_spec("transformers") is None:
        return None
    from transformers import AutoConfig
    from transformers.utils import cached_file

    try:
        config = AutoConfig.from_pretrained(
            base_model, local_files_only=True, trust_remote_code=False
        )
        return _vocab_size(config)
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # the configuration needs the folder's code, for example
    try:
        values = read_json(Path(cached_file(base_model, "config.json", local_files_only=True)))
    except (OSError, ValueError, TypeError):
        return None
    size = values.get("vocab_size", values.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _vocab_size(config: Any) -> int | None:
    try:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # the configuration has several text models
        text = config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None
