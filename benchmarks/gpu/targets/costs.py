"""The predicted time of every target, by cause, so that a missed target shows where to look.

A device is described by two measurements, `copy` (bytes read and written per second by a large
copy) and `matmul` (flop/s of a large bf16 product), and by assumptions, the constants below. A
kernel takes the time for its bytes or for its operations, whichever is longer. Added to it are the
launch, the work that does not overlap with the main loop, and the bytes of a workspace.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.common.report import RESULTS
from benchmarks.common.shapes import Shape
from benchmarks.gpu.targets.plan import Plan

# Assumed, in seconds, not measured on a GPU.
KERNEL = 1e-6  # of each kernel, besides its bytes: the gap before it, its beginning and its end
OVERLAPPED = 0.5e-6  # the same, for a kernel launched before the previous kernel has ended
COPY = 4e-6  # copying a table to the device, or sums to the host, on the kernels' stream
WAKE = 8e-6  # from an event on the device until the waiting host continues
LAUNCH = 12e-6  # from Python to the device's queue
LAST_ADDS = 1e-6  # the last program of `frobenius_stats` adds the totals of the others
TILE = 128, 256  # of our GEMM
# Work per tile that does not overlap with the main loop, compared with cuBLAS: z Bᵀ and, where z
# and B do not fit in registers beside the accumulator (r > 32), loading them. Estimated from PTX:
# 5 % of a tile.
TILE_SERIAL, TILE_LOADS = 0.8e-6, 1.4e-6
DECODE_SERIAL = 0.5e-6  # adding the partial sums of z before the result is stored
HOUSEHOLDER = 0.35e-3  # cuSOLVER's geqrf and orgqr on [4096, 16]
JACOBI = 2e-3  # both eigenproblems of a batch of 32 (csrc/cuda/jacobi_eigh.cu)

MASK = 20  # instructions per element: Philox4x32-10, shared by four elements, and the selection
MIN_WIDTH = 16  # the smallest width of a product on tensor cores
BF16, FP32, FP64 = 2, 4, 8
SMS, CLOCK = 132, 1.755e9
ENOUGH_PROGRAMS = 2 * SMS  # sums are split over about as many programs
DZ_COLUMNS, DA_COLUMNS, FUSED_RANK = 256, 128, 32  # as in triton_kernels/linear/grads.py
SVD_NITER = 16
SVD_BLOCK, SVD_STEPS, SVD_BATCH = 16, 7, 32  # for the default subspace at r = 16
SPACE_BYTES = 60  # per entry and step: the basis, its image and their float64 copies
SMALL_KERNELS = 60


@dataclass(frozen=True)
class Cost:
    """The seconds of one target, by cause."""

    host: float = 0.0  # the device waits for the host
    launches: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0  # operations of all kinds, if they take longer than the bytes
    serial: float = 0.0  # prologues and epilogues of tiles, final reductions
    workspace: float = 0.0  # writing partial sums and reading them again
    copies: float = 0.0  # between host and device

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(a + b for a, b in zip(self.parts.values(), other.parts.values(), strict=True))
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * part for part in self.parts.values()))


@dataclass(frozen=True)
class Machine:
    """A device's measured ceilings."""

    name: str
    copy: float  # bytes/s, read and written
    matmul: float  # flop/s in bf16
    lanes: float = SMS * 128 * CLOCK  # instructions/s of the whole device

    def kernel(
        self,
        bytes_: float,
        flops: float = 0.0,
        *,
        masked: float = 0.0,
        wide: tuple[float, int, int] = (0.0, 0, 0),
        workspace: float = 0.0,
        serial: float = 0.0,
        launch: float = KERNEL,
    ) -> Cost:
        """The cost of one launch.

        `masked` is the number of elements whose dropout mask is computed; `wide` is (entries,
        float64 operations per entry, conversions per entry), of which a multiprocessor does 64 and
        16 per clock; `workspace` is in bytes.
        """
        entries, operations, conversions = wide
        moved = bytes_ / self.copy
        busy = max(
            flops / self.matmul,
            masked * MASK / self.lanes,
            entries * max(operations / 64, conversions / 16) / (SMS * CLOCK),
        )
        return Cost(
            launches=launch,
            bytes=moved,
            flops=max(0.0, busy - moved),
            serial=serial,
            workspace=workspace / self.copy,
        )


# Earlier measurements with random data: copies of 1 GiB, products of 8192³.
H200 = Machine("nvidia-h200", copy=4.3e12, matmul=790e12)
H100 = Machine("nvidia-h100", copy=3.0e12, matmul=798e12)
MACHINES = (H200, H100)


@dataclass(frozen=True)
class HostTimes:
    """The host's times in seconds: from the call of `loram_init_foreach` to the launches of its
    first kernel and of its subtraction, and for a forward call of the layer. The defaults are used
    if there is no measurement.
    """

    first: float = 0.3e-3
    subtraction: float = 1.5e-3
    layer: float = 250e-6

    @classmethod
    def measured(cls, folder: Path = RESULTS) -> HostTimes:
        """The times in host_init.csv and host.csv (`benchmarks.cpu`), measured on another machine's
        CPU.
        """
        found = {}
        launches = {row["launch"]: row["median_us"] for row in _rows(folder / "host_init.csv")}
        for name, launch in (("first", "stats_kernel"), ("subtraction", "subtract_kernel")):
            if launch in launches:
                found[name] = 1e-6 * float(launches[launch])
        calls = [r["total_us"] for r in _rows(folder / "host.csv") if r["mode"] == "training"]
        if calls:
            found["layer"] = 1e-6 * max(map(float, calls))
        return cls(**found)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def model_bytes(plan: Plan) -> float:
    """The bytes of all weights in bf16."""
    return BF16 * sum(n * k * count for (n, k), count in plan.model)


def init_cost(machine: Machine, plan: Plan, r: int, host: HostTimes) -> Cost:
    """The cost of `loram_init_foreach`, in three steps: the statistics read every weight; β, the
    tables of sines, A and B are computed; the subtraction reads and writes every weight. The host
    needs the statistics' sums before it launches the subtraction.
    """
    weights = model_bytes(plan)
    entries = weights / BF16
    factors = sum(r * (n + k) * count for (n, k), count in plan.model)
    stats = machine.kernel(weights, wide=(entries, 2, 1), serial=LAST_ADDS) + Cost(copies=COPY)
    between = Cost(copies=3 * COPY) + machine.kernel(0) + machine.kernel(0)
    for _ in "AB":
        between += machine.kernel(FP32 * factors / 2, wide=(factors / 2, 6, 1))
    subtraction = machine.kernel(2 * weights, wide=(entries, 6, 2))
    # When the device has finished the first two steps; it is idle until the subtraction is
    # launched.
    free = host.first + stats.total + between.total
    launched = max(host.subtraction, host.first + stats.total + COPY + WAKE + LAUNCH)
    waits = Cost(host=host.first + max(0.0, launched - free) + WAKE)
    return stats + between + subtraction + waits


def pissa_costs(machine: Machine, plan: Plan) -> tuple[Cost, Cost]:
    """(ours, svd_lowrank's) for the whole model at r = 16, without the host's time.

    svd_lowrank reads W in fp32 2 · SVD_NITER + 2 times and computes as many Householder QRs. Ours
    reads W in bf16 twice per block of its Krylov space and moves the bytes of the blocks; a batch
    of 32 takes SMALL_KERNELS launches per step and JACOBI once.
    """
    ours, peer = Cost(), Cost()
    for (n, k), count in plan.model:
        reads = 2 * SVD_NITER + 2
        peer += (machine.kernel(FP32 * n * k) + Cost(serial=HOUSEHOLDER)) * (count * reads)
        space = SPACE_BYTES * (n + k) * SVD_BLOCK * sum(range(1, SVD_STEPS + 1))
        ours += machine.kernel(BF16 * n * k) * (2 * SVD_STEPS * count)
        ours += Cost(workspace=space / machine.copy) * count
        batches = -(-count // SVD_BATCH)
        small = Cost(launches=SVD_STEPS * SMALL_KERNELS * KERNEL, serial=JACOBI)
        ours += small * batches
    return ours, peer


def layer_costs(
    machine: Machine,
    tokens: int,
    shape: Shape,
    r: int,
    backward: bool,
    dropout: float = 0.0,
    host: HostTimes | None = None,
) -> tuple[Cost, Cost]:
    """(ours, bare) for many calls in a row, so that the host's time matters only if it is longer
    than the device's. A backward's host time is assumed to be twice a forward's. Bare is x Wᵀ and,
    backward, dY W.

    Ours, forward: z = x Aᵀ, and one product that adds z Bᵀ in its accumulator. Backward: dY is read
    once for dz and dB together (r ≤ 32) or once for each, with partial sums in a workspace; dX is a
    product like the forward's; x is read once for dA. With dropout, the mask is never stored; it is
    recomputed for z, dA and dX, and the rank term of dX is written first and read by cuBLAS.
    """
    (n, k), m, wide = shape, tokens, max(r, MIN_WIDTH)

    def product(width: int, outputs: int) -> Cost:
        base = BF16 * (n * k + m * (n + k)) + FP32 * outputs * (r if width else 0)
        tiles = -(-m // TILE[0]) * -(-outputs // TILE[1])
        each = (TILE_SERIAL if r <= FUSED_RANK else TILE_SERIAL + TILE_LOADS) if width else 0.0
        serial = -(-tiles // SMS) * each
        return machine.kernel(base, 2 * m * n * k + 2 * m * outputs * width, serial=serial)

    def reading(columns: int, sums: int, *, parts: float = 0.0, masked: float = 0.0) -> Cost:
        """The cost of reading [m, columns] once for `sums` products with factors of rank r."""
        moved = BF16 * m * columns + sums * (FP32 * r * columns + BF16 * m * r)
        flops = 2 * sums * m * columns * wide
        cost = machine.kernel(moved, flops, masked=masked, workspace=2 * FP32 * parts)
        return cost + (machine.kernel(0) if parts else Cost())  # adds the parts

    def chunks(columns: int, block: int) -> int:
        return -(-ENOUGH_PROGRAMS // -(-columns // block))

    masked = float(m * k) if dropout else 0.0
    ours = product(wide, n) + reading(k, 1, masked=masked)
    bare = product(0, n)
    if backward:
        if dropout:
            ours += machine.kernel(BF16 * (m * k + m * r), 2 * m * k * wide, masked=masked)
            ours += product(0, k) + Cost(workspace=BF16 * m * k / machine.copy)
        else:
            ours += product(wide, k)
        if r <= FUSED_RANK:
            parts = -(-n // DZ_COLUMNS) * m * r + chunks(n, DZ_COLUMNS) * n * r
            ours += reading(n, 2, parts=parts)
        else:
            ours += reading(n, 1) + reading(n, 1, parts=chunks(n, DA_COLUMNS) * n * r)
        ours += reading(k, 1, parts=chunks(k, DA_COLUMNS) * k * r, masked=masked)
        bare = bare * 2
    called = (host or HostTimes.measured()).layer * (3 if backward else 1)
    return ours + Cost(host=max(0.0, called - ours.total)), bare


def decode_costs(machine: Machine, tokens: int, shape: Shape, r: int) -> tuple[Cost, Cost]:
    """(ours, bare) in a CUDA graph: reading W dominates; ours has two kernels that overlap."""
    (n, k), m = shape, tokens
    base = BF16 * (n * k + m * (n + k))
    bare = machine.kernel(base, 2 * m * n * k)
    shrink = machine.kernel(BF16 * m * k + FP32 * r * k)
    main = machine.kernel(
        base + FP32 * n * r, 2 * m * n * (k + r), serial=DECODE_SERIAL, launch=OVERLAPPED
    )
    return shrink + main, bare
