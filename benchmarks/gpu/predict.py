"""What bytes and flops say each target's line should take, before any GPU is had.

A device is two figures: `copy`, bytes read and written per second by a large copy, and `matmul`,
flop/s of a large bf16 product. Then, with W [n, k], M tokens, bf16 = 2 bytes, fp32 factors:

- every kernel: max(bytes / copy, flops / matmul) + KERNEL, the latter an assumption;
- operator: its bytes (`cases.py`) as above; aim and share are of `copy`;
- init: two reads and one write of every W (the floor), one write of A and B, 4 r (n + k) bytes per
  projection, and INIT_KERNELS kernels; the host's time to launch them is not in it;
- PiSSA: svd_lowrank reads an fp32 W 2 · SVD_NITER + 2 times and takes as many Householder QRs of
  HOUSEHOLDER seconds; ours reads a bf16 W twice a block of its Krylov space, moves the blocks' own
  bytes (SPACE_BYTES an entry and step), and takes SMALL_KERNELS of 1 µs a step for a batch of 32
  and JACOBI once. The host's time is not in it. Predicted for r = 16 only;
- exact SVD: no prediction, its speed follows from neither bytes nor flops;
- bare layer, forward: 2 M n k flops; bytes of W, x and y. Backward (x only): the same once more;
- our forward: the bare one, whose epilogue adds 2 M n r flops and reads B (the fused kernel: y
  makes no round trip), and the shrink z = x Aᵀ: reads x and A, writes z. Were y written as z Bᵀ
  first and the product added, 2 M n / copy seconds more;
- our backward: dX like the forward's product, with A in B's place; one read of dY for dz and dB;
  one read of x for dA. Dropout: the mask is drawn again, never stored, MASK instructions an element
  in the shrink, in dA and in dX, whose rank term is then written first (M k) and read by cuBLAS;
- decode: our forward against the bare one at small M, where the bytes of W decide;
- memory: W, x, dY, y and dX of the bare layer; ours adds A, B and their gradients in fp32 and z, dz
  (r wide) in bf16; a kernel's workspace is not in it;
- grid: no cell is expected to be slower than the best peer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu.cases import operator_cases
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.timing import CLOCKS
from benchmarks.shapes import Shape, shape_name

KERNEL = 1e-6  # seconds beside a kernel's bytes: launch gap, ramp and tail. Assumed.
INIT_KERNELS = 12
MASK = 20  # instructions an element: Philox4x32-10 shared by four, and the choice
MIN_WIDTH = 16  # a tensor core's product is at least this wide
SVD_NITER, SVD_AIM = 16, 5.0
HOUSEHOLDER = 0.35e-3  # seconds of cuSOLVER's geqrf and orgqr on [4096, 16]. Assumed.
JACOBI = 2e-3  # seconds of both eigenproblems of a batch of 32 (csrc/cuda/jacobi_eigh.cu)
SVD_BLOCK, SVD_STEPS, SVD_BATCH = 16, 7, 32  # of the default subspace at r = 16
SPACE_BYTES = 60  # of basis, image and their float64 copies, for an entry and a step
SMALL_KERNELS = 60
BF16, FP32 = 2, 4
FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Machine:
    """A device's measured ceilings."""

    name: str
    copy: float  # bytes/s, read and written
    matmul: float  # flop/s in bf16
    lanes: float = 132 * 128 * 1.755e9  # instructions/s of all lanes together

    def kernel(self, bytes_: float, flops: float = 0.0, masked: float = 0.0) -> float:
        """Seconds; `masked` elements have their part of the dropout mask drawn."""
        return max(bytes_ / self.copy, flops / self.matmul, masked * MASK / self.lanes) + KERNEL


H200 = Machine("nvidia-h200", copy=4.3e12, matmul=790e12)


@dataclass(frozen=True)
class Line:
    """A target with its prediction; `predicted` is in the aim's unit, times are seconds."""

    name: str
    sense: str  # "≤" or "≥"
    aim: float
    unit: str
    predicted: float | None = None
    seconds: float | None = None
    floor: float | None = None

    def met(self, value: float) -> bool:
        """Whether a measured value reaches the aim."""
        return value <= self.aim if self.sense == "≤" else value >= self.aim

    def row(self) -> dict[str, object]:
        """For a CSV, with the measured columns empty."""
        return {
            "line": self.name,
            "aim": f"{self.sense} {self.aim:g} {self.unit}",
            "predicted": "" if self.predicted is None else self.predicted,
            "predicted_ms": "" if self.seconds is None else 1e3 * self.seconds,
            "floor_ms": "" if self.floor is None else 1e3 * self.floor,
            "measured": "",
            "measured_ms": "",
            "met": "",
        }


def init_line(plan: Plan, r: int, what: str = "") -> str:
    """The name of an init line."""
    return f"init, {plan.projections} projections, r = {r}" + (f", {what}" if what else "")


def layer_line(plan: Plan, r: int, dropout: float, which: str) -> str:
    """The name of a layer line."""
    extra = f", dropout {dropout:g}" if dropout else ""
    where = f"{plan.layer_tokens} tokens, {shape_name(plan.layer_shape)}"
    return f"layer, {where}, r = {r}{extra}, {which}"


def decode_line(plan: Plan, tokens: int, shape: Shape) -> str:
    """The name of a decode line."""
    return f"decode, {tokens} tokens, {shape_name(shape)}, r = {plan.decode_rank}"


def grid_line(clock: str) -> str:
    """The name of a grid line."""
    return f"grid, cells slower than the best peer, {clock}"


def memory_line(plan: Plan) -> str:
    """The name of the memory line."""
    where = f"{plan.layer_tokens} tokens, {shape_name(plan.layer_shape)}"
    return f"memory, {where}, r = {plan.layer_cases[0][0]}"


def lines(machine: Machine, plan: Plan) -> list[Line]:
    """All targets, in the order in which they are measured."""
    return [
        *_init(machine, plan),
        *_operators(machine, plan),
        *_layer(machine, plan),
        *_decode(machine, plan),
        Line(memory_line(plan), "≤", 1.02, "× bare", _memory(plan)),
        *(Line(grid_line(clock), "≤", 0, "cells", 0.0) for clock in CLOCKS),
    ]


def init_floor(plan: Plan, copy: float) -> float:
    """Seconds of two reads and one write of every weight."""
    return 3 * BF16 * sum(n * k * count for (n, k), count in plan.model) / copy


def layer_seconds(
    machine: Machine, tokens: int, shape: Shape, r: int, backward: bool, dropout: float = 0.0
) -> tuple[float, float]:
    """(ours, bare), as the module's docstring says."""
    (n, k), m, wide = shape, tokens, max(r, MIN_WIDTH)

    def product(width: int = 0, outputs: int = 0) -> float:
        base = BF16 * (n * k + m * (n + k)) + FP32 * outputs * (r if width else 0)
        return machine.kernel(base, 2 * m * n * k + 2 * m * outputs * width)

    z, masked = BF16 * m * r, m * k if dropout else 0
    thin = machine.kernel(BF16 * m * k + FP32 * r * k + z, 2 * m * k * wide, masked)
    ours = product(wide, n) + thin
    bare = product()
    if backward:
        if dropout:
            ours += machine.kernel(BF16 * m * k + z, 2 * m * k * wide, masked)
            ours += product() + BF16 * m * k / machine.copy
        else:
            ours += product(wide, k)
        ours += machine.kernel(BF16 * m * n + FP32 * 2 * r * n + 2 * z, 4 * m * n * wide)
        ours += thin
        bare *= 2
    return ours, bare


def pissa_seconds(machine: Machine, plan: Plan) -> tuple[float, float]:
    """(ours, svd_lowrank) for the whole model at r = 16, as the module's docstring says."""
    ours = peer = 0.0
    for (n, k), count in plan.model:
        reads = 2 * SVD_NITER + 2
        peer += count * reads * (machine.kernel(FP32 * n * k) + HOUSEHOLDER)
        space = SPACE_BYTES * (n + k) * SVD_BLOCK * sum(range(1, SVD_STEPS + 1))
        ours += count * (2 * SVD_STEPS * machine.kernel(BF16 * n * k) + space / machine.copy)
        batches = -(-count // SVD_BATCH)
        ours += batches * (SVD_STEPS * SMALL_KERNELS * KERNEL + JACOBI)
    return ours, peer


def _init(machine: Machine, plan: Plan) -> Iterator[Line]:
    floor = init_floor(plan, machine.copy)
    for r in plan.init_ranks:
        factors = sum(FP32 * r * (n + k) * count for (n, k), count in plan.model)
        seconds = floor + factors / machine.copy + INIT_KERNELS * KERNEL
        yield Line(init_line(plan, r), "≤", 1.3, "× floor", seconds / floor, seconds, floor)
        yield Line(init_line(plan, r, "time"), "≤", 15, "ms", 1e3 * seconds, seconds, floor)
        yield Line(init_line(plan, r, "exact SVD"), "≥", 10_000, "× ours")
        name, unit = init_line(plan, r, "PiSSA"), f"× svd_lowrank niter {SVD_NITER}"
        if r <= SVD_BLOCK:
            ours, peer = pissa_seconds(machine, plan)
            yield Line(name, "≥", SVD_AIM, unit, peer / ours, ours)
        else:
            yield Line(name, "≥", SVD_AIM, unit)


def _operators(machine: Machine, plan: Plan) -> Iterator[Line]:
    for case in operator_cases(plan):
        floor = case.bytes / machine.copy
        seconds = floor + case.kernels * KERNEL
        yield Line(case.name, "≥", 0.85, "of copy", floor / seconds, seconds, floor)


def _layer(machine: Machine, plan: Plan) -> Iterator[Line]:
    n, k = plan.layer_shape
    for r, dropout in plan.layer_cases:
        for which in (FORWARD, BOTH):
            plain = r == plan.layer_cases[0][0] and not dropout
            aim = (1.05 if which == FORWARD else 1.08) if plain else 1.10
            ours, bare = layer_seconds(
                machine, plan.layer_tokens, plan.layer_shape, r, which == BOTH, dropout
            )
            floor = 2 * plan.layer_tokens * n * k / machine.matmul * (2 if which == BOTH else 1)
            name = layer_line(plan, r, dropout, which)
            yield Line(name, "≤", aim, "× bare", ours / bare, ours, floor)


def _decode(machine: Machine, plan: Plan) -> Iterator[Line]:
    for shape in plan.grid_shapes:
        for tokens in plan.decode_tokens:
            ours, bare = layer_seconds(machine, tokens, shape, plan.decode_rank, backward=False)
            floor = BF16 * shape[0] * shape[1] / machine.copy
            name = decode_line(plan, tokens, shape)
            yield Line(name, "≤", 1.15, "× bare", ours / bare, ours, floor)


def _memory(plan: Plan) -> float:
    (n, k), m, r = plan.layer_shape, plan.layer_tokens, plan.layer_cases[0][0]
    bare = BF16 * (n * k + 2 * m * (n + k))
    return 1 + (2 * FP32 * r * (n + k) + 2 * BF16 * m * r) / bare
