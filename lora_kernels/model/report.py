"""`LoRAReport`: which layers `add_lora` or `load_adapter` adapted, and why it skipped others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from ..init.fused import Parts
from ..init.sharded.layout import full_shape, text_of
from .plan import LayerPlan
from .selection import Selection
from .starts import WAITS


@dataclass(frozen=True)
class AdaptedRow:
    """One adapted layer. Experts have a row for each 3-D parameter, with the sizes of one of its
    `num_experts` matrices.

    `note` says why the initial factors are not absorbed, or is empty. `sharding` says how the
    weight is sharded, such as "in 8 parts by rows", or is empty. If the layer `waits`, its weight
    is on the meta device, and `start_adapters` will compute the start. `use_dora` says whether the
    layer's magnitudes train too. `parts` has the first row and the row after the last of each part
    of a fused layer; `r` is then the rank of all parts together.
    """

    name: str
    out_features: int
    in_features: int
    kind: str
    r: int
    lora_alpha: float
    scaling: float
    residual: str
    note: str
    aliases: tuple[str, ...]
    num_experts: int | None = None
    sharding: str = ""
    waits: bool = False
    use_dora: bool = False
    parts: Parts = ()


@dataclass(frozen=True)
class LoRAReport:
    """The adapted layers, the skipped layers with reasons, and the numbers of parameters.

    `adapted` has a row for each adapted layer, `skipped` is {name: reason} for the other linear
    layers, and `saved` has the names of tensors that are trained in full. `trainable` and `total`
    are numbers of parameters, and `seconds` is the duration. `str()` gives a readable summary.
    """

    adapter_name: str
    adapted: tuple[AdaptedRow, ...]
    skipped: dict[str, str]
    saved: tuple[str, ...]
    trainable: int
    total: int
    seconds: float

    @property
    def trainable_share(self) -> float:
        """The trainable share of all parameters, 0 to 1."""
        return self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        lines = [
            f"adapter {self.adapter_name!r}: {len(self.adapted)} layers in {self.seconds:.2f} s; "
            f"{self.trainable:,} of {self.total:,} parameters train "
            f"({100 * self.trainable_share:.2f} %)"
        ]
        for rows in _grouped(self.adapted):
            row = rows[0]
            rank = f"r={row.r}" + (f" ({len(row.parts)} parts)" if row.parts else "")
            numbers = f"{rank}, s={row.scaling:g}, {row.residual}{', DoRA' * row.use_dora}"
            experts = "" if row.num_experts is None else f"{row.num_experts} experts x "
            sharding, note = row.sharding and f" {row.sharding}", row.note and f" ({row.note})"
            lines.append(
                f"  {len(rows):4d} x {_pattern(row.name)} {experts}[{row.out_features}, "
                f"{row.in_features}]{sharding}: {numbers}{note}"
            )
        for row in self.adapted:
            if row.aliases:
                lines.append(f"  {row.name} is {', '.join(row.aliases)} too")
        for reason in dict.fromkeys(self.skipped.values()):
            names = [n for n, why in self.skipped.items() if why == reason]
            lines.append(f"  not adapted: {listed(names)}: {reason}")
        if any(row.waits for row in self.adapted):
            lines.append(f"  the adapter {WAITS}")
        if self.saved:
            lines.append(f"  trained in full: {listed(self.saved)}")
        return "\n".join(lines)


def make_report(
    model: nn.Module,
    adapter_name: str,
    plans: Sequence[LayerPlan],
    selection: Selection,
    saved: Iterable[str],
    seconds: float,
) -> LoRAReport:
    """The report on an adapted model; `saved` are the names of the tensors trained in full."""
    rows = tuple(
        AdaptedRow(
            plan.name,
            *plan.base.shape,
            plan.base.kind,
            plan.options.r,
            plan.options.lora_alpha,
            plan.options.scaling,
            plan.options.residual,
            plan.note,
            tuple(plan.aliases),
            plan.base.num_experts,
            text_of(plan.base.stored_weight) if plan.base.sharded else "",
            plan.waits,
            plan.options.use_dora,
            plan.options.parts,
        )
        for plan in plans
    )
    parameters = list(model.parameters())
    trainable = sum(prod(full_shape(p)) for p in parameters if p.requires_grad)
    total = sum(prod(full_shape(p)) for p in parameters)
    return LoRAReport(
        adapter_name, rows, dict(selection.skipped), tuple(saved), trainable, total, seconds
    )


def _grouped(rows: Sequence[AdaptedRow]) -> list[list[AdaptedRow]]:
    """Groups of rows that differ only in the numbers of their names."""
    groups: dict[tuple[object, ...], list[AdaptedRow]] = {}
    for row in rows:
        shape = (row.num_experts, row.out_features, row.in_features)
        numbers = (row.r, row.scaling, row.residual, _pattern(row.note), row.sharding)
        groups.setdefault((_pattern(row.name), shape, numbers), []).append(row)
    return list(groups.values())


def _pattern(name: str) -> str:
    """The text with * for every number between dots."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def listed(names: Sequence[str]) -> str:
    """The names as a text: at most six patterns, with * for numbers."""
    patterns = list(dict.fromkeys(_pattern(name) for name in names))
    shown = ", ".join(patterns[:6])
    return f"{shown} and {len(patterns) - 6} more" if len(patterns) > 6 else shown
