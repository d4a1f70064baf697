"""Weights in safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._utils.names import ALL_LINEAR, match_names
from ..._utils.safetensors import StoredTensor, read_json, stored_tensors
from ...layers.options import lora_scaling
from ..adapter.recipe import ADAPTER_CONFIG, ADAPTER_FILE

_FLOATS = ("F64", "F32", "BF16", "F16")
# Models with layers of the kind Conv1D, stored [in, out], and how these layers are called.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
# Last parts of names of 2-D weights that are no projections: output heads and embeddings.
_HEAD = re.compile(r"lm_head|embed_out")
_EMBEDDING = re.compile(r"wte|wpe|shared|relative_attention_bias|(?!embed_out).*embed.*")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class StoredWeight:
    """The weight of a linear layer, [out, in] once loaded."""

    name: str
    tensor: StoredTensor
    transposed: bool

    def load(self) -> Tensor:
        """[out, in], on the CPU."""
        weight = self.tensor.load()
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class StoredPair:
    """lora_A [r, in] and lora_B [out, r] of one layer, with their scaling."""

    name: str
    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float


def is_adapter(path: Path) -> bool:
    """Whether it is the folder of a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def stored_weights(
    path: Path,
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] | None = None,
) -> list[StoredWeight]:
    """The projections of a checkpoint, in the order of their names, numbers as numbers.

    They are the 2-D floating-point tensors called "<layer>.weight". "all-linear" leaves out those
    that are embeddings or output heads by their name; a list of names or endings, or a regular
    expression, chooses among all. `exclude`, of the same kind, is left out of either.

    Raises:
        ValueError: nothing is chosen, or the file holds an adapter; and as `stored_tensors`.

    """
    tensors = stored_tensors(path)
    if any(".lora_A." in tensor.name for tensor in tensors):
        raise ValueError(
            f"{path} holds a LoRA adapter: give the folder of its {ADAPTER_CONFIG}, which has the "
            "scaling"
        )
    matrices = {
        t.name.removesuffix(".weight"): t
        for t in tensors
        if t.name.endswith(".weight") and len(t.shape) == 2 and t.dtype in _FLOATS
    }
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        names = [name for name in matrices if not is_embedding(name) and not is_head(name)]
    else:
        names = match_names(matrices, targets)
    if names and exclude:
        excluded = set(match_names(names, exclude))
        names = [name for name in names if name not in excluded]
        if not names:
            raise ValueError(f"exclude leaves none of the layers of {path}")
    if not names:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors}))
        raise ValueError(
            f"{path} has no 2-D weight of a linear layer in {', '.join(_FLOATS)}; its tensors are "
            f"{dtypes or 'none at all'} (dequantise them first if they are quantised)"
        )
    file = path / "config.json" if path.is_dir() else path.parent / "config.json"
    config = read_json(file) if file.is_file() else {}
    names.sort(key=_numbers_as_numbers)
    return [StoredWeight(name, matrices[name], is_transposed(config, name)) for name in names]


def is_transposed(config: Mapping[str, Any], layer: str) -> bool:
    """Whether a layer of the model with that config.json is a Conv1D, stored [in, out]."""
    return config.get("model_type") in _CONV1D_MODELS and _ending(layer) in _CONV1D_LAYERS


def is_embedding(layer: str) -> bool:
    """Whether the layer is an embedding, which its name alone tells."""
    return _EMBEDDING.fullmatch(_ending(layer)) is not None


def stored_pairs(folder: Path, targets: str | Sequence[str] = ALL_LINEAR) -> list[StoredPair]:
    """The linear layers' pairs of a PEFT adapter folder, in the order of their names.

    Raises:
        ValueError: no pair is there or chosen, one lacks its other half, or a file is damaged.
        FileNotFoundError: no safetensors file.

    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_FILE}; pickled adapters are not read")
    config = read_json(folder / ADAPTER_CONFIG)
    halves: dict[str, dict[str, StoredTensor]] = {}
    for tensor in stored_tensors(file):
        match = re.fullmatch(r"(.*)\.lora_([AB])\.weight", tensor.name)
        if match and len(tensor.shape) == 2:
            halves.setdefault(match[1].removeprefix(_PEFT_PREFIX), {})[match[2]] = tensor
    if not halves:
        raise ValueError(f"{file} has no lora_A and lora_B of a linear layer")
    names = list(halves)
    if not (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        names = match_names(names, targets)
    pairs = []
    for name in sorted(names, key=_numbers_as_numbers):
        for half in "AB":
            if half not in halves[name]:
                raise ValueError(f"{file} has no lora_{half} for {name!r}")
        A, B = halves[name]["A"], halves[name]["B"]
        pairs.append(StoredPair(name, A, B, _scaling(config, name, A.shape[0])))
    return pairs


def _scaling(config: dict[str, Any], name: str, r: int) -> float:
    """s as PEFT finds it: `alpha_pattern` is searched for the name, the rank is that of A."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern of {ADAPTER_CONFIG} is no object: {patterns!r}")
    for key, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise ValueError(
                f"alpha_pattern of {ADAPTER_CONFIG} has {key!r}, no regular expression: {error}"
            ) from None
        if found:
            alpha = value
            break
    return lora_scaling(alpha, r, "rslora" if config.get("use_rslora") else "lora")


def is_head(layer: str) -> bool:
    """Whether the layer is an output head, by its name."""
    return _HEAD.fullmatch(_ending(layer)) is not None


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _numbers_as_numbers(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 2 before layer 10, which the files themselves do not."""
    parts = name.split(".")
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]
