"""The predicted time and memory of `lora::grouped_linear`, from bytes and operations.

Nothing here is measured. Rows are spread over the experts at random, so the last tile of each
expert is half empty on average, for all variants alike. Every pass over the rows of a product is
counted with the bytes that it reads and writes; bytes that happen to be in the L2 cache are not
subtracted. These are lower bounds: for PEFT's formula, the same count gives 0.97 ms on an H100,
where PEFT measured 2.56 ms.
"""

from __future__ import annotations

from benchmarks.gpu.targets.costs import (
    BF16,
    FP32,
    FUSED_RANK,
    MIN_WIDTH,
    SMS,
    TILE_LOADS,
    TILE_SERIAL,
    Cost,
    HostTimes,
    Machine,
)
from benchmarks.gpu.targets.experts import Layer, Projection

CHUNK = 1024  # rows of a part of dA and dB, as in triton_kernels/grouped/grads.py
TILE_COLUMNS = {64: 128, 128: 256}
SORT = 60e-6  # a stable sort of about 65,536 int32 by cub: assumed, not measured


def product(machine: Machine, p: Projection, columns: int, r: int = 0) -> Cost:
    """One grouped GEMM with `columns` results per row, and its rank term."""
    wide = max(r, MIN_WIDTH) if r else 0
    moved = p.weight + p.matrix(p.n + p.k) + FP32 * p.experts * columns * r + p.matrix(r)
    flops = 2 * p.padded * (p.n * p.k + columns * wide)
    tiles = -(-p.padded // p.tile) * -(-columns // TILE_COLUMNS[p.tile])
    each = TILE_SERIAL + (TILE_LOADS if r > FUSED_RANK else 0.0) if r else 0.0
    return machine.kernel(moved, flops, serial=-(-tiles // SMS) * each)


def thin(machine: Machine, p: Projection, columns: int, r: int) -> Cost:
    """One pass over [size, columns] for z, dz, dA or dB: the factor is read or written once."""
    moved = p.matrix(columns) + p.matrix(r) + FP32 * p.experts * r * columns
    return machine.kernel(moved, 2 * p.padded * columns * max(r, MIN_WIDTH))


def parts(machine: Machine, p: Projection, columns: int, r: int) -> Cost:
    """Adding the parts of experts with several chunks; zero if each expert has one chunk."""
    several = max(0.0, p.size / CHUNK - p.experts)
    return machine.kernel(0, workspace=2 * FP32 * several * r * columns)


def ours(machine: Machine, p: Projection, r: int, backward: bool) -> Cost:
    """The forward, or the backward."""
    table = machine.kernel(0)
    if not backward:
        return table + thin(machine, p, p.k, r) + product(machine, p, p.n, r)
    cost = table * 2 + thin(machine, p, p.n, r) + product(machine, p, p.k, r)
    for columns in (p.k, p.n):  # dA and dB
        cost += thin(machine, p, columns, r) + parts(machine, p, columns, r)
    if p.tokens:
        cost += Cost(serial=SORT) + machine.kernel(p.matrix(p.k) + BF16 * p.tokens * p.k)
    return cost


def bare(machine: Machine, p: Projection, backward: bool) -> Cost:
    """The frozen experts: x is gathered before, and its gradient is summed afterwards."""
    cost = product(machine, p, p.k if backward else p.n)
    gather = machine.kernel(p.matrix(p.k) + BF16 * p.tokens * p.k)
    return cost + gather if p.tokens else cost


def formula(machine: Machine, p: Projection, r: int, backward: bool) -> Cost:
    """PEFT's formula, W + B A. The backward forms its full gradient, which is read for dA and for
    dB.
    """
    if not backward:
        merge = machine.kernel(2 * p.weight, 2 * p.experts * p.n * p.k * r)
        return bare(machine, p, False) + merge
    full = machine.kernel(p.weight + p.matrix(p.n + p.k), 2 * p.padded * p.n * p.k)
    return bare(machine, p, True) + full + machine.kernel(p.weight) * 2


def passes(machine: Machine, p: Projection, choices: int, backward: bool) -> Cost:
    """The block's passes around its two projections (p is the second): activation, order of the
    tokens, routing weights, sum over the choices.
    """
    inner, outer, few = p.matrix(p.k), p.matrix(p.n), p.matrix(p.n) / choices
    if not backward:
        moved = (3 * inner, 2 * outer, 2 * outer, outer + few)
    else:
        # The routing weights' gradient: y and dy are read, their product is written and summed.
        moved = (few + outer, 2 * outer, 3 * outer, outer, 2 * outer, 5 * inner)
    cost = Cost()
    for bytes_ in moved:
        cost += machine.kernel(bytes_)
    return cost


def expert_layer_costs(machine: Machine, layer: Layer) -> tuple[Cost, Cost]:
    """(ours, bare): forward and backward of the block, with the same passes."""
    around = Cost()
    mine, others = Cost(), Cost()
    for backward in (False, True):
        around += passes(machine, layer.projections[1], layer.top_k, backward)
        for p in layer.projections:
            mine += ours(machine, p, layer.r, backward)
            others += bare(machine, p, backward)
    return mine + around, others + around


def stack_costs(
    machine: Machine, p: Projection, r: int, host: HostTimes | None = None
) -> tuple[Cost, Cost]:
    """(ours, PEFT's formula): forward and backward of one projection."""
    mine = ours(machine, p, r, False) + ours(machine, p, r, True)
    called = 3 * (host or HostTimes.measured()).layer
    mine += Cost(host=max(0.0, called - mine.total))
    return mine, formula(machine, p, r, False) + formula(machine, p, r, True)


def stack_bytes(p: Projection, r: int) -> float:
    """Our peak memory: W, A, B and their gradients, x, y, dY, dX, z, dz, and parts of dB."""
    factors = FP32 * p.experts * r * (p.n + p.k)
    workspace = FP32 * (p.size // CHUNK + p.experts + 1) * r * max(p.n, p.k)
    return p.weight + 2 * factors + 2 * p.matrix(p.n + p.k) + 2 * p.matrix(r) + workspace
