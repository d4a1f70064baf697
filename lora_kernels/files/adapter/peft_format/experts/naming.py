"""The names that a checkpoint gives each expert, and the layout that suits a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ....._utils.names import without_wrappers
from .....model.config import ExpertPart, StoredExperts
from .....model.experts.kinds import is_experts, projections, why_not_adaptable
from .....model.experts.stored import StoredMatrix, stored_matrices
from .layouts import EACH, STACKED

# Model types (`config.model_type` or its beginning) for which vLLM reads only the stacked layout,
# whatever the checkpoint has: `is_3d_moe_weight` in vLLM 0.33.0.
_3D_IN_VLLM = ("gpt_oss", "qwen3_5_moe", "interns1_pro", "qwen3_vl_moe", "qwen3_omni_moe")
# PEFT 0.21 converts "each" files for models of these families.
_FAMILIES_OF_PEFT = ("mixtral", "qwen2_moe")


def expert_parameters(model: nn.Module) -> dict[str, str]:
    """{name: name in this model} of the experts' parameters that can be adapted, in the model's
    order. The names in this model may have parts of compiled or wrapped blocks, which the keys
    leave out.
    """
    found = {}
    for path, module in model.named_modules():
        if is_experts(path, module) and why_not_adaptable(module) is None:
            for parameter in projections(module):
                name = f"{path}.{parameter}" if path else parameter
                found[without_wrappers(name)] = name
    return found


def stored_experts(model: nn.Module) -> dict[str, StoredExperts]:
    """What checkpoints of the model store for its experts' parameters, by name, and the suitable
    layout: "each" if the checkpoints have a tensor for each expert, PEFT converts such a file, and
    vLLM does not require the stacked layout; else "stacked".
    """
    names = expert_parameters(model)
    parts = {name: expert_parts(model, own) for name, own in names.items()}
    each = all(parts.values()) and not is_3d_in_vllm(model) and is_converted_by_peft(model)
    return {name: StoredExperts(own, EACH if each else STACKED) for name, own in parts.items()}


def expert_parts(model: nn.Module, parameter: str) -> tuple[ExpertPart, ...]:
    """The tensors of a checkpoint that hold an expert parameter; () unless the checkpoint has a
    tensor for each expert that is not transposed.
    """
    matrices = stored_matrices(model, parameter)
    if isinstance(matrices, str):
        return ()
    by_rows: dict[tuple[int, int], list[StoredMatrix]] = {}
    for matrix in matrices:
        if matrix.expert is None or matrix.transposed or not matrix.name.endswith(".weight"):
            return ()
        by_rows.setdefault((matrix.rows.start, matrix.rows.stop), []).append(matrix)
    parts = [(_pattern(own), *rows) for rows, own in sorted(by_rows.items())]
    return tuple(ExpertPart(*part) for part in parts) if all(part[0] for part in parts) else ()


def _pattern(matrices: Sequence[StoredMatrix]) -> str:
    """The pattern of the tensors' names, with "{}" for the expert's number; "" if there is none."""
    names = {m.expert: without_wrappers(m.name.removesuffix(".weight")) for m in matrices}
    first = names.get(0, "").split(".")
    for at in reversed([i for i, part in enumerate(first) if part == "0"]):
        pattern = ExpertPart(".".join([*first[:at], "{}", *first[at + 1 :]]), 0, 0)
        if pattern.names(len(names)) == [names.get(e) for e in range(len(names))]:
            return pattern.name
    return ""


def is_3d_in_vllm(model: Any) -> bool:
    """Whether vLLM requires the stacked layout for this model."""
    return str(getattr(getattr(model, "config", None), "model_type", "")).startswith(_3D_IN_VLLM)


def is_converted_by_peft(model: Any) -> bool:
    """Whether PEFT 0.21 turns a file with a pair for each expert into adapters of the model's
    parameters. PEFT knows the types of transformers' models, but ignores the experts of qwen2_moe,
    with a warning.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as FAMILIES
    except ImportError:  # before transformers 5, where experts are linear layers
        return False
    return kind == "mixtral" or FAMILIES.get(kind) in _FAMILIES_OF_PEFT
