"""Adapters on disk, read as loaders see them: names and shapes of the tensors, and a configuration
with any options.

This module reads folders of PEFT and of programs that use it (`adapter_config.json` and
`adapter_model.safetensors`), this package's folders, and files of diffusers and kohya. It refuses
nothing that some loader accepts, and reads only headers: a tensor is loaded when it is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._utils.model_files import StoredTensor, read_json
from ..._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE, PREFIX
from ..._utils.safetensors import read_layout
from ..adapter.content import COMPONENTS, DIFFUSERS_FILE, DIFFUSERS_METADATA, NATIVE_FILE
from ..adapter.recipe import METADATA, START

PEFT, DIFFUSERS, NATIVE = "peft", "diffusers", "native"
LINEAR, EMBEDDING, CONVOLUTION = "linear", "embedding", "convolution"
# kohya's names of a pipeline's models, which precede the module's name.
KOHYA = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
}
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")

_PEFT_HALF = re.compile(
    r"(?P<name>.+)\.(?:lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora_embedding_(?P<row>[AB])(?:\.(?P<other>[^.]+))?)"
)
_DIFFUSERS_HALF = re.compile(
    r"(?P<name>.+?)(?:[._]lora(?:_linear_layer)?\.|\.lora_)(?P<half>down|up)\.weight"
)


@dataclass(frozen=True)
class StoredLayer:
    """One layer's factors.

    Attributes:
        name: the module's name as the file has it, without PEFT's "base_model.model.".
        kind: LINEAR, EMBEDDING or CONVOLUTION.
        right: A [r, in]; for a convolution [r, in, height, width].
        left: B [out, r]; for a convolution [out, r, 1, 1].
        prefixed: whether the tensors' names begin with "base_model.model.".
        adapter: the adapter's name inside the tensors' names; None if there is none.
        style: the file's words for A and B: "lora_A", "lora.down" or "lora_down".
        alpha: kohya's tensor `<name>.alpha`.

    """

    name: str
    kind: str
    right: StoredTensor
    left: StoredTensor
    prefixed: bool = False
    adapter: str | None = None
    style: str = "lora_A"
    alpha: StoredTensor | None = None

    @property
    def rank(self) -> int:
        """The rank of the tensors; if all experts are in one tensor, of all experts together."""
        return self.right.entry.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.left.entry.shape[0], self.right.entry.shape[1]

    @property
    def last(self) -> str:
        """The last part of the name, without PEFT's "base_layer"."""
        return plain_name(self.name).rpartition(".")[2]

    @property
    def component(self) -> str:
        """The pipeline's model that the layer belongs to; "" if its name does not say."""
        first = self.name.partition(".")[0]
        if first in COMPONENTS:
            return first
        return next((c for start, c in KOHYA.items() if self.name.startswith(start)), "")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's files.

    Attributes:
        path: the folder or file.
        kind: PEFT, DIFFUSERS or NATIVE.
        config: the content of `adapter_config.json`; {} for diffusers' files.
        layers: the layers by name; empty if NATIVE.
        others: all other tensors by their names in the file.
        components: {component: PEFT's options} in diffusers' metadata; "" if the file has one
            model.
        damaged: whether diffusers' metadata is not JSON.
        recipe: this package's recipe, unchanged.
        files: the names of all files in the folder.

    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    layers: Mapping[str, StoredLayer]
    others: Mapping[str, StoredTensor] = field(default_factory=dict)
    components: Mapping[str, Mapping[str, Any]] | None = None
    recipe: Mapping[str, Any] | None = None
    files: frozenset[str] = frozenset()
    damaged: bool = False

    @property
    def is_start(self) -> bool:
        """Whether the adapter is the start of a residual base that `lora-kernels init` wrote."""
        return self.recipe is not None and self.recipe.get("format") == START

    @property
    def saved(self) -> list[str]:
        """The names of the tensors in `others` that are trained, not copies of the base's weights.

        `<layer>.base_layer.bias` is PEFT's name for a trained bias, except beside a copy of the
        layer's weight.
        """
        return [n for n in self.others if not self._is_copy(n) and ".original_module." not in n]

    def _is_copy(self, name: str) -> bool:
        if name.endswith(".base_layer.weight"):
            return True
        owner, found, _ = name.partition(".base_layer.bias")
        frozen = self.config.get("bias", "none") in ("none", None)
        return bool(found) and frozen and f"{owner}.base_layer.weight" in self.others


def plain_name(name: str) -> str:
    """The module's own name: without PEFT's nested "base_layer" at its end, or before the
    `out_proj` of an attention.
    """
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    owner = selected_name(name)
    return name if owner == name else f"{owner}.{name.rpartition('.')[2]}"


def selected_name(name: str) -> str:
    """The layer's name in PEFT's options: for an attention's `out_proj`, the attention's."""
    owner, inside, last = name.rpartition(".base_layer.")
    return owner if inside and "." not in last else name


def read_stored(path: Path) -> StoredAdapter:
    """Reads an adapter: a folder, or a single .safetensors file of diffusers.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a file is damaged or pickled, or holds no LoRA.

    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the folder or file of an adapter")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name in (ADAPTER_CONFIG, ADAPTER_FILE, NATIVE_FILE):
        path = folder
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _pickled(path)
        return _diffusers(path, path)
    files = frozenset(entry.name for entry in folder.iterdir())
    if NATIVE_FILE in files and ADAPTER_FILE not in files:
        return StoredAdapter(path, NATIVE, _config(path, files), {}, files=files)
    if ADAPTER_CONFIG in files and ADAPTER_FILE in files:
        return _peft(path, files)
    return _diffusers(path, _single_file(path, files))


def _config(folder: Path, files: frozenset[str]) -> dict[str, Any]:
    return read_json(folder / ADAPTER_CONFIG) if ADAPTER_CONFIG in files else {}


def _single_file(folder: Path, files: frozenset[str]) -> Path:
    """The only .safetensors file of a folder, or the one with diffusers' default name."""
    found = sorted(name for name in files if name.endswith(".safetensors"))
    if DIFFUSERS_FILE in found:
        return folder / DIFFUSERS_FILE
    if ADAPTER_FILE in found:
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER_CONFIG}, which has the scaling of {ADAPTER_FILE}: copy it "
            "from where the adapter was saved"
        )
    if len(found) == 1 and ADAPTER_CONFIG not in files:
        return folder / found[0]
    pickled = [name for name in _PICKLED if name in files]
    if pickled and not found:
        raise _pickled(folder / pickled[0])
    inside = sorted(entry.parent.name for entry in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inside and ADAPTER_CONFIG not in files:
        raise FileNotFoundError(
            f"{folder} has no adapter, but its subfolders do: {', '.join(inside[:8])}"
        )
    if ADAPTER_CONFIG in files:
        what = f"no {ADAPTER_FILE}, which belongs to its {ADAPTER_CONFIG}"
    elif found:
        what = f"several .safetensors files ({', '.join(found[:8])}): give one of them"
    else:
        what = f"neither {ADAPTER_CONFIG} nor a .safetensors file"
    raise FileNotFoundError(f"{folder} has {what}")


def _pickled(file: Path) -> ValueError:
    return ValueError(
        f"{file} is not a .safetensors file, and pickled files are not read, since reading them "
        "may run code: load it with PEFT and save it with save_pretrained, which writes "
        f"{ADAPTER_FILE}"
    )


def _peft(folder: Path, files: frozenset[str]) -> StoredAdapter:
    config = read_json(folder / ADAPTER_CONFIG)
    kind = config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise ValueError(f"{folder}: peft_type is {kind!r}; only 'LORA' adapters are checked")
    tensors, metadata = _tensors(folder / ADAPTER_FILE)
    layers, others = _layers(folder / ADAPTER_FILE, tensors)
    if not layers:
        raise ValueError(f"{folder / ADAPTER_FILE} has no lora_A and lora_B of a layer")
    recipe = _json(metadata.get(METADATA))
    return StoredAdapter(folder, PEFT, config, layers, others, None, recipe, files)


def _diffusers(path: Path, file: Path) -> StoredAdapter:
    tensors, metadata = _tensors(file)
    layers, others = _layers(file, tensors)
    if not layers:
        raise ValueError(
            f"{file} has no LoRA: neither <layer>.lora_A.weight nor <layer>.lora.down.weight nor "
            "<layer>.lora_down.weight"
        )
    if all(name.startswith(PREFIX) for name in tensors):
        raise FileNotFoundError(
            f"{file} is an adapter of PEFT without its {ADAPTER_CONFIG}, which has the scaling: "
            "put both into a folder"
        )
    options = _json(metadata.get(DIFFUSERS_METADATA))
    components = None if options is None else _by_component(options)
    damaged = options is None and DIFFUSERS_METADATA in metadata
    return StoredAdapter(path, DIFFUSERS, {}, layers, others, components, damaged=damaged)


def _by_component(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"unet.r": 4} -> {"unet": {"r": 4}}; {"r": 4} -> {"": {"r": 4}}."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        first, _, rest = key.partition(".")
        component, option = (first, rest) if first in COMPONENTS and rest else ("", key)
        found.setdefault(component, {})[option] = value
    return found


def _json(text: str | None) -> dict[str, Any] | None:
    """A JSON object in the header; None if it is missing, or damaged (loaders ignore that)."""
    try:
        value = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _tensors(file: Path) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    layout = read_layout(file)
    return {e.name: StoredTensor(file, e) for e in layout.entries}, layout.metadata


def _layers(
    file: Path, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredLayer], dict[str, StoredTensor]]:
    """The layers, and the tensors that are neither A nor B nor α.

    Raises:
        ValueError: A or B is missing, the two do not fit each other, or there are several adapters.

    """
    halves: dict[str, dict[str, StoredTensor]] = {}
    facts: dict[str, dict[str, Any]] = {}
    others: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        parsed = _parsed(key)
        if parsed is None:
            others[key] = tensor
            continue
        name, half, fact = parsed
        before = facts.setdefault(name, fact)
        if before != fact or half in halves.get(name, {}):
            raise ValueError(
                f"{file}: the factors of {name!r} are there more than once, under different names: "
                "keep one adapter in the file"
            )
        halves.setdefault(name, {})[half] = tensor
    adapters = {fact["adapter"] for fact in facts.values() if fact["adapter"]}
    if len(adapters) > 1:
        raise ValueError(
            f"{file} has the tensors of the adapters {', '.join(sorted(adapters))}: keep one"
        )
    layers = {}
    for name, found in halves.items():
        if len(found) < 2:
            lost = "B" if "A" in found else "A"
            raise ValueError(f"{file}: lora_{lost} of {name!r} is missing")
        alpha = others.pop(f"{name}.alpha", None)
        layers[name] = StoredLayer(
            name, _kind(file, name, found, facts[name]), found["A"], found["B"],
            facts[name]["prefixed"], facts[name]["adapter"], facts[name]["style"], alpha,
        )  # fmt: skip
    return layers, others


def _parsed(key: str) -> tuple[str, str, dict[str, Any]] | None:
    """(the layer's name, "A" or "B", other facts in the tensor's name); None for other tensors."""
    found = _PEFT_HALF.fullmatch(key)
    if found:
        name, prefixed = found["name"], found["name"].startswith(PREFIX)
        fact = {
            "prefixed": prefixed,
            "adapter": found["adapter"] or found["other"],
            "embedding": bool(found["row"]),
            "style": "lora_A",
        }
        return name.removeprefix(PREFIX), found["half"] or found["row"], fact
    found = _DIFFUSERS_HALF.fullmatch(key)
    if not found:
        return None
    style = "lora_down" if f".lora_{found['half']}." in key else "lora.down"
    fact = {"prefixed": False, "adapter": None, "embedding": False, "style": style}
    return found["name"], "A" if found["half"] == "down" else "B", fact


def _kind(file: Path, name: str, found: Mapping[str, StoredTensor], fact: Mapping[str, Any]) -> str:
    right, left = found["A"].entry.shape, found["B"].entry.shape
    shapes = f"{file}: lora_A {list(right)} and lora_B {list(left)} of {name!r}"
    if len(right) != len(left) or len(right) not in (2, 3, 4, 5):
        raise ValueError(f"{shapes} are not those of a linear layer, embedding or convolution")
    if right[0] != left[1] or 0 in (*right, *left):
        raise ValueError(f"{shapes} do not fit each other; expected [r, in ...] and [out, r ...]")
    if fact["embedding"]:
        return EMBEDDING
    return LINEAR if len(right) == 2 else CONVOLUTION


def names_in_brief(names: Iterable[str], shown: int = 3) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
