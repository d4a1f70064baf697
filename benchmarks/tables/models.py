"""Checkpoints, files, architectures and sharded models."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from .aims import OF_CP, where_bold
from .markdown import NONE, bold, number, page, percent, power, seconds, table
from .results import Results, Row, cases, float_of, matching, paths, value, wrapped

OUTCOMES = ("ok", "FAIL", "warned", "refused", "left out", "-")  # as in benchmarks/survey/table.py
CHECKS = ("start", "gradient", "reload", "peft", "merge", "cli_merge", "cli_init", "verify")


def stream(results: Results) -> str:
    """Initializing a checkpoint on disk, compared with copying it."""
    rows = results.rows("stream.csv")
    columns = {
        "cp": "`cp`",
        "init loram": f"**`init`, LoRAM, r = {rows[0]['r']}**",
        "of_cp": "as fast as `cp`",
        "cp + fsync": "`cp` and fsync",
        "init loram --sync": "`init --sync`",
    }
    lines = []
    for dtype, size in cases(rows, "dtype", "bytes"):
        line = [f"{dtype}, {int(size) / 1e9:.1f} GB"]
        for name in columns:
            if name == "of_cp":
                share = value(rows, name, dtype=dtype, variant="init loram")
                line.append(bold(percent(share), share is not None and share < OF_CP))
            else:
                line.append(seconds(value(rows, "median_ms", dtype=dtype, variant=name)))
        lines.append(line)
    files = ["stream.csv", "stream_runs.csv"]
    dtypes = [dtype for (dtype,) in cases(rows, "dtype")]
    runs = _runs(results.rows(files[1]), dtypes)
    note = f"{where_bold([*lines, *runs])}: {percent(OF_CP)} of the speed of `cp`."
    return page(
        table(["seconds", *columns.values()], lines),
        table(["all runs, as fast as `cp`", *dtypes], runs),
        results.caption(files, note),
    )


def _runs(rows: Sequence[Row], dtypes: Sequence[str]) -> list[list[str]]:
    """The speed relative to `cp`, in every run."""
    lines = []
    for run, blocks, rounds in cases(rows, "run", "blocks", "rounds"):
        line = [f"{run}: {blocks} blocks, {rounds} rounds"]
        for dtype in dtypes:
            ratio = value(rows, "init_loram_over_cp", run=run, dtype=dtype)
            share = 1 / ratio if ratio else None
            line.append(bold(percent(share), share is not None and share < OF_CP))
        lines.append(line)
    return lines


def families(results: Results) -> str:
    """The number of transformers classes with each outcome, for each check of the survey."""
    rows = results.rows("families.csv")
    built = [row for row in rows if row["built"] == "ok"]
    lines = []
    for check in CHECKS:
        counts = Counter(_outcome(row[check]) for row in built)
        cells = [bold(str(counts[kind] or ""), kind == "FAIL") for kind in OUTCOMES]
        lines.append([check, *cells])
    note = f"{len(built):,} of {len(rows):,} classes of transformers could be built."
    heads = ["check", *OUTCOMES[:-1], "not run"]
    return page(table(heads, lines), wrapped(f"{note} {paths(['families.csv'])}."))


def _outcome(verdict: str) -> str:
    return next((kind for kind in OUTCOMES if verdict.startswith(kind)), "FAIL")


def sharded(results: Results) -> str:
    """Adapters on sharded models, compared with PEFT's."""
    rows = results.rows("sharded.csv")
    methods = [method for (method,) in cases(rows, "method")]
    lines = []
    for layout, processes in cases(rows, "layout", "processes"):
        found = [matching(rows, layout=layout, method=method) for method in methods]
        lines.append([f"{layout}, {processes} processes", *(_sharded(own) for own in found)])
    return page(table(["", *methods], lines), results.caption(["sharded.csv"]))


def _sharded(found: Sequence[Row]) -> str:
    if not found:
        return NONE
    row = found[0]
    if row["failure"]:
        return "fails" if not row["start error"] else "fails in the first training step"
    parts = {"start": "start error", "loss": "loss error", "ranks": "rank spread"}
    parts["reload"] = "reload error"
    return ", ".join(f"{name} {power(float_of(row[key]), 0)}" for name, key in parts.items())


def portable(results: Results) -> str:
    """The error of an update after a cast, in both forms of a file."""
    rows = results.rows("portable.csv")
    forms = [form for (form,) in cases(rows, "form")]
    lines = []
    for start, delta in cases(rows, "start", "delta"):
        line = [f"`{start}`, {delta}"]
        for dtype in ("bf16", "fp16"):
            for form in forms:
                error = value(rows, f"error_{dtype}", start=start, delta=delta, form=form)
                line.append(NONE if error is None else f"{number(100 * error)} %")
        lines.append(line)
    heads = [f"{dtype}: `{form}`" for dtype in ("bf16", "fp16") for form in forms]
    first = rows[0]
    note = f"{first['model']}, r = {first['r']}: the error that a cast makes, × the update's norm."
    return page(
        table(["start, how far A and B have moved", *heads], lines),
        results.caption(["portable.csv"], note),
    )


def magnitudes(results: Results) -> str:
    """One sentence about the exact gain and its logarithm."""
    rows = results.rows("magnitudes.csv")
    exact = [float(row["gain"]) for row in rows]
    logs = [float(row["log_gain"]) for row in rows]
    above = sum(log > gain for log, gain in zip(logs, exact, strict=True))
    values = " or ".join(f"{log:.2f}" for log in sorted({round(log, 2) for log in logs}))
    median = statistics.median(exact)
    return wrapped(
        f"At r = {rows[0]['r']} the exact Q has a median of {median:.2f} over the "
        f"{len(rows)} layers. LoRAM's logarithm is {values}, above the exact Q in {above} of them "
        f"({paths(['magnitudes.csv'])})."
    )
