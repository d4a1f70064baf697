"""The targets, each with the time that `costs.py` predicts.

- operators: bandwidth relative to that of a copy, from the bytes in `cases.py`;
- init: the floor is two reads and one write of every W;
- PiSSA: predicted for r = 16 only;
- exact SVD: not predicted, because neither its bytes nor its operations determine its time;
- layer: many calls in a row, so that the host's time matters only if it is longer than the
  device's;
- decode: our forward compared with the bare layer's for few tokens, in a CUDA graph;
- memory: the bare layer has W, x, dY, y and dX; ours also has A, B and their gradients in fp32, and
  z and dz in bf16. Workspaces of kernels are not included;
- experts: the block of a mixture, relative to the same block with frozen experts; and one
  parameter, for which PEFT measured 2.56 ms and 1.30 GB on an H100;
- grid: no cell is expected to be slower than the fastest peer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.common.shapes import Shape, shape_name
from benchmarks.gpu.targets.cases import OperatorCase, operator_cases
from benchmarks.gpu.targets.costs import (
    BF16,
    COPY,
    FP32,
    FP64,
    LAST_ADDS,
    SVD_BLOCK,
    SVD_NITER,
    Cost,
    HostTimes,
    Machine,
    decode_costs,
    init_cost,
    layer_costs,
    model_bytes,
    pissa_costs,
)
from benchmarks.gpu.targets.expert_costs import expert_layer_costs, stack_bytes, stack_costs
from benchmarks.gpu.targets.plan import Plan
from benchmarks.gpu.timing import CLOCKS

SVD_AIM = 5.0
FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Line:
    """A target with its prediction; `predicted` is in the unit of the aim, times are in seconds."""

    name: str
    sense: str  # "≤" or "≥"
    aim: float
    unit: str
    predicted: float | None = None
    cost: Cost | None = None
    floor: float | None = None

    def met(self, value: float) -> bool:
        """Whether a measured value meets the aim."""
        return value <= self.aim if self.sense == "≤" else value >= self.aim

    def row(self) -> dict[str, object]:
        """A row of a CSV file, with empty columns for measurements."""
        return {
            "line": self.name,
            "aim": f"{self.sense} {self.aim:g} {self.unit}",
            "predicted": "" if self.predicted is None else self.predicted,
            "predicted_ms": "" if self.cost is None else 1e3 * self.cost.total,
            "floor_ms": "" if self.floor is None else 1e3 * self.floor,
            "measured": "",
            "measured_ms": "",
            "met": "",
            "causes": self.causes,
            **{f"{name}_us": 1e6 * part for name, part in (self.cost or Cost()).parts.items()},
        }

    @property
    def causes(self) -> str:
        """The causes of the cost in percent, as text."""
        if self.cost is None:
            return ""
        shares = {name: 100 * part / self.cost.total for name, part in self.cost.parts.items()}
        return ", ".join(f"{name} {share:.3g}" for name, share in shares.items() if share >= 0.05)


def init_line(plan: Plan, r: int, what: str = "") -> str:
    """The name of a target for initialization."""
    return f"init, {plan.projections} projections, r = {r}" + (f", {what}" if what else "")


def layer_line(plan: Plan, r: int, dropout: float, which: str) -> str:
    """The name of a target for the layer."""
    extra = f", dropout {dropout:g}" if dropout else ""
    where = f"{plan.layer_tokens} tokens, {shape_name(plan.layer_shape)}"
    return f"layer, {where}, r = {r}{extra}, {which}"


def decode_line(plan: Plan, tokens: int, shape: Shape) -> str:
    """The name of a target for decoding."""
    return f"decode, {tokens} tokens, {shape_name(shape)}, r = {plan.decode_rank}"


def grid_line(clock: str) -> str:
    """The name of a target for the grid."""
    return f"grid, cells slower than the best peer, {clock}"


def memory_line(plan: Plan) -> str:
    """The name of the target for memory."""
    where = f"{plan.layer_tokens} tokens, {shape_name(plan.layer_shape)}"
    return f"memory, {where}, r = {plan.layer_cases[0][0]}"


def experts_line(plan: Plan) -> str:
    """The name of the target for the experts of a layer."""
    layer = plan.experts_layer
    sizes = f"{layer.experts} × {layer.hidden}, {layer.inner}, top-{layer.top_k}"
    return f"experts, {layer.tokens} tokens, {sizes}, r = {layer.r}, {BOTH}"


def stack_line(plan: Plan) -> str:
    """The name of the target for one parameter of experts."""
    return f"{_stack(plan)}, {BOTH}"


def stack_memory_line(plan: Plan) -> str:
    """The name of the target for the memory of one parameter of experts."""
    return f"{_stack(plan)}, peak"


def _stack(plan: Plan) -> str:
    p = plan.experts_stack
    shape = f"{p.experts} × {shape_name((p.n, p.k))}"
    return f"experts' parameter, {p.size} rows, {shape}, r = {plan.experts_rank}"


def lines(machine: Machine, plan: Plan) -> list[Line]:
    """All targets, in the order in which they are measured."""
    return [
        *_init(machine, plan),
        *_operators(machine, plan),
        *_layer(machine, plan),
        *_decode(machine, plan),
        Line(memory_line(plan), "≤", 1.02, "× bare", _memory(plan)),
        *_experts(machine, plan),
        *(Line(grid_line(clock), "≤", 0, "cells", 0.0) for clock in CLOCKS),
    ]


def init_floor(plan: Plan, copy: float) -> float:
    """The seconds for two reads and one write of every weight."""
    return 3 * model_bytes(plan) / copy


def _init(machine: Machine, plan: Plan) -> Iterator[Line]:
    floor, host = init_floor(plan, machine.copy), HostTimes.measured()
    for r in plan.init_ranks:
        cost = init_cost(machine, plan, r, host)
        yield Line(init_line(plan, r), "≤", 1.3, "× floor", cost.total / floor, cost, floor)
        name, ms = init_line(plan, r, "time"), 1e3 * cost.total
        yield Line(name, "≤", 15, "ms", ms, cost, floor)
        yield Line(init_line(plan, r, "exact SVD"), "≥", 10_000, "× ours")
        name, unit = init_line(plan, r, "PiSSA"), f"× svd_lowrank niter {SVD_NITER}"
        if r <= SVD_BLOCK:
            ours, peer = pissa_costs(machine, plan)
            yield Line(name, "≥", SVD_AIM, unit, peer.total / ours.total, ours)
        else:
            yield Line(name, "≥", SVD_AIM, unit)


def _operator_cost(machine: Machine, case: OperatorCase) -> Cost:
    entries = case.weights * case.shape[0] * case.shape[1]
    if case.operator == "dst_basis":
        return machine.kernel(case.bytes, wide=(entries, 6, 1))
    if case.operator == "frobenius_stats":
        table = Cost(copies=COPY if case.weights > 1 else 0.0)
        return table + machine.kernel(case.bytes, wide=(entries, 2, 1), serial=LAST_ADDS)
    if case.operator == "row_norms":  # also the norms of the right factor's rows
        return machine.kernel(0) + machine.kernel(case.bytes)
    tables = machine.kernel(5 * FP64 * sum(case.shape))
    return tables + machine.kernel(case.bytes, wide=(entries, 6, 2))


def _operators(machine: Machine, plan: Plan) -> Iterator[Line]:
    for case in operator_cases(plan):
        cost, floor = _operator_cost(machine, case), case.bytes / machine.copy
        yield Line(case.name, "≥", 0.85, "of copy", floor / cost.total, cost, floor)


def _layer(machine: Machine, plan: Plan) -> Iterator[Line]:
    n, k = plan.layer_shape
    for r, dropout in plan.layer_cases:
        for which in (FORWARD, BOTH):
            plain = r == plan.layer_cases[0][0] and not dropout
            aim = (1.05 if which == FORWARD else 1.08) if plain else 1.10
            ours, bare = layer_costs(
                machine, plan.layer_tokens, plan.layer_shape, r, which == BOTH, dropout
            )
            floor = 2 * plan.layer_tokens * n * k / machine.matmul * (2 if which == BOTH else 1)
            name = layer_line(plan, r, dropout, which)
            yield Line(name, "≤", aim, "× bare", ours.total / bare.total, ours, floor)


def _decode(machine: Machine, plan: Plan) -> Iterator[Line]:
    for shape in plan.grid_shapes:
        for tokens in plan.decode_tokens:
            ours, bare = decode_costs(machine, tokens, shape, plan.decode_rank)
            floor = BF16 * shape[0] * shape[1] / machine.copy
            name = decode_line(plan, tokens, shape)
            yield Line(name, "≤", 1.15, "× bare", ours.total / bare.total, ours, floor)


def _experts(machine: Machine, plan: Plan) -> Iterator[Line]:
    ours, bare = expert_layer_costs(machine, plan.experts_layer)
    yield Line(experts_line(plan), "≤", 1.2, "× bare", ours.total / bare.total, ours, bare.total)
    p, r = plan.experts_stack, plan.experts_rank
    ours, _ = stack_costs(machine, p, r)
    floor = 2 * p.weight / machine.copy  # W is read forward and backward
    yield Line(stack_line(plan), "≤", 1.3, "ms", 1e3 * ours.total, ours, floor)
    yield Line(stack_memory_line(plan), "≤", 0.7, "GB", stack_bytes(p, r) / 1e9)


def _memory(plan: Plan) -> float:
    (n, k), m, r = plan.layer_shape, plan.layer_tokens, plan.layer_cases[0][0]
    bare = BF16 * (n * k + 2 * m * (n + k))
    return 1 + (2 * FP32 * r * (n + k) + 2 * BF16 * m * r) / bare
