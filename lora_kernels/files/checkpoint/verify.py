"""Checks that an adapter fits a model, and that all ways to load it give the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...layers.kinds import is_conv1d
from ...layers.state import LayerState
from ...model.config import AdapterState
from ...model.install import RepeatedBlocks, row_places, settled_weights
from ...model.lora import merge_lora
from ..adapter.content import NATIVE_FILE
from ..adapter.folder import read_adapter
from ..adapter.peft_format.loading import lost_in_peft
from ..adapter.saving import load_adapter
from .architecture import Architecture
from .changes import (
    changes_of,
    check_experts,
    folder_for,
    is_resized,
    placed_in,
    resized_to,
    weight_of,
)
from .folder import ModelFolder
from .residual import refuse_residual

Inputs = dict[str, Tensor]

# Relative to the largest output, in float32. In a model of 30 layers, another order of summation
# changes the outputs by less than a tenth of this; misreading an adapter changes them by about its
# whole effect.
TOLERANCE = 1e-4
_ROUNDING = 4 * torch.finfo(torch.float32).eps

_BATCH, _TOKENS = 2, 16
_SAMPLES = 8000  # half a second of sound
_ERRORS = (TypeError, RuntimeError, IndexError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True)
class Check:
    """The result of one check; `passed` is None if it could not be done."""

    name: str
    passed: bool | None
    detail: str


def verify(adapter: Path, base: Path, logits: bool = True) -> Iterator[Check]:
    """Runs these checks in order, and stops if one of the first two fails.

    1. The files of the adapter are intact and consistent.
    2. Every layer and tensor of the adapter is in the base, with the same shape.
    3. With `logits`, if transformers knows the model: three ways give the same outputs, within
       `TOLERANCE` of the largest, in float32 on the CPU, on fixed inputs. The ways are: the base
       with s(BA − B₀A₀) added to its weights, `load_adapter`, and PEFT if it can read the format.
       If the model runs on none of the inputs that are made here, the merged weights are compared.
       For each way, the model is loaded as users would load it: with the class for the adapter's
       task, and resized if the adapter has the embeddings of a resized vocabulary.

    Raises:
        ValueError: the base is not a model.
        FileNotFoundError: files of the base are missing.

    """
    folder = ModelFolder(base)
    try:
        state = placed_in(folder, read_adapter(adapter))
        refuse_residual(adapter, state, base)
    except (ValueError, FileNotFoundError) as error:
        yield Check("the adapter's files", False, str(error))
        return
    ranks = sorted({layer.r for layer in state.layers.values()})
    yield Check("the adapter's files", True, f"{len(state.layers)} layers, {_ranks(ranks)}")
    folder = folder_for(folder, state)
    count = len(state.layers) + len(state.extra) + len(state.rows)
    try:
        _check_fit(folder, state)
    except ValueError as error:
        yield Check("its layers in the base", False, str(error))
        return
    yield Check("its layers in the base", True, f"{count} tensors, all with their shapes")
    if not logits:
        return
    if folder.architecture is None:
        yield Check("logits", None, folder.assumption.partition(": it is assumed")[0])
        return
    yield from _Ways(adapter, folder, folder.architecture, state).checks()


def _check_fit(folder: ModelFolder, state: AdapterState) -> None:
    """Raises ValueError if a layer or tensor of the adapter is not in the base, or has another
    shape there. A tensor may be computed in loading, although `merge` could not write it then.
    """
    architecture = folder.architecture
    if architecture is None:
        changes_of(folder, state)
        return
    wanted: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in state.extra.items()}
    for name, layer in state.layers.items():
        if layer.experts:
            check_experts(folder, name, layer)
            continue
        wanted[weight_of(name, state.layers)] = layer.stored_shape(folder.is_transposed(name))
    model = architecture.model
    if state.replication:
        model = copy.deepcopy(model)
        RepeatedBlocks(model, state.replication)
    known = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, found in state.rows.items():
        wanted[name] = known.get(name, ())
        if name in known:
            found.check(name, known[name])
    vocabulary = resized_to(architecture, state)
    for name, shape in wanted.items():
        if name not in known:
            changes_of(folder, state)  # its error says more, and it knows older names in the files
            raise ValueError(f"the adapter has {name!r}, which {folder.path} does not have")
        if shape != known[name] and not is_resized(vocabulary, shape, known[name]):
            raise ValueError(
                f"{name!r} of the adapter is {list(shape)}, of {folder.path} {list(known[name])}"
            )


class _Ways:
    """The adapted model, loaded in several ways."""

    def __init__(
        self, adapter: Path, folder: ModelFolder, architecture: Architecture, state: AdapterState
    ) -> None:
        self.adapter, self.folder = adapter, folder
        self.architecture, self.state = architecture, state
        self.inputs: Inputs | None = None

    def checks(self) -> Iterator[Check]:
        """Compares each way with the merged weights."""
        base = self._repeated()
        self.inputs = inputs_for(base)
        plain = self._result(base)
        merged = self._result(self._merged(self._repeated()))
        if plain.shape != merged.shape:  # the length of the output depends on the weights
            self.inputs = None
            plain = self._result(base)
            merged = self._result(self._merged(self._repeated()))
        del base
        scale = max(float(merged.abs().max()), torch.finfo(torch.float32).tiny)
        effect = float((merged - plain).abs().max()) / scale
        what, allowed = "outputs", TOLERANCE
        if self.inputs is None:  # weights are rounded once, whatever the adapter's effect is
            what, allowed = "weights", max(TOLERANCE * effect, _ROUNDING)
        yield Check("merged weights", True, f"change the {what} by {effect:.1e} of the largest")

        def compared(name: str, found: Tensor) -> Check:
            error = float((found - merged).abs().max()) / scale
            detail = f"{what} off by {error:.1e}, {allowed:.0e} allowed"
            return Check(name, error <= allowed, detail)

        yield compared("lora_kernels.load_adapter", self._result(self._ours(self._load())))
        if (self.adapter / NATIVE_FILE).is_file():
            yield Check("PEFT", None, "cannot read the native format: convert it")
        elif find_spec("peft") is None:
            yield Check("PEFT", None, "is not installed")
        else:
            try:
                found = self._peft_result(self._load())
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                first = str(error).strip().partition("\n")[0]
                yield Check("PEFT", False, f"cannot load it: {first}")
            else:
                yield self._with_reason(compared("PEFT", found))

    def _with_reason(self, check: Check) -> Check:
        """PEFT's check; if it failed, the result names the layers that PEFT does not adapt."""
        lost = lost_in_peft(self.architecture.model, list(self.state.layers))
        if check.passed or not lost:
            return check
        name, reason = next(iter(lost.items()))
        bare = f"; PEFT leaves {len(lost)} layers bare ({name} ...): {reason}"
        return Check(check.name, check.passed, check.detail + bare)

    def _load(self) -> Any:
        """The base in float32, with the class that has the adapter's layers."""
        options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
        if self.folder.num_labels is not None:
            options["num_labels"] = self.folder.num_labels
        loader: Any = type(self.architecture.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a head that is missing in the files is random
            model = loader.from_pretrained(self.folder.path, **options).eval()
        vocabulary = resized_to(self.architecture, self.state)
        if vocabulary is not None:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        return model

    def _repeated(self) -> Any:
        """The base, with the repeated blocks that the adapter expects."""
        model = self._load()
        if self.state.replication:
            RepeatedBlocks(model, self.state.replication)
        return model

    @torch.no_grad()
    def _merged(self, model: nn.Module) -> nn.Module:
        """The model with the adapter's change added to each weight."""
        extra = settled_weights(model, self.state).extra
        for name, layer in self.state.layers.items():
            if layer.experts:
                _merge_experts_(model, name, layer)
                continue
            module: Any = model.get_submodule(name)
            own = weight_of(name, self.state.layers)
            key = own.removeprefix(f"{name}.")
            before = getattr(module, key).data
            weight = extra.pop(own, before).to(before.dtype, copy=True)
            layer.add_to_(layer.matrix_of(weight, is_conv1d(module)))
            setattr(module, key, nn.Parameter(weight))  # a new one, in case it was tied to another
            bias = layer.portable_bias()
            if bias is not None:
                key = key.removesuffix("weight") + "bias"
                old = getattr(module, key)
                setattr(module, key, nn.Parameter(bias if old is None else old + bias))
        _, rows = row_places(model, self.state)
        weights = model.state_dict()
        with_rows = {name: row.put_(weights[name].clone()) for name, row in rows.items()}
        for name, tensor in {**extra, **with_rows}.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            value = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
            setattr(module, key, nn.Parameter(value) if key in module._parameters else value)
        return model

    def _ours(self, model: nn.Module) -> nn.Module:
        load_adapter(model, self.adapter, is_trainable=False, progress=False)
        return model if self.inputs is not None else merge_lora(model)

    @torch.no_grad()
    def _peft_result(self, model: Any) -> Tensor:
        """`_result` of the model with the adapter in PEFT. The weights are summed here, because
        PEFT's merging adds the update to a shared weight once for each layer that shares it.
        """
        import peft

        loaded: Any = peft.PeftModel.from_pretrained(model, self.adapter)
        adapted: nn.Module = loaded.get_base_model().eval()
        if self.inputs is not None:
            return outputs_of(adapted, self.inputs)
        weights = []
        for name in self.state.layers:
            layer: Any = adapted.get_submodule(name)
            weights.append(_weight_in_peft(layer).float().flatten())
        return torch.cat(weights)

    def _result(self, model: nn.Module) -> Tensor:
        """The model's outputs, or the weights that the adapter changes, as one vector."""
        if self.inputs is not None:
            return outputs_of(model, self.inputs)
        tensors = model.state_dict()
        layers = self.state.layers.items()
        changed = [
            name if layer.experts else weight_of(name, self.state.layers) for name, layer in layers
        ]
        return torch.cat([tensors[name].float().flatten() for name in changed])


def _weight_in_peft(layer: Any) -> Tensor:
    """The weight of a PEFT layer with its adapter, as a new tensor."""
    weight: Tensor = layer.weight.detach()
    if not hasattr(layer, "lora_A"):
        return weight
    variant = layer.lora_variant.get("default")
    if variant is not None:
        found: Tensor = variant.merge_safe(layer, "default", weight.clone())
        return found
    return weight + layer.get_delta_weight("default")


@torch.no_grad()
def _merge_experts_(model: nn.Module, name: str, layer: LayerState) -> None:
    """Adds the update of an experts' parameter in place."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    for expert, weight in enumerate(model.get_parameter(name)):
        layer.expert(expert).add_to_(weight.mT if owner.is_transposed else weight)


def _ranks(ranks: list[int]) -> str:
    return f"r = {ranks[0]}" if len(ranks) == 1 else f"r = {ranks[0]} to {ranks[-1]}"


def inputs_for(model: nn.Module) -> Inputs | None:
    """Inputs on which the model runs and returns finite numbers; None if none are known."""
    for rows in (_BATCH, 1):  # a classifier without a padding token accepts only one text at a time
        for candidate in _candidates(model):
            inputs = {name: tensor[:rows] for name, tensor in candidate.items()}
            try:
                if bool(outputs_of(model, inputs).isfinite().all()):
                    return inputs
            except _ERRORS:
                continue
    return None


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """All floating-point outputs as one vector, in float32. A model that uses random numbers gets
    the same ones each time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model(**inputs)
    values = list(outputs.values()) if isinstance(outputs, dict) else outputs
    floats = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([t.float().flatten() for t in floats])


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    """The main input alone, then with others: tokens for the decoder, a picture ..."""
    config: Any = model.config
    makers = {
        "input_ids": _token_ids,
        "pixel_values": _pixels,
        "input_values": _samples,
        "input_features": _features,
    }
    main = str(getattr(model, "main_input_name", "input_ids"))
    made: Inputs = {}
    for name, maker in makers.items():
        with suppress(*_ERRORS):
            made[name] = maker(config)
    for name in sorted(made, key=lambda name: name != main):  # the main input first
        yield {name: made[name]}
        if "input_ids" in made and bool(getattr(config, "is_encoder_decoder", False)):
            yield {name: made[name], "decoder_input_ids": made["input_ids"]}
    yield made


def _option(config: Any, name: str) -> Any:
    """The value of an option in the configuration, or in a part of it."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    values = [value for part in parts if (value := getattr(part, name, None)) is not None]
    return values[0]  # an IndexError if no part has it


def _token_ids(config: Any) -> Tensor:
    """Token ids [2, 16] that are spread over the vocabulary."""
    ids = torch.arange(_BATCH * _TOKENS) * 7919 + 13
    return (ids % int(_option(config, "vocab_size"))).view(_BATCH, _TOKENS)


def _pixels(config: Any) -> Tensor:
    size = _option(config, "image_size")
    height, width = (size, size) if isinstance(size, int) else size
    return _waves(_BATCH, int(_option(config, "num_channels")), int(height), int(width))


def _samples(config: Any) -> Tensor:
    return _waves(_BATCH, _SAMPLES)


def _features(config: Any) -> Tensor:
    length = 2 * int(_option(config, "max_source_positions"))
    return _waves(_BATCH, int(_option(config, "num_mel_bins")), length)


def _waves(*shape: int) -> Tensor:
    """Numbers between −1 and 1 that do not repeat."""
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (steps * 0.7390851).sin().float().view(shape)
