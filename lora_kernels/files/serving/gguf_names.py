"""Which tensor of a GGUF model each linear layer of a Hugging Face model becomes, and how llama.cpp
changes its weight.

The rules are those of llama.cpp's folder `conversion`, which `convert_hf_to_gguf.py` runs, as of
October 2026. The names come from the package gguf, the permutations from `llama.py` and `olmo.py`
of that folder. Architectures whose linear layers are joined, split or reordered in other ways are
not supported. llama.cpp transposes GPT-2's Conv1D weights; A and B are those of W [out, in]
already.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from ..._utils.errors import unknown_name
from ..._utils.model_files import read_json
from .engines.model import TEXT_MODEL, read_base

_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_LLAMA = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED = tuple(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down"))
_HEAD = "lm_head"
_REMEDY = (
    "leave it out of target_modules, or merge the adapter into the model (lora-kernels merge) and "
    "convert the result with llama.cpp's convert_hf_to_gguf.py"
)


@dataclass(frozen=True)
class Architecture:
    """A Hugging Face class that llama.cpp converts.

    Attributes:
        name: the architecture's name in `gguf.MODEL_ARCH`.
        linears: the names of a block's linear layers inside the block.
        blocks: the name of the list of blocks.
        permuted: whether the rows of q and k are permuted for llama.cpp's RoPE, which rotates the
            neighbors (0, 1), (2, 3); transformers rotates (0, d/2), (1, d/2 + 1).
        tied: whether the head is tied to the embedding if `config.json` does not say.
        head: whether llama.cpp reads an output head if it is not tied.
        nested: if the text model is inside another model as `language_model`, the types of text
            models (`text_config.model_type`) that become the same tensors.

    """

    name: str
    linears: tuple[str, ...] = _LLAMA
    blocks: str = "model.layers"
    permuted: bool = False
    tied: bool = False
    head: bool = True
    nested: tuple[str, ...] = ()


_GEMMA3 = Architecture("GEMMA3", tied=True, head=False)
ARCHITECTURES: dict[str, Architecture] = {
    "ArceeForCausalLM": Architecture(
        "ARCEE", (*_ATTENTION, "mlp.up_proj", "mlp.down_proj"), permuted=True
    ),
    "Cohere2ForCausalLM": Architecture("COHERE2", tied=True, head=False),
    "CohereForCausalLM": Architecture("COMMAND_R", tied=True, head=False),
    "GPT2LMHeadModel": Architecture(
        "GPT2",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        "transformer.h",
        tied=True,
    ),
    "Gemma2ForCausalLM": Architecture("GEMMA2", tied=True, head=False),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(_GEMMA3, nested=("gemma3_text",)),
    "GemmaForCausalLM": Architecture("GEMMA", tied=True, head=False),
    "GraniteForCausalLM": Architecture("GRANITE", permuted=True),
    "LlamaForCausalLM": Architecture("LLAMA", permuted=True),
    "Ministral3ForCausalLM": Architecture("MISTRAL3", permuted=True),
    "Mistral3ForConditionalGeneration": Architecture(
        "MISTRAL3", permuted=True, tied=True, nested=("mistral", "ministral3")
    ),
    "MistralForCausalLM": Architecture("LLAMA", permuted=True),
    "MixtralForCausalLM": Architecture("LLAMA", _ATTENTION, permuted=True),
    "NemotronForCausalLM": Architecture("NEMOTRON", (*_ATTENTION, "mlp.up_proj", "mlp.down_proj")),
    "Olmo2ForCausalLM": Architecture("OLMO2"),
    "Olmo3ForCausalLM": Architecture("OLMO2"),
    "OlmoForCausalLM": Architecture("OLMO", permuted=True),
    "Phi3ForCausalLM": Architecture(
        "PHI3",
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "PhiForCausalLM": Architecture(
        "PHI2", (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")
    ),
    "Qwen2ForCausalLM": Architecture("QWEN2"),
    "Qwen2MoeForCausalLM": Architecture("QWEN2MOE", (*_ATTENTION, *_SHARED)),
    "Qwen3ForCausalLM": Architecture("QWEN3"),
    "Qwen3MoeForCausalLM": Architecture("QWEN3MOE", _ATTENTION),
    "SeedOssForCausalLM": Architecture("SEED_OSS"),
    "SmolLM3ForCausalLM": Architecture("SMOLLM3", permuted=True, tied=True),
    "Starcoder2ForCausalLM": Architecture(
        "STARCODER2", (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"), tied=True
    ),
}


# Classes whose head size is not hidden_size / num_attention_heads if `config.json` does not say.
OWN_HEAD_SIZE = frozenset(
    {
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "GemmaForCausalLM",
        "Ministral3ForCausalLM",
        "Mistral3ForConditionalGeneration",
        "Qwen3ForCausalLM",
        "SeedOssForCausalLM",
    }
)
Size = int | None  # None: unknown


@dataclass(frozen=True)
class Target:
    """The tensor of a layer: its `name` in the GGUF model, and the number of `heads` whose rows are
    permuted; None if the rows keep their order.
    """

    name: str
    heads: int | None = None


class BaseModel:
    """How llama.cpp converts the model of a `config.json`.

    Args:
        base: the model's folder, or its `config.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is invalid, or has an architecture that is not supported here.

    """

    def __init__(self, base: Path) -> None:
        self.file = base / "config.json" if base.is_dir() else base
        if not self.file.is_file():
            raise FileNotFoundError(
                f"{self.file} does not exist: give the folder of the base model, or its config.json"
            )
        config = read_json(self.file)
        names = config.get("architectures")
        if not isinstance(names, list) or not names:
            raise ValueError(
                f"{self.file} does not name its class in 'architectures', from which llama.cpp "
                "knows the model: take the config.json of the model on its hub"
            )
        self.kind = str(names[0])
        if self.kind not in ARCHITECTURES:
            raise unknown_name(
                "architecture for GGUF (its conversion to GGUF is not known here to keep the rows "
                "and columns of its linear layers)",
                self.kind,
                tuple(ARCHITECTURES),
            )
        self.architecture = ARCHITECTURES[self.kind]
        self.config = {**config, **self._text_config(config)}
        self.tied = config.get("tie_word_embeddings", self.architecture.tied) is not False
        self.blocks = self._number("num_hidden_layers", "n_layer")

    def targets(self, gguf: ModuleType, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
        """The tensor of each layer.

        Args:
            gguf: the package of that name.
            shapes: (out, in) of each layer, by its name in the Hugging Face model.

        Warns if the configuration does not tell the whole shape of a layer, which happens only if
        transformers cannot build the model from it.

        Raises:
            ValueError: a layer has no tensor of its own in the GGUF model, or another shape than in
                the base, or the package is too old.

        """
        arch = getattr(gguf.MODEL_ARCH, self.architecture.name, None)
        if arch is None:
            raise ValueError(
                f"the installed package gguf does not know {self.kind}: "
                "pip install --upgrade 'lora-kernels[gguf]'"
            )
        names = gguf.get_tensor_name_map(arch, self.blocks)
        found: dict[str, Target] = {}
        unknown = []
        for layer, shape in shapes.items():
            known = self._known(layer)
            name = names.get_name(known)
            if name is None:
                raise ValueError(f"the package gguf has no name for {layer!r} of {self.kind}")
            if not self._check_shape(layer, known, shape):
                unknown.append(layer)
            found[layer] = Target(f"{name}.weight", self._heads(layer, known, shape[0]))
        if unknown:
            warnings.warn(
                f"the shapes of {len(unknown)} layers ({unknown[0]} ...) could not be compared "
                f"with the base: {self.file} does not say all of its sizes, and {self._built}",
                stacklevel=3,
            )
        return found

    def _check_shape(self, layer: str, known: str, shape: tuple[int, int]) -> bool:
        """Raises ValueError if the base has the layer with another shape than [out, in]; False if
        the shape in the base is unknown.
        """
        expected = self._numbers(known) if isinstance(self._built, str) else self._built.get(known)
        if expected is None:
            raise ValueError(
                f"the adapter has {layer!r}, but the model of {self.file} has no such linear "
                "layer: it is another base model; give the one that the adapter was trained on "
                "(--base)"
            )
        if any(want not in (None, got) for want, got in zip(expected, shape, strict=True)):
            there = ", ".join("?" if size is None else str(size) for size in expected)
            raise ValueError(
                f"the weight of {layer!r} is [{shape[0]}, {shape[1]}] ([out, in]) for the adapter, "
                f"and [{there}] in the model of {self.file}: it is another base model; give the "
                "one that the adapter was trained on (--base)"
            )
        return None not in expected

    @cached_property
    def _built(self) -> dict[str, tuple[int, int]] | str:
        """(out, in) of the linear layers of the model that transformers builds, by their names in a
        text-only model; or the reason why there is none.
        """
        if "model_type" not in self.config:  # transformers would guess it from the path
            return "'model_type' is missing"
        try:
            base = read_base(self.file)
        except Exception as error:  # transformers has its own types of errors for invalid values
            first = str(error).strip().partition("\n")[0]
            return f"transformers cannot build it from its configuration ({first})"
        if base.architecture is None:
            return base.unknown
        shapes = {name: base.shape(name) for name in base.modules}
        inside = re.compile(rf"^(model\.)?{TEXT_MODEL}\.(model\.)?(?=layers\.)")
        return {
            inside.sub("model.", n).removeprefix(f"{TEXT_MODEL}."): shape
            for n, shape in shapes.items()
            if shape is not None
        }

    def _numbers(self, known: str) -> tuple[Size, Size]:
        """(out, in) of a layer, computed from the numbers in the configuration."""
        hidden = self._optional("hidden_size", "n_embd")
        if known == _HEAD:
            return self._optional("vocab_size"), hidden
        queries, keys = self._rows_of_heads(hidden)
        inner = self._optional("intermediate_size", "n_inner")
        if inner is None and self.kind == "GPT2LMHeadModel":
            inner = _times(4, hidden)
        module, _, part = known.split(".", 3)[3].rpartition(".")
        if module == "mlp.shared_expert":
            inner = self._optional("shared_expert_intermediate_size")
        joined = None if queries is None or keys is None else queries + 2 * keys
        if module.startswith("mlp"):
            if part in ("down_proj", "fc2", "c_proj"):
                return hidden, inner
            return _times(2, inner) if part == "gate_up_proj" else inner, hidden
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "qkv_proj": joined}
        if part in rows:
            return rows[part], hidden
        if module == "attn":  # GPT-2
            return _times(3, hidden) if part == "c_attn" else hidden, hidden
        return hidden, queries  # o_proj, dense

    def _rows_of_heads(self, hidden: Size) -> tuple[Size, Size]:
        """The numbers of rows of q, and of k and v."""
        heads, size = self._optional("num_attention_heads", "n_head"), self._optional("head_dim")
        groups = self._optional("num_key_value_heads")
        if "num_key_value_heads" in self.config and groups is None:
            groups = heads
        if size is None and hidden and heads and self.kind not in OWN_HEAD_SIZE:
            size = hidden // heads
        return _times(heads, size), _times(groups, size)

    def _text_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The text model's configuration, if the text model is inside another model; else {}."""
        if not self.architecture.nested:
            return {}
        text = config.get("text_config")
        kind = text.get("model_type") if isinstance(text, dict) else None
        if not isinstance(text, dict) or kind not in self.architecture.nested:
            raise unknown_name(
                f"text model of {self.kind} for GGUF", kind, self.architecture.nested
            )
        return text

    def gguf_architecture(self, gguf: ModuleType) -> str:
        """The value of `general.architecture`."""
        return str(gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, self.architecture.name)])

    def _known(self, layer: str) -> str:
        """The layer's name in a text-only model.

        Raises:
            ValueError: the layer is not one of the architecture's linear layers.

        """
        name = layer
        if self.architecture.nested:
            # model.language_model.layers and, in older files, language_model.model.layers
            name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", layer)
            if name == layer and layer != _HEAD:
                raise self._refused(layer, "it is not in the language model")
        if name in (_HEAD, f"model.{_HEAD}"):
            return self._checked_head(layer)
        found = re.fullmatch(rf"{re.escape(self.architecture.blocks)}\.(\d+)\.(.+)", name)
        if found is None or found[2] not in self.architecture.linears:
            inside = found is not None and ".experts." in name
            why = "the experts of a block are one tensor there" if inside else "it has no tensor"
            raise self._refused(layer, why)
        if int(found[1]) >= self.blocks:
            raise ValueError(
                f"the adapter has {layer!r}, but {self.file} says that the model has "
                f"{self.blocks} blocks: it is another base model"
            )
        return name

    def _checked_head(self, layer: str) -> str:
        if self.tied or not self.architecture.head:
            raise ValueError(
                f"{layer!r} is tied to the embedding of this model, and llama.cpp has no tensor of "
                f"its own for it, which an adapter could change: {_REMEDY}"
            )
        return _HEAD

    def _heads(self, layer: str, known: str, out: int) -> int | None:
        """The number of heads in the rows of q or k, if these are permuted; else None."""
        if not self.architecture.permuted or not known.endswith(("q_proj", "k_proj")):
            return None
        queries = self._number("num_attention_heads")
        heads = queries
        if known.endswith("k_proj") and self.config.get("num_key_value_heads") is not None:
            heads = self._number("num_key_value_heads")
        size = self.config.get("head_dim") or self._number("hidden_size") // queries
        if out != heads * size or size % 2:
            raise ValueError(
                f"{layer!r} has {out} rows, but {self.file} says {heads} heads of {size}: it is "
                "another base model"
            )
        return heads

    def _optional(self, *keys: str) -> Size:
        given = [key for key in keys if self.config.get(key) is not None]
        return self._number(given[0]) if given else None

    def _number(self, *keys: str) -> int:
        value = next((self.config[key] for key in keys if key in self.config), None)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.file}: {keys[0]} is {value!r}, not a positive number")
        return value

    def _refused(self, layer: str, why: str) -> ValueError:
        linears = ", ".join(self.architecture.linears)
        return ValueError(
            f"{layer!r} cannot be adapted in a GGUF model of {self.kind}: {why} (those that can "
            f"be are {self.architecture.blocks}.<i>. with {linears}); {_REMEDY}"
        )


def _times(one: Size, other: Size) -> Size:
    return None if one is None or other is None else one * other
