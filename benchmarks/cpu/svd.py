"""The SVD engine compared with other libraries: time and accuracy.

`python -m benchmarks.cpu.svd`. Two figures measure the accuracy of r triplets: the residual ‖W −
USVᵀ‖ divided by the smallest possible one, minus 1, and the largest relative error of a singular
value. Ours is timed with the default subspace (at least as accurate as 16 subspace iterations), a
small one (as accurate as 4) and a large one (residual below 1e-6). The other libraries work only in
float32; their time includes converting a bfloat16 weight, as in PEFT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from sklearn.utils.extmath import randomized_svd as sklearn_svd
from torch import Tensor

import lora_kernels  # noqa: F401  (registers the operators)
from benchmarks.common.harness import Variant, dtype_name, environment, interleave
from benchmarks.common.report import RESULTS, print_table, short, write_csv
from benchmarks.common.shapes import Shape, shape, shape_name
from benchmarks.cpu.accuracy_picture import accuracy_picture

SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096))
RANKS = (16, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16)
PICTURE_RANK = 64
MINOR_RANK = 64
QR_RANK = 16
Triplets = tuple[Tensor, Tensor, Tensor]

OURS, FAST, EXACT = "ours", "ours, small subspace", "ours, large subspace"
# The comparisons by dtype: (ours, peer, how many times as fast ours should be).
AIMS = {
    torch.float32: (
        (OURS, "svd_lowrank niter 16", 3.0),
        (FAST, "svd_lowrank niter 4", 1.5),
        (OURS, "scikit-learn", 4.0),
        (EXACT, "linalg.svd", 18.0),
    ),
    torch.bfloat16: (
        (OURS, "svd_lowrank niter 16", 4.5),
        (FAST, "svd_lowrank niter 4", 2.3),
        (OURS, "scikit-learn", 4.0),
    ),
}


def small_subspace(r: int) -> int:
    """The subspace that is as accurate as 4 subspace iterations."""
    return 64 if r <= 24 else 3 * r if r <= 128 else 11 * r // 4


def large_subspace(r: int) -> int:
    """The subspace that gives a residual below 1e-6."""
    return 13 * r if r <= 24 else 10 * r if r <= 96 else 17 * r // 2 if r <= 128 else 6 * r


def weight_like(size: Shape) -> Tensor:
    """Gaussian noise plus 512 directions of strength (k + 10)^-0.3, the first one an outlier."""
    n, m = size
    generator = torch.Generator().manual_seed(0)
    spikes = min(512, m // 2)
    sigma = 4 * (torch.arange(spikes) + 10.0) ** -0.3
    sigma[0] *= 4
    left, right = (torch.linalg.qr(torch.randn(k, spikes, generator=generator)).Q for k in (n, m))
    return torch.randn(n, m, generator=generator).div_(n**0.5).addmm_(left * sigma, right.T)


@dataclass(frozen=True)
class Truth:
    """A weight in float64 and its singular values, descending."""

    weight: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Truth:
        """Computed from the smaller float64 Gram matrix, to 1e-8 of the largest singular value."""
        wide = weight.double()
        gram = wide.T @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.T
        return cls(wide, torch.linalg.eigvalsh(gram).flip(0).clamp_min_(0).sqrt_())

    def accuracy(self, triplets: Triplets, *, smallest: bool = False) -> dict[str, float]:
        """`residual` (of leading triplets) and `worst_sigma`, defined in the module's docstring."""
        U, S, Vh = (t.double() for t in triplets)
        r = len(S)
        want = self.sigma.flip(0)[:r] if smallest else self.sigma[:r]
        worst = float(((S - want) / want).abs().max())
        if smallest:
            return {"residual": float("nan"), "worst_sigma": worst}
        left = torch.addmm(self.weight, U * S, Vh, alpha=-1).norm()
        return {"residual": float(left / self.sigma[r:].norm()) - 1, "worst_sigma": worst}


def lowrank(weight: Tensor, r: int, niter: int) -> Triplets:
    """torch.svd_lowrank, called as PEFT's pissa_niter_N does."""
    U, S, V = torch.svd_lowrank(weight.float(), q=r, niter=niter)
    return U, S, V.T


def of_sklearn(weight: Tensor, r: int) -> Triplets:
    """scikit-learn's randomized SVD with its default number of iterations."""
    U, S, Vh = sklearn_svd(weight.float().numpy(), r, random_state=0)
    return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh)


def exact(weight: Tensor, r: int) -> Triplets:
    """A full SVD; r triplets are returned."""
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def ours(weight: Tensor, r: int, subspace: int | None = None) -> Triplets:
    """Our operator."""
    return tuple(torch.ops.lora.randomized_svd(weight, r, subspace))


class Kept:
    """A function that stores its last result, so that accuracy is measured after timing."""

    def __init__(self, function: Callable[[], Triplets]) -> None:
        self.function = function
        self.result: Triplets | None = None

    def __call__(self) -> None:
        self.result = self.function()


Row = dict[str, object]


def timed(
    table: dict[str, tuple[Callable[[], Triplets], int | None]], rounds: int, truth: Truth, **kind
) -> list[Row]:
    """Interleaved timings and accuracies; `table` maps a name to (function, number of rounds)."""
    kept = {name: Kept(function) for name, (function, _) in table.items()}
    variants = {
        name: Variant(kept[name], rounds=own, warmup=None if own is None else 0)
        for name, (_, own) in table.items()
    }
    timings = interleave(variants, rounds=rounds, warmup=1)
    return [
        {**timing.row(), **truth.accuracy(kept[timing.name].result, **kind)} for timing in timings
    ]


def speedups(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str, float]], facts: Row
) -> Iterator[Row]:
    """One row per comparison: the speedup, both accuracies, and whether ours is as accurate."""
    by_name = {row["variant"]: row for row in rows}
    for mine, peer, aim in pairs:
        if mine not in by_name or peer not in by_name:
            continue
        a, b = by_name[mine], by_name[peer]
        if mine == EXACT:
            better = a["residual"] <= 1e-6
        else:
            better = all(a[key] <= b[key] for key in ("residual", "worst_sigma"))
        yield {
            **facts,
            "ours": mine,
            "peer": peer,
            "ours_ms": a["median_ms"],
            "peer_ms": b["median_ms"],
            "times_faster": b["median_ms"] / a["median_ms"],
            "aim": aim,
            "our_residual": a["residual"],
            "peer_residual": b["residual"],
            "our_worst_sigma": a["worst_sigma"],
            "peer_worst_sigma": b["worst_sigma"],
            "as_good": "yes" if better else "no",
        }


def leading(size: Shape, options: argparse.Namespace, console: Console) -> tuple[list, list]:
    """Compare all ranks and dtypes for one shape."""
    rows, compared = [], []
    for dtype in DTYPES:
        weight = weight_like(size).to(dtype)
        truth = Truth.of(weight)
        for r in options.ranks:
            if 2 * large_subspace(r) > min(size):
                subspaces = {OURS: None, FAST: small_subspace(r)}
            else:
                subspaces = {OURS: None, FAST: small_subspace(r), EXACT: large_subspace(r)}
            table = {
                name: (partial(ours, weight, r, subspace), None)
                for name, subspace in subspaces.items()
            }
            for niter in (4, 16):
                table[f"svd_lowrank niter {niter}"] = (partial(lowrank, weight, r, niter), None)
            table["scikit-learn"] = (partial(of_sklearn, weight, r), options.slow_rounds)
            if dtype == torch.float32 and r == options.ranks[0]:
                slow = (partial(exact, weight, max(options.ranks)), 1)
                exact_rows = timed({"linalg.svd": slow}, 1, truth)
            measured = timed(table, options.rounds, truth)
            facts = {"shape": shape_name(size), "dtype": dtype_name(dtype), "r": r}
            measured = [{**facts, **row} for row in measured]
            if dtype == torch.float32:
                measured += [{**facts, **row} for row in exact_rows]
            compared += speedups(measured, AIMS[dtype], facts)
            rows += measured
            show(console, facts, measured)
    return rows, compared


def show(console: Console, facts: Row, rows: Sequence[Row]) -> None:
    """Print a table."""
    title = ", ".join(
        f"{key} {value}" if key == "r" else str(value) for key, value in facts.items()
    )
    print_table(
        console,
        title,
        [
            {
                "variant": str(row["variant"]),
                "median ms": short(row["median_ms"]),
                "residual": f"{row['residual']:.1e}",
                "worst σ": f"{row['worst_sigma']:.1e}",
            }
            for row in rows
        ],
    )


def trailing(size: Shape, options: argparse.Namespace, console: Console) -> tuple[list, list]:
    """The r smallest triplets of a Gaussian weight with one large column, and the thin QR."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*size, generator=generator).div_(size[0] ** 0.5)
    weight[:, 0] *= 20
    truth = Truth.of(weight)
    r = min(MINOR_RANK, min(size) // 8)

    def smallest(weight: Tensor) -> Triplets:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, -r:].flip(1), S[-r:].flip(0), Vh[-r:].flip(0)

    table = {
        "minor_svd": (lambda: tuple(torch.ops.lora.minor_svd(weight, r)), options.slow_rounds),
        "linalg.svd": (lambda: smallest(weight), 1),
    }
    minor = timed(table, 1, truth, smallest=True)
    square = size[0] == size[1]
    facts = {"shape": shape_name(size), "dtype": "fp32", "r": r}
    minor = [{**facts, **row} for row in minor]
    compared = list(speedups(minor, [("minor_svd", "linalg.svd", 9.0 if square else 3.7)], facts))
    for row in compared:
        row["as_good"] = "yes" if row["our_worst_sigma"] <= 1e-4 else "no"
    show(console, facts, minor)

    variants = {
        "thin_qr": Variant(lambda: torch.ops.lora.thin_qr(weight, QR_RANK)),
        "linalg.qr": Variant(lambda: torch.linalg.qr(weight), rounds=options.slow_rounds, warmup=0),
    }
    facts = {**facts, "r": QR_RANK}
    timings = {t.name: t for t in interleave(variants, rounds=options.rounds)}
    qr = [{**facts, **t.row(), "residual": 0.0, "worst_sigma": 0.0} for t in timings.values()]
    Q, R = torch.ops.lora.thin_qr(weight, QR_RANK)
    full_Q, full_R = torch.linalg.qr(weight.double())
    product = full_Q[:, :QR_RANK] @ full_R[:QR_RANK]
    qr[0]["residual"] = float((Q.double() @ R.double() - product).norm() / product.norm())
    compared += speedups(qr, [("thin_qr", "linalg.qr", 100.0)], facts)
    compared[-1]["as_good"] = "yes"
    show(console, facts, qr)
    return [*minor, *qr], compared


def real(options: argparse.Namespace, console: Console) -> tuple[list, list]:
    """All projections of SmolLM2-135M: the time for all of them, the accuracy of the worst."""
    from benchmarks.common import smollm2

    weights = [
        linear.weight.detach()
        for linear in smollm2.target_projections(smollm2.load_model()).values()
    ]
    truths = [Truth.of(weight) for weight in weights]
    rows, compared = [], []
    for r in [r for r in options.ranks if r <= 64]:
        methods: dict[str, tuple[Callable[[Tensor], Triplets], int | None]] = {
            OURS: (lambda w, r=r: ours(w, r), None),
            "svd_lowrank niter 4": (lambda w, r=r: lowrank(w, r, 4), None),
            "svd_lowrank niter 16": (lambda w, r=r: lowrank(w, r, 16), None),
            "scikit-learn": (lambda w, r=r: of_sklearn(w, r), options.slow_rounds),
            "linalg.svd": (lambda w, r=r: exact(w, r), 1),
        }
        found: dict[str, list[Triplets]] = {}

        def run(name: str, method: Callable[[Tensor], Triplets]) -> None:
            found[name] = [method(weight) for weight in weights]  # noqa: B023

        variants = {
            name: Variant(partial(run, name, method), rounds=own, warmup=None if own is None else 0)
            for name, (method, own) in methods.items()
        }
        timings = interleave(variants, rounds=min(3, options.rounds), warmup=1)
        facts = {"shape": "SmolLM2-135M, 210 projections", "dtype": "fp32", "r": r}
        measured = []
        for timing in timings:
            each = [t.accuracy(x) for t, x in zip(truths, found[timing.name], strict=True)]
            worst = {key: max(a[key] for a in each) for key in each[0]}
            measured.append({**facts, **timing.row(), **worst})
        pairs = [(OURS, "svd_lowrank niter 16", 3.0)]
        compared += speedups(measured, pairs, facts)
        rows += measured
        show(console, facts, measured)
    return rows, compared


def picture(size: Shape, options: argparse.Namespace) -> list[Row]:
    """The accuracy and time of each method at increasing effort."""
    r, rows = min(PICTURE_RANK, min(size) // 16), []
    for dtype in DTYPES:
        weight = weight_like(size).to(dtype)
        truth = Truth.of(weight)
        kind = dtype_name(dtype)
        table = {}
        for factor in (2, 2.5, 3, 4, 5, 6, 8, 10):
            subspace = int(factor * r)
            table[f"ours, {kind}|{subspace}"] = (partial(ours, weight, r, subspace), None)
        if dtype == torch.float32:
            for niter in (1, 2, 4, 8, 16, 32):
                table[f"torch.svd_lowrank|{niter}"] = (partial(lowrank, weight, r, niter), None)
            for niter in (1, 4, 8, 16):
                function = partial(
                    lambda w, k: tuple(
                        torch.from_numpy(t)
                        for t in sklearn_svd(w.numpy(), r, n_iter=k, random_state=0)
                    ),
                    weight,
                    niter,
                )
                table[f"scikit-learn|{niter}"] = (function, 1)
            table["torch.linalg.svd|"] = (partial(exact, weight, r), 1)
        measured = timed(table, min(5, options.rounds), truth)
        for row in measured:
            method, _, effort = str(row.pop("variant")).partition("|")
            facts = {"method": method, "effort": effort, "shape": shape_name(size), "r": r}
            rows.append({**facts, **row})
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.svd", description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--slow-rounds", type=int, default=2, help="for scikit-learn, QR, minor_svd"
    )
    parser.add_argument(
        "--no-model", action="store_true", help="skip the weights of the real model"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the CSV and PNG files"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write svd.csv (all timings), svd_speedups.csv (comparisons), svd_accuracy.csv and .png."""
    options, console = parse(argv), Console(width=110)
    about = environment()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows, compared = [], []
    parts = [
        partial(f, size, options, console) for size in options.shapes for f in (leading, trailing)
    ]
    if not options.no_model:
        parts.append(partial(real, options, console))
    for part in parts:
        more_rows, more_compared = part()
        rows += more_rows
        compared += more_compared
        write_csv(options.out / "svd.csv", [{**row, **about} for row in rows])
        write_csv(options.out / "svd_speedups.csv", [{**row, **about} for row in compared])
    print_table(
        console,
        "Against the aims",
        [
            {
                "where": f"{row['shape']} {row['dtype']} r = {row['r']}",
                "peer": str(row["peer"]),
                "× faster": short(row["times_faster"]),
                "aim": f"{row['aim']:g}",
                "as good": str(row["as_good"]),
            }
            for row in compared
        ],
    )
    points = picture(options.shapes[0], options)
    write_csv(options.out / "svd_accuracy.csv", [{**row, **about} for row in points])
    accuracy_picture(options.out / "svd_accuracy.png", points, about["device"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
