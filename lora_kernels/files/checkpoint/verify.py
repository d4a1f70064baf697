"""Checks that an adapter fits a model, and that all ways to load it compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model.config import AdapterState
from ..adapter.content import NATIVE_FILE
from ..adapter.folder import read_adapter
from ..adapter.saving import load_adapter
from .folder import ModelFolder
from .merge import Change, changes_of
from .residual import refuse_residual

# Relative to the largest logit, in float32. In a model of 30 layers, another order of sums changes
# the logits by less than a tenth of it; reading an adapter wrongly, by about its whole effect.
TOLERANCE = 1e-4
_TOKENS = (2, 16)


@dataclass(frozen=True)
class Check:
    """The result of one check; `passed` is None if it could not be done."""

    name: str
    passed: bool | None
    detail: str


def verify(adapter: Path, base: Path, logits: bool = True) -> Iterator[Check]:
    """Makes these checks in this order, and stops after one of the first two that fails.

    1. The files of the adapter are intact and consistent.
    2. Every layer and tensor of the adapter is in the base, with the same shape.
    3. `logits`, if transformers is installed: those of the base with s(BA − B₀A₀) added to its
       weights, of `load_adapter`, and of PEFT if it can read the format, agree within `TOLERANCE`
       of the largest, in float32 on the CPU, on a few fixed tokens. The model is loaded for each.

    Raises:
        ValueError: the base is not a model, or cannot be run on tokens.
        FileNotFoundError: files of the base are missing.

    """
    folder = ModelFolder(base)
    try:
        state = read_adapter(adapter)
        refuse_residual(adapter, state, base)
    except (ValueError, FileNotFoundError) as error:
        yield Check("the adapter's files", False, str(error))
        return
    ranks = sorted({layer.r for layer in state.layers.values()})
    yield Check("the adapter's files", True, f"{len(state.layers)} layers, {_ranks(ranks)}")
    try:
        changes = changes_of(folder, state)
    except ValueError as error:
        yield Check("its layers in the base", False, str(error))
        return
    yield Check("its layers in the base", True, f"{len(changes)} tensors, all with their shapes")
    if not logits:
        return
    if find_spec("transformers") is None:
        yield Check("logits", None, "transformers is not installed")
        return
    yield from _logits(adapter, folder, state, changes)


def _logits(
    adapter: Path, folder: ModelFolder, state: AdapterState, changes: dict[str, Change]
) -> Iterator[Check]:
    plain = _run(folder, lambda model: model)
    merged = _run(folder, lambda model: _merged(model, folder, changes))
    scale = float(merged.abs().max())
    effect = float((merged - plain).abs().max()) / scale
    yield Check("merged weights", True, f"change the logits by {effect:.1e} of the largest")

    def compared(name: str, logits: Tensor) -> Check:
        error = float((logits - merged).abs().max()) / scale
        return Check(name, error <= TOLERANCE, f"off by {error:.1e}, {TOLERANCE:.0e} allowed")

    def ours(model: nn.Module) -> nn.Module:
        load_adapter(model, adapter, is_trainable=False)
        return model

    yield compared("lora_kernels.load_adapter", _run(folder, ours))
    if (adapter / NATIVE_FILE).is_file():
        yield Check("PEFT", None, "cannot read the native format: convert it")
    elif find_spec("peft") is None:
        yield Check("PEFT", None, "is not installed")
    else:
        import peft

        yield compared(
            "PEFT", _run(folder, lambda model: peft.PeftModel.from_pretrained(model, adapter))
        )


@torch.no_grad()
def _merged(model: nn.Module, folder: ModelFolder, changes: dict[str, Change]) -> nn.Module:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in folder.tensors.items():
        if stored in changes:
            if name not in parameters:
                raise ValueError(
                    f"{type(model).__name__} has no {name!r}, under which its files store a tensor"
                )
            changes[stored].apply_(parameters[name].data)
    return model


@torch.inference_mode()
def _run(folder: ModelFolder, prepare: Callable[[nn.Module], nn.Module]) -> Tensor:
    """The logits [2, 16, vocabulary] of the model in float32, after `prepare`."""
    import transformers

    kind = str((folder.config.get("architectures") or [""])[0])
    loader = getattr(transformers, kind, transformers.AutoModelForCausalLM)
    with torch.inference_mode(False):
        model = loader.from_pretrained(folder.path, dtype=torch.float32, local_files_only=True)
        model = prepare(model.eval()).eval()
    ids = _token_ids(model.config)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    try:
        return model(**inputs)[0]
    except (TypeError, RuntimeError, IndexError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{kind or folder.path} does not run on token ids: {first}") from None


def _token_ids(config: Any) -> Tensor:
    """Fixed token ids that are spread over the vocabulary."""
    size = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    count = _TOKENS[0] * _TOKENS[1]
    return ((torch.arange(count) * 7919 + 13) % size).view(_TOKENS)


def _ranks(ranks: list[int]) -> str:
    return f"r = {ranks[0]}" if len(ranks) == 1 else f"r = {ranks[0]} to {ranks[-1]}"
