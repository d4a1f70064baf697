"""Ollama's rules, for `ADAPTER <folder>` in a Modelfile.

They are in Ollama's `convert/`: `convert.go` (the architectures, α as an unsigned integer),
`convert_llama_adapter.go` and `convert_gemma2_adapter.go` (names; factors of the other orientation
are recognized by their shapes; rows of q and k), `reader.go` and `reader_safetensors.go` (dtypes),
as of mid 2026; and in llama.cpp, which loads the result (s = α / rank of the tensor).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..remedies import GGUF, is_gguf, renaming
from ..stored import CONVOLUTION, EMBEDDING, StoredAdapter, StoredLayer, names_in_brief
from ..updates import rank_per_expert
from .model import BaseModel
from .verdict import Applied, Engine, Factors, Verdict, fault_of, note_other_files, refuse_shapes

# Architectures of GGUF files, and the classes that are converted to them.
_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM")
_GEMMA = ("Gemma2ForCausalLM",)
_NAME = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_ROTATED = ("q_proj", "k_proj")
_MODELFILE = "and ADAPTER ./OUT.gguf in the Modelfile"


def takes(base: BaseModel | None) -> bool:
    """Whether the base has one of the architectures whose adapters Ollama converts."""
    return base is not None and any(name in (*_LLAMA, *_GEMMA) for name in base.classes)


def judge(adapter: StoredAdapter, base: BaseModel | None) -> Verdict:
    """What Ollama does with an adapter's folder."""
    verdict = Verdict.of(adapter)
    verdict.rank = max(rank_per_expert(adapter, layer) for layer in adapter.layers.values())
    llama = base is None or any(name in _LLAMA for name in base.classes)
    rotated = llama and any(layer.last in _ROTATED for layer in adapter.layers.values())
    gguf = _gguf(verdict, adapter, base)
    if rotated:  # a folder cannot be right
        verdict.portable = gguf
    alpha = _alpha(verdict, adapter)
    if base is not None and base.classes and not takes(base):
        verdict.refuse(
            f"adapters of {base.classes[0]} are not converted, only those of Llama and Gemma 2",
            gguf
            if gguf == verdict.merge
            else f"{gguf}; if Ollama's own engine serves the model and says 'loras are not yet "
            f"implemented', {verdict.merge}",
        )
    _tensors(verdict, adapter, gguf)
    refuse_shapes(verdict, adapter, base)
    fault, remedy = fault_of(adapter, base)
    for name, layer in adapter.layers.items():
        scale = alpha / rank_per_expert(adapter, layer) if alpha else 1.0
        dtype = torch.bfloat16 if layer.left.entry.dtype == "BF16" else torch.float16
        change, wrong = _rotation(layer, base) if llama else (None, "")
        verdict.layers[name] = Applied(
            scale, dtype, fault=fault or wrong, remedy=remedy or gguf, change=change
        )
    if rotated:
        verdict.notes.append(
            "of Llama's q_proj and k_proj, the source permutes A, where the rows of B belong "
            f"permuted. {gguf}"
        )
    note_other_files(verdict, adapter)
    if base is None:
        verdict.notes.append(
            "only adapters of Llama and Gemma 2 are converted; the base is not known (--base)"
        )
    return verdict


def _gguf(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> str:
    """The remedy: give Ollama a GGUF file, or merge the adapter if it cannot become one."""
    heads = [name for name, layer in adapter.layers.items() if layer.last == "lm_head"]
    tied = any(base is not None and base.is_tied(name) for name in heads)
    if not is_gguf(adapter) or tied:
        return verdict.merge
    wrong = [_renamed(name) for name in adapter.layers if not _NAME.fullmatch(name)]
    change = wrong[0] if len(set(wrong)) == 1 and len(wrong) == len(adapter.layers) else ""
    return f"{GGUF}{change}, {_MODELFILE}"


def _renamed(name: str) -> str:
    """The option that gives the name its usual beginning; "" if its end is not a usual one."""
    block = re.search(r"layers\.\d+\.", name)
    usual = "" if block is None else f"model.{name[block.start() :]}"
    if not _NAME.fullmatch(usual):
        return ""
    return renaming(name, usual).removeprefix("lora-kernels convert ADAPTER OUT")


def _alpha(verdict: Verdict, adapter: StoredAdapter) -> float:
    alpha = adapter.config.get("lora_alpha")
    if alpha is None:
        return 0.0
    if isinstance(alpha, int) and not isinstance(alpha, bool) and 0 <= alpha < 2**32:
        return float(alpha)
    verdict.refuse(
        f"lora_alpha must be written as a whole number, it is {alpha!r}",
        verdict.portable,
    )
    return float(alpha) if isinstance(alpha, (int, float)) else 0.0


def _tensors(verdict: Verdict, adapter: StoredAdapter, gguf: str) -> None:
    strange = [n for n, layer in adapter.layers.items()
               if not _NAME.fullmatch(n) or layer.kind in (EMBEDDING, CONVOLUTION)]  # fmt: skip
    strange += adapter.others
    if strange:
        verdict.refuse(
            "only q, k, v, o, gate, up and down_proj in model.layers.<number> have a name in the "
            f"converted file; {names_in_brief(strange)} fail when the model is loaded",
            gguf,
        )
    named = [layer.right.name for layer in adapter.layers.values()
             if layer.adapter or layer.style != "lora_A"]  # fmt: skip
    if named:
        verdict.refuse(
            "names of tensors must end in lora_A.weight and lora_B.weight: "
            f"{names_in_brief(named)}",
            verdict.portable,
        )
    wide = [n for n, layer in adapter.layers.items() if layer.rank > min(layer.shape)]
    if wide:
        verdict.refuse(
            "the rank must not be above a layer's sizes, or the factors are taken for transposed "
            f"ones: {names_in_brief(wide)}",
            gguf if is_gguf(adapter) else verdict.merge,
        )
    floats = {t.entry.dtype for layer in adapter.layers.values() for t in (layer.right, layer.left)}
    if not floats <= {"F32", "F16", "BF16"}:
        verdict.refuse(
            f"tensors must be float32, float16 or bfloat16, not {', '.join(sorted(floats))}",
            verdict.portable,
        )


def _rotation(
    layer: StoredLayer, base: BaseModel | None
) -> tuple[Callable[[Factors], Factors] | None, str]:
    """What Ollama does to the factors of q_proj and k_proj, and how to say it if it cannot be
    computed.

    The base's rows are permuted, so that B's rows have to be permuted too. Ollama permutes A.
    """
    if layer.last not in _ROTATED:
        return None, ""
    heads = None if base is None else base.option("num_attention_heads")
    groups = heads if layer.last == "q_proj" or base is None else base.option("num_key_value_heads")
    groups = groups or heads
    out, features = layer.shape
    if not isinstance(heads, int) or not isinstance(groups, int):
        return None, "A is permuted instead of B"
    if features % (2 * heads) or out % (2 * groups):
        return None, f"A is permuted as if the layer had {heads} heads, which do not divide it"

    def change(factors: Factors) -> Factors:
        right, left = factors
        # Ollama reads A's memory as [in, r].
        moved = _swapped(right.reshape(features, -1), heads).reshape(right.shape)
        # The comparison uses transformers' order of rows. The engine's base has permuted rows, but
        # its B does not: the permutation is undone here.
        halves = left.reshape(groups, out // groups // 2, 2, -1)
        return moved, halves.transpose(1, 2).reshape(left.shape)

    return change, ""


def _swapped(matrix: Tensor, heads: int) -> Tensor:
    """Reorders the rows of each head from [2, d/2] to [d/2, 2]."""
    rows, cols = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, cols).transpose(1, 2).reshape(rows, cols)


ENGINE = Engine("ollama", "Ollama, mid 2026", judge)
