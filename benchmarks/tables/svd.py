"""The SVD engine beside other libraries."""

from __future__ import annotations

from collections.abc import Sequence

from .aims import AVX2_SVD, where_bold
from .instruction_sets import Case, against_yardstick
from .markdown import NONE, bold, number, page, power, table, times
from .results import Results, Row, cases, float_of, matching

PEERS = {
    "svd_lowrank niter 16": "`svd_lowrank` niter 16",
    "svd_lowrank niter 4": "niter 4",
    "scikit-learn": "scikit-learn",
    "linalg.svd": "`linalg.svd`",
}
NOT_AS_GOOD = "†: less accurate than the peer."


def svd(results: Results) -> str:
    """How many times as fast as each peer, at an equal or better accuracy."""
    rows = results.rows("svd_speedups.csv")
    leading = [row for row in rows if row["ours"].startswith("ours") and "×" in row["shape"]]
    lines = []
    for shape, dtype, r in cases(leading, "shape", "dtype", "r"):
        own = matching(leading, shape=shape, dtype=dtype, r=r)
        default = matching(own, ours="ours")
        ms = number(float_of(default[0]["ours_ms"]) if default else None)
        cells = [_times(matching(own, peer=peer)) for peer in PEERS]
        lines.append([f"{shape}, {dtype}, r = {r}", ms, *cells])
    rest = [_other(row) for row in rows if row not in leading]
    marks = NOT_AS_GOOD if any(row["as_good"] != "yes" for row in rows) else ""
    note = f"{where_bold([*lines, *rest])}, which the file has for each comparison. {marks}".strip()
    return page(
        table(["leading triplets, × as fast", "ours, ms", *PEERS.values()], lines),
        table(
            ["", "peer", "ours, ms", "× as fast", "aim", "residual", "peer's", "worst σ", "peer's"],
            rest,
        ),
        results.caption(["svd_speedups.csv"], note),
    )


def _times(found: Sequence[Row]) -> str:
    if not found:
        return NONE
    faster, mark = float(found[0]["times_faster"]), "" if found[0]["as_good"] == "yes" else " †"
    return bold(times(faster, 1), faster < float(found[0]["aim"])) + mark


def _other(row: Row) -> list[str]:
    """The smallest triplets, the thin QR, and a real model."""
    name = {"ours": "randomized_svd"}.get(row["ours"], row["ours"])
    errors = [float_of(row[f"{whose}_residual"]) for whose in ("our", "peer")]
    sigmas = [float_of(row[f"{whose}_worst_sigma"]) for whose in ("our", "peer")]
    if name == "thin_qr":  # it has no singular values
        sigmas = [None, None]
    return [
        f"`{name}`, {row['shape']}, {row['dtype']}, r = {row['r']}",
        f"`{row['peer']}`",
        number(float_of(row["ours_ms"])),
        _times([row]),
        f"{float(row['aim']):g}",
        *(power(error) for error in (*errors, *sigmas)),
    ]


def avx2_svd(results: Results) -> str:
    """The SVDs with the baseline and the AVX2 kernels."""
    return against_yardstick(
        results,
        ("randomized_svd", "minor_svd", "thin_qr"),
        _avx2,
        f"{AVX2_SVD} × as fast with AVX2 (`randomized_svd`), as fast as the reference otherwise.",
    )


def _avx2(case: Case) -> list[str]:
    # The yardstick of the others is their reference.
    ours = case.operator == "randomized_svd"
    cells = []
    for name in ("baseline", "avx2"):
        speedup = case.speedup(name)
        if ours and name == "baseline":
            missed = case.slower_than_reference(name)
        else:
            missed = speedup is not None and speedup < (AVX2_SVD if ours else 1)
        cells.append(bold(times(speedup), missed))
    return cells
