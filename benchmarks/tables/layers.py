"""What an adapter adds to a layer: LoRA, DoRA, experts."""

from __future__ import annotations

from .aims import AVX2_LINEAR
from .instruction_sets import against_yardstick
from .markdown import bold, number, page, table, times
from .results import Results, cases, value

OURS_BOLD = "Bold: this package's layer."


def layer(results: Results) -> str:
    """Forward and forward + backward as a multiple of the bare layer's."""
    rows = results.rows("layer.csv")
    columns = {
        "LoRALinear absorb": "**absorb**",
        "LoRALinear implicit": "implicit",
        "PEFT lora.Linear": "PEFT",
        "PEFT lora.Linear, accelerated": "PEFT, accelerated",
        "plain composition": "by hand",
    }
    lines = []
    for dtype, r, which in cases(rows, "dtype", "r", "pass"):
        case = {"dtype": dtype, "r": r, "pass": which}
        ratios = [times(value(rows, "ratio", variant=name, **case)) for name in columns]
        lines.append([f"{dtype}, r = {r}, {which}", bold(ratios[0]), *ratios[1:]])
    first = rows[0]
    what = f"{first['tokens']} tokens, {first['shape']}, × the bare frozen `nn.Linear`"
    note = f"A and B in {first['adapter_dtype']}. {OURS_BOLD}"
    return page(table([what, *columns.values()], lines), results.caption(["layer.csv"], note))


def dora(results: Results) -> str:
    """DoRA as a multiple of this package's LoRA layer, and the norms alone."""
    rows = results.rows("dora.csv")
    columns = {
        "LoRALinear": "LoRA, ms",
        "LoRALinear, DoRA": "**DoRA**",
        "PEFT lora.Linear": "PEFT, LoRA",
        "PEFT lora.Linear, DoRA": "PEFT, DoRA",
    }
    norms = {
        "reading W once": "reading W once, ms",
        "row_norms": "**`row_norms`**",
        "row_norms, transposed W": "`row_norms`, transposed W",
        "torch": "torch",
    }
    layers, alone = [], []
    for dtype, r, which in cases(rows, "dtype", "r", "pass"):
        case = {"dtype": dtype, "r": r, "pass": which}
        names, lines = (norms, alone) if which == "norms" else (columns, layers)
        first, *others = names
        ratios = [times(value(rows, "ratio", variant=name, **case)) for name in others]
        if which == "norms":
            ratios = [number(value(rows, "median_ms", variant=name, **case)) for name in others]
        own = number(value(rows, "median_ms", variant=first, **case))
        what = f"{dtype}, r = {r}" + ("" if which == "norms" else f", {which}")
        lines.append([what, own, bold(ratios[0]), *ratios[1:]])
    about = rows[0]
    what = f"{about['tokens']} tokens, {about['shape']}, × this package's LoRA"
    note = f"A, B and m in {about['adapter_dtype']}. {OURS_BOLD}"
    return page(
        table([what, *columns.values()], layers),
        table(["the norms alone, ms", *norms.values()], alone),
        results.caption(["dora.csv"], note),
    )


def experts(results: Results) -> str:
    """The experts of a mixture as a multiple of the frozen ones, and memory."""
    rows = results.rows("experts.csv")
    bare = "transformers' experts, frozen"
    columns = {
        "LoRAExperts": "**`LoRAExperts`**",
        "LoRAExperts, one operator a product": "one operator a product",
        "PEFT target_parameters": "PEFT",
        "PEFT, accelerated": "PEFT, accelerated",
    }
    speed, memory = [], []
    for size, dtype, which in cases(rows, "size", "dtype", "pass"):
        case = {"size": size, "dtype": dtype, "pass": which}
        own = number(value(rows, "median_ms", variant=bare, **case))
        ratios = [times(value(rows, "ratio", variant=name, **case)) for name in columns]
        speed.append([f"{size}, {dtype}, {which}", own, bold(ratios[0]), *ratios[1:]])
        if which == "forward":
            continue
        line = [f"{size}, {dtype}"]
        for name in (bare, *columns):
            kept = (value(rows, f"{key}_mib", variant=name, **case) for key in ("kept", "peak"))
            line.append(bold(" / ".join(map(number, kept)), name == "LoRAExperts"))
        memory.append(line)
    return page(
        table([f"r = {rows[0]['r']}, × frozen experts", "frozen, ms", *columns.values()], speed),
        table(["kept for the backward / peak, MiB", "frozen", *columns.values()], memory),
        results.caption(["experts.csv"], OURS_BOLD),
    )


def avx2_linear(results: Results) -> str:
    """16-bit layers with the baseline and the AVX2 kernels, as a multiple of float32."""
    return against_yardstick(
        results,
        ("linear",),
        lambda found: [
            bold(times(found.ratio("baseline")), found.slower_than_reference("baseline")),
            bold(times(found.ratio("avx2")), (found.ratio("avx2") or 0) > AVX2_LINEAR),
        ],
        f"{AVX2_LINEAR} × the same layer in fp32 with AVX2, the time of the "
        "reference with the baseline kernels.",
    )
