"""Where a checkpoint stores the parts of an expert parameter.

transformers stacks the experts' matrices of a checkpoint into 3-D parameters when it loads them,
and splits them when it saves. `stored_matrices` runs transformers' own conversion for saving on a
small stand-in of the parameter, whose numbers tell their positions, and reads off which tensor
holds what. So it supports every family that transformers supports, and needs no names of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The stand-in of one expert's matrix: its numbers of rows and columns differ, and each divides
# into two or three parts.
_ROWS, _COLUMNS = 12, 18


@dataclass(frozen=True)
class StoredMatrix:
    """A tensor of the checkpoint that holds an expert parameter or a part of it.

    W_e [out, in] is the matrix of expert e, with y = x W_eᵀ.

    Attributes:
        name: the tensor's in the checkpoint, such as "model.layers.0.mlp.experts.3.up_proj.weight"
            or "model.layers.0.mlp.experts.gate_up_proj".
        expert: the expert whose matrix the 2-D tensor holds; None if the tensor is 3-D and holds
            those of all experts, with the experts first.
        rows: the rows of W_e that the tensor holds: (0, I) of a gate, (I, 2I) of an up projection,
            (0, out) of a whole W_e.
        transposed: whether they are stored as [in, rows] instead of [rows, in].

    """

    name: str
    expert: int | None
    rows: slice
    transposed: bool

    def shape(self, num_experts: int, columns: int) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint; `columns` is the number "in" of W_e [out, in]."""
        sides = (self.rows.stop - self.rows.start, columns)
        sides = sides[::-1] if self.transposed else sides
        return sides if self.expert is not None else (num_experts, *sides)

    def part_of(self, weight: Tensor) -> Tensor:
        """The view [rows, in], or [in, rows] if it is stored so, of W_e [out, in]. If `weight` is
        the W of all experts [E, out, in], the view is of this tensor's expert or experts.
        """
        whole = weight if self.expert is None or weight.dim() == 2 else weight[self.expert]
        part = whole[..., self.rows, :]
        return part.mT if self.transposed else part


def stored_matrices(
    model: nn.Module, parameter: str, *, loaded_as_other_shape: bool = False
) -> list[StoredMatrix] | str:
    """The tensors of the checkpoint that hold the experts' parameter of that name, by experts and
    then by rows, as `save_pretrained` writes them; or the reason why they are not known.

    For a model that was loaded, the names are those of its checkpoint. The model may be on the meta
    device, and its experts may be adapted. A module that is not part of transformers stores the
    parameter as it is.

    `loaded_as_other_shape`: some conversions (qwen3_vl_moe's) transpose a stored tensor on loading
    if it has another shape than the parameter. Such files exist, but `save_pretrained` does not
    write them; True gives the places in such files.

    Raises:
        ValueError: the model has no such 3-D parameter.

    """
    try:
        module = model.get_submodule(parameter.rpartition(".")[0])
        value = model.get_parameter(parameter)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no parameter {parameter!r}") from None
    if value.dim() != 3:
        raise ValueError(f"{parameter!r} is {list(value.shape)}, not [experts, ...]: not 3-D")
    transposed = bool(getattr(module, "is_transposed", False))
    experts, out = value.shape[0], value.shape[2 if transposed else 1]
    probe = torch.arange(experts * _ROWS * _COLUMNS).view(experts, _ROWS, _COLUMNS)
    stand_in = probe.mT.contiguous() if transposed else probe
    try:
        saved = _saved(model, parameter, stand_in, loaded_as_other_shape)
    except Exception as error:  # the table may have any operation
        return f"transformers cannot convert it apart from the rest of the model ({error!r})"
    found = [_located(name, tensor, probe, out) for name, tensor in saved.items()]
    known = [part for part in found if part is not None]
    if len(known) < len(found) or sum(t.numel() for t in saved.values()) != probe.numel():
        return f"{type(model).__name__} stores it in another arrangement, as {next(iter(saved))!r}"
    return sorted(known, key=lambda part: (part.expert or 0, part.rows.start))


def _saved(model: Any, name: str, stand_in: Tensor, other_shape: bool) -> dict[str, Tensor]:
    """What `save_pretrained` makes of a parameter, by the names in the checkpoint."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, models store their parameters as they are
        return {name: stand_in}
    if not isinstance(model, PreTrainedModel):
        return {name: stand_in}
    shape = stand_in.mT.shape if other_shape else stand_in.shape
    small: Any = _SmallModel(model, name, torch.empty(shape, device="meta"))
    return dict(revert_weight_conversion(small, {name: stand_in}))


class _SmallModel:
    """The model, except that one parameter has another shape."""

    def __init__(self, model: nn.Module, name: str, value: Tensor) -> None:
        self._model, self._name, self._value = model, name, value

    def get_parameter(self, name: str) -> Tensor:
        return self._value if name == self._name else self._model.get_parameter(name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._model, attribute)


def _located(name: str, tensor: Tensor, probe: Tensor, out: int) -> StoredMatrix | None:
    """The place of a stored stand-in in the W of all experts [E, 12, 18], in rows of W_e [out, in];
    None if it is not a block of rows.
    """
    if tensor.dim() not in (2, 3) or not tensor.numel():
        return None
    expert = int(tensor.flatten()[0]) // probe[0].numel() if tensor.dim() == 2 else None
    rows = tensor // _COLUMNS % _ROWS
    first, last = int(rows.min()), int(rows.max()) + 1
    for transposed in (False, True):
        part = StoredMatrix(name, expert, slice(first, last), transposed)
        if torch.equal(part.part_of(probe), tensor) and not (first * out % _ROWS):
            scaled = slice(first * out // _ROWS, last * out // _ROWS)
            return StoredMatrix(name, expert, scaled, transposed)
    return None
