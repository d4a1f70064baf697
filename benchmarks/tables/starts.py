"""How long starts take: one layer, by rank, a whole model, every start, and the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .aims import init_aim, where_bold
from .markdown import NONE, bold, number, page, power, seconds, table, times
from .results import Results, Row, cases, float_of, matching, value

FLOOR, OURS = "norm + mul_", "LoRAM"
# The variants of init.csv other than the floor and LoRAM, and their headings.
VARIANTS = {
    "LoRALinear (PiSSA)": "**PiSSA start**",
    "LoRALinear (OLoRA)": "**OLoRA start**",
    "PEFT pissa_niter_4": "PEFT `pissa_niter_4`",
    "PEFT pissa_niter_16": "PEFT `pissa_niter_16`",
    "PEFT olora": "PEFT `olora`",
    "PEFT pissa": "PEFT `pissa`",
}
# Variants of svd.csv, shown where init.csv has no PiSSA start.
SVDS = {"ours": "**SVD for `pissa`**", "svd_lowrank niter 16": "`svd_lowrank` niter 16"}


def init(results: Results) -> str:
    """Initializing one layer, beside PEFT."""
    return _init(results, "")


def avx2_init(results: Results) -> str:
    """Initializing one layer with the AVX2 kernels."""
    return _init(results, "avx2/")


def _init(results: Results, folder: str) -> str:
    files = [f"{folder}init.csv"]
    rows = results.rows(files[0])
    columns: dict[str, Callable[[dict[str, str]], float | None]] = {}
    if not matching(rows, variant="LoRALinear (PiSSA)") and results.has(f"{folder}svd.csv"):
        files.append(f"{folder}svd.csv")
        svds = results.rows(files[1])
        for name, heading in SVDS.items():
            columns[heading] = lambda case, name=name: value(
                svds, "median_ms", variant=name, **case
            )
    for name, heading in VARIANTS.items():
        if matching(rows, variant=name):
            columns[heading] = lambda case, name=name: value(
                rows, "median_ms", variant=name, **case
            )
    lines = []
    for shape, r, dtype in cases(rows, "shape", "r", "dtype"):
        case = {"shape": shape, "r": r, "dtype": dtype}
        ratio = value(rows, "ratio", variant=OURS, **case)
        missed = ratio is not None and ratio > init_aim(dtype, int(r))
        times_ms = [value(rows, "median_ms", variant=name, **case) for name in (FLOOR, OURS)]
        lines.append(
            [
                f"{shape}, {dtype}, r = {r}",
                *map(number, times_ms),
                bold(times(ratio), missed),
                *(number(column(case)) for column in columns.values()),
            ]
        )
    heads = ["one layer, ms", "floor", "**LoRAM**", "LoRAM, × floor", *columns]
    aims = [init_aim(dtype, 16) for dtype in ("fp32", "bf16")]
    note = (
        f"{where_bold(lines)}: {aims[0]} × the floor in fp32 and {aims[1]} in bf16; bold headings "
    )
    note += "are this package's."
    return page(table(heads, lines), results.caption(files, note))


def init_ranks(results: Results) -> str:
    """A LoRAM start by rank, with each set of kernels that was measured."""
    files = [file for file in ("init_ranks.csv", "avx2/init_ranks.csv") if results.has(file)]
    found = {file: results.rows(file) for file in files}
    ranks = [_rank(row) for row in found[files[0]] if _rank(row)]
    lines = []
    for rows in found.values():
        shape, dtype, kernels = (rows[0][key] for key in ("shape", "dtype", "kernels"))
        by_rank = {_rank(row): row for row in rows}
        ms = [number(float_of(by_rank.get(r, {}).get("median_ms"))) for r in ranks]
        ratios = [_ratio(by_rank.get(r, {}), r) for r in ranks]
        lines += [[f"{kernels}, ms", *ms], [f"{kernels}, × floor", *ratios]]
    aims = [init_aim("fp32", r) for r in (128, 512)]
    about = f"{shape}, {dtype}. {where_bold(lines)}: {aims[0]} × the floor up to r = 128 and "
    about += f"{aims[1]} above."
    heads = ["LoRAM, r =", *map(str, ranks)]
    return page(table(heads, lines), results.caption(files, about))


def _rank(row: Row) -> int:
    """The rank in the name of a variant; 0 for the floor."""
    return int(row["variant"].rpartition(" = ")[2]) if " = " in row["variant"] else 0


def _ratio(row: Row, r: int) -> str:
    ratio = float_of(row.get("ratio"))
    return bold(times(ratio), ratio is not None and ratio > init_aim(row["dtype"], r))


def model(results: Results) -> str:
    """Adapting a whole model, beside PEFT."""
    rows = results.rows("model.csv")

    def place(row: Row) -> tuple[bool, bool, float]:
        name = row["variant"]
        return "PEFT" in name, name not in ("add_lora loram", "PEFT lora"), float(row["median_ms"])

    lines = []
    for row in sorted(rows, key=place):
        package, _, start = row["variant"].partition(" ")
        name = f'`add_lora`, `"{start}"`' if package == "add_lora" else f"PEFT, `{start}`"
        name = "PEFT, plain LoRA" if row["variant"] == "PEFT lora" else name
        cells = [name, seconds(float_of(row["median_ms"])), times(float_of(row["ratio"]), 1)]
        lines.append([bold(cell, row["variant"] == "add_lora loram") for cell in cells])
    first = rows[0]
    note = f"{first['model']}, {first['layers']} layers, {first['dtype']}, r = {first['r']}."
    heads = ["", "seconds", "× PEFT's plain LoRA"]
    return page(table(heads, lines), results.caption(["model.csv"], note))


def starts(results: Results) -> str:
    """Every start, on a model and on one layer, beside PEFT's."""
    rows = results.rows("starts.csv")
    models = [name for (name,) in cases(rows, "model")]
    models.sort(key=lambda name: "×" in name)  # one layer last
    lines = []
    for (start,) in cases(rows, "start"):
        line = [f"`{start.partition(', ')[0]}`{start[len(start.partition(', ')[0]) :]}"]
        for name in models:
            for package in ("lora_kernels", "PEFT"):
                line.append(_start(matching(rows, model=name, start=start, variant=package)))
        lines.append(line)
    heads = [""]
    for name in models:
        what = f"one layer, {name}" if "×" in name else name
        heads += [f"{what}, s", "PEFT, s"]
    first = rows[0]
    counts = sorted({int(row["rounds"]) for row in rows if row["rounds"]})
    note = f"{first['dtype']}, r = {first['r']}; {' or '.join(map(str, counts))} rounds, fewest of "
    note += f"the slow starts. {NONE}: not measured, or PEFT has none."
    return page(table(heads, lines), results.caption(["starts.csv"], note))


def _start(found: Sequence[Row]) -> str:
    if not found:
        return NONE
    return "fails" if found[0]["failure"] else seconds(float_of(found[0]["median_ms"]))


def demo(results: Results) -> str:
    """What `make demo` prints."""
    lines = []
    rows = results.rows("demo.csv")
    for row in rows:
        before, after = (float(row[f"validation_loss_{when}"]) for when in ("before", "after"))
        lines.append(
            [
                row["method"],
                f"{number(float(row['init_seconds']))} s",
                power(float(row["start_max_abs_delta_logit"])),
                f"{before:.3f} → {after:.3f}",
            ]
        )
    heads = ["start", "init", r"largest \|Δlogit\| at the start", "validation loss before → after"]
    first = rows[0]
    note = (
        f"{first['layers']} layers, r = {first['r']}, {first['steps']} steps at the learning rate "
    )
    note += f"{float(first['lr']):g}, {first['dtype']}."
    return page(table(heads, lines), results.caption(["demo.csv"], note))
