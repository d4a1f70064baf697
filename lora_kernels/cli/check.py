"""`lora-kernels check`: how serving engines would load an adapter."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.errors import needed
from ._options import Commands, add_command, add_path, table_console

if TYPE_CHECKING:
    from ..files.serving.check import LayerResult, Result

_DESCRIPTION = """\
Predicts how each engine would load an adapter, offline and without the engine: whether the engine
refuses the adapter, by which rule, and what to do; which layers have no effect because their names
match nothing; the strength at which each layer is applied; and the error of its update in the
engine's dtype.

ADAPTER is a folder of PEFT, Axolotl, Unsloth or lora_kernels, or a file or folder of diffusers or
kohya. With --base, names and shapes are compared with the model that transformers builds from its
config.json, and engines are assumed to cast to its dtype; without --base, to bfloat16.

Engines: vllm, sglang, llama.cpp, ollama, diffusers, peft. Without --for, those that may support
this kind of adapter: diffusers for a file of diffusers; diffusers and peft for a folder of PEFT
whose layers are those of a pipeline's model; else vllm, sglang, llama.cpp and peft, and ollama if
the base is a Llama or Gemma 2 model, the only models whose adapters it converts.

The exit status is 0 if every engine loads the adapter and applies every layer within 0.5 % of the
trained update, else 1.

--json prints one object: adapter, base (a path or null), tolerance, right (true if the exit status
is 0), and engines, a list of objects with
  engine, as_of      its name, and the version whose rules were read
  outcome            "right", "wrong" (it loads, but not as trained) or "refused"
  refusals           a list of {rule, remedy}
  notes, flags       what depends on versions; options that the server needs
  rank, rank_limit   null if there is no limit
  remedies           what to do, without repetitions; empty if nothing is wrong
  names_compared     whether the base's names are known
  worst_error        the largest error of all layers; null if none is known or it is infinite
  dropped            {tensor: reason} of other trained tensors that are left out
  layers             a list of {name, right, effect, reason, matching_name, scale, trained_scale,
                     strength, dtype, error, remedy}; if the engine refuses the adapter, right is
                     false, and the rest is what the engine would do without the refusals
"""
_EXAMPLES = """\
examples:
  lora-kernels check runs/adapter
  lora-kernels check runs/adapter --base models/Llama-3-8B --for vllm,sglang
  lora-kernels check pytorch_lora_weights.safetensors --json
"""
_SHOWN = 3  # names in a line


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "check", "how serving engines would load an adapter", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "ADAPTER", "folder of an adapter, or a .safetensors file of diffusers")
    parser.add_argument(
        "--base", type=Path, metavar="PATH", help="folder of the model, or its config.json"
    )
    parser.add_argument(
        "--for",
        dest="engines",
        metavar="ENGINES",
        help="names of engines, separated by commas (default: see above)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of the table")
    output.add_argument("--quiet", action="store_true", help="print nothing: only the exit status")
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from ..files.serving.check import check
    from .verify import quiet_packages

    console = None if options.quiet or options.json else table_console()
    engines = options.engines
    if engines is not None:
        engines = [name.strip() for name in engines.split(",") if name.strip()]
        if not engines:
            raise ValueError("--for is empty: give names of engines, such as vllm,sglang")
    with quiet_packages():
        results = check(options.adapter, options.base, engines)
    right = all(result.outcome == "right" for result in results)
    if options.json:
        _print(json.dumps(_document(options, results, right), indent=2, allow_nan=False) + "\n")
    elif console:
        with console.capture() as captured:
            _show(console, str(options.adapter), results)
        _print(captured.get())
    return int(not right)


def _print(text: str) -> None:
    """Prints the text. If a reader such as head stops early, the exit status does not change."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # what is left in the buffer would be written again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(console: Any, title: str, results: Sequence[Result]) -> None:
    table = needed("rich.table", "the table", "cli").Table(title=title)
    for column in ("engine", "verdict", "names", "layers", "strength", "error", "rank"):
        table.add_column(column)
    for result in results:
        table.add_row(*_row(result))
    console.print(table, markup=False)
    for result in results:
        for line in _details(result):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _document(
    options: argparse.Namespace, results: Sequence[Result], right: bool
) -> dict[str, Any]:
    from ..files.serving.check import TOLERANCE

    return {
        "adapter": str(options.adapter),
        "base": None if options.base is None else str(options.base),
        "tolerance": TOLERANCE,
        "right": right,
        "engines": [_engine_object(result) for result in results],
    }


def _engine_object(result: Result) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "engine": result.engine,
        "as_of": result.as_of,
        "outcome": result.outcome,
        "refusals": [{"rule": r.rule, "remedy": r.remedy} for r in verdict.refusals],
        "remedies": result.remedies,
        "notes": verdict.notes,
        "flags": verdict.flags,
        "rank": verdict.rank,
        "rank_limit": verdict.limit,
        "names_compared": result.names_compared,
        "worst_error": _finite(result.worst_error),
        "dropped": verdict.dropped,
        "layers": [_layer_object(layer, bool(verdict.refusals)) for layer in result.layers],
    }


def _layer_object(layer: LayerResult, refused: bool) -> dict[str, Any]:
    return {
        "name": layer.name,
        "right": layer.is_right and not refused,
        "effect": layer.effect,
        "reason": layer.reason or None,
        "matching_name": layer.matching_name,
        "scale": layer.scale,
        "trained_scale": layer.trained_scale,
        "strength": _finite(layer.strength),
        "dtype": None if layer.dtype is None else str(layer.dtype).removeprefix("torch."),
        "error": _finite(layer.error),
        "remedy": layer.remedy or None,
    }


def _finite(value: float | None) -> float | None:
    """The value; None for infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def _row(result: Result) -> list[str]:
    layers = result.layers
    right = 0 if result.verdict.refusals else sum(layer.is_right for layer in layers)
    strengths = sorted({float(f"{layer.strength:.3g}") for layer in layers})
    errors = result.worst_error
    return [
        f"{result.engine} ({result.as_of})",
        result.outcome,
        "compared" if result.names_compared else "not compared",
        f"{right} of {len(layers)} right" if layers else "",
        _span(strengths),
        "" if errors is None else _percent(errors),
        str(result.verdict.rank or ""),
    ]


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _percent(error: float) -> str:
    if not math.isfinite(error):
        return "infinite"
    return f"{100 * error:.0f} %" if error >= 0.1 else f"{100 * error:.2g} %"


def _details(result: Result) -> Iterator[str]:
    """What is wrong for an engine, and what to do, one line each."""
    verdict = result.verdict
    lines = []
    for refusal in verdict.refusals:
        lines.append(f"refused: {refusal.rule}")
        lines.append(f"  remedy: {refusal.remedy}")
    lines += _layer_lines(result.layers)
    for reason, names in _grouped(verdict.dropped).items():
        lines.append(f"{len(names)} tensors are left out: {reason} ({_some(names)})")
        lines.append(f"  remedy: {verdict.merge}")
    lines += [f"needs {flag}" for flag in verdict.flags]
    lines += [f"note: {note}" for note in verdict.notes]
    if lines:
        yield ""
        yield f"{result.engine}: {result.outcome}"
        yield from (f"  {line}" for line in lines)


def _layer_lines(layers: Sequence[LayerResult]) -> Iterator[str]:
    """The wrong layers, grouped by what is wrong with them."""
    groups: dict[tuple[str, ...], list[LayerResult]] = {}
    for layer in layers:
        if not layer.is_right:
            groups.setdefault(_fault(layer), []).append(layer)
    for (fault, *_), members in groups.items():
        errors = [layer.error for layer in members if layer.effect and layer.error is not None]
        worst = f", error up to {_percent(max(errors))}" if errors else ""
        word = "layer" if len(members) == 1 else "layers"
        names = _some([layer.name for layer in members])
        yield f"{len(members)} {word}: {fault}{worst} ({names})"
        yield from (f"  remedy: {r}" for r in dict.fromkeys(m.remedy for m in members) if r)


def _fault(layer: LayerResult) -> tuple[str, ...]:
    """What is wrong with a layer, as the key of its group."""
    from ..files.serving.remedies import beginnings

    if not layer.effect:
        change = beginnings(layer.name, layer.matching_name)
        hint = f"; {change[0]!r} instead of {change[1]!r} would match" if change else ""
        return (f"no effect: {layer.reason}{hint}",)
    if layer.reason:
        return (layer.reason,)
    if not math.isclose(layer.strength, 1, rel_tol=1e-3):
        return (f"applied at {layer.strength:.4g} times the trained strength",)
    kind = str(layer.dtype).removeprefix("torch.")
    return (f"another update than the trained one, in {kind}",)


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: reason} -> {reason: names}."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
