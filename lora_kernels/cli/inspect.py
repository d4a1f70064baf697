"""`lora-kernels inspect`: prints the magnitudes of a model's or an adapter's layers."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._utils.errors import needed
from .._utils.progress import tracked
from ..files.adapter.folder import is_adapter, read_adapter
from ..files.checkpoint.weights import select_layers, stored_weights
from ..layers.state import LayerState
from ..training import magnitude_report
from ..training.magnitude import AdapterMagnitude, LayerMagnitude, measure, measure_adapter
from ._options import (
    Commands,
    add_command,
    add_path,
    add_quiet,
    add_targets,
    table_console,
    targets_of,
)

_DESCRIPTION = """\
Prints the magnitudes of every layer, one line each; also as a CSV file or a picture.

For a model's weights W: the mean square nu[W]; the exact spectral gain rho[r] and Q[r] beside
LoRAM's ln r / ln min(n, m); LoRAM's beta and the size of its start; the predicted growth k1 of
the update for lora, pissa and loram (arXiv 2507.06558). For an adapter: nu of A, B and s.B.A; if
a start is subtracted, nu of [A; A - A0] and [B - B0, B0], whose product is the update.

The weights of a model are read one at a time: peak memory is the size of the largest one.
"""
_EXAMPLES = """\
examples:
  lora-kernels inspect models/SmolLM2-135M -r 16 --csv magnitudes.csv --picture magnitudes.png
  lora-kernels inspect model-00001-of-00004.safetensors --randomized --targets q_proj v_proj
  lora-kernels inspect runs/adapter
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        "magnitudes of a model's or an adapter's layers",
        _DESCRIPTION,
        _EXAMPLES,
    )
    add_path(
        parser,
        "PATH",
        "folder of a Hugging Face model, a .safetensors file, or folder of an adapter",
    )
    parser.add_argument(
        "-r", type=int, metavar="R", help="rank of the starts (default 16; an adapter has its own)"
    )
    add_targets(parser)
    method = parser.add_mutually_exclusive_group()
    method.add_argument(
        "--exact",
        dest="method",
        action="store_const",
        const="exact",
        help="all singular values (default): seconds for each large layer",
    )
    method.add_argument(
        "--randomized",
        dest="method",
        action="store_const",
        const="randomized",
        help="only the r largest, by block Krylov iteration: rho then assumes that W has full rank",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every value to FILE")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw bars, and Q over r (.png, .pdf, .svg)"
    )
    add_quiet(parser, "table")
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    # Missing packages are reported before the work.
    console = None if options.quiet else table_console()
    if options.picture:
        needed("matplotlib", "--picture", "picture")
    adapter = is_adapter(options.path)
    rows = _adapter_rows(options) if adapter else _weight_rows(options)
    if options.csv:
        magnitude_report.write_csv(options.csv, rows)
    if options.picture:
        magnitude_report.draw(options.picture, rows, options.path.name)
    if console:
        console.print(magnitude_report.make_table(rows, str(options.path)))


def _weight_rows(options: argparse.Namespace) -> list[LayerMagnitude]:
    r, method = 16 if options.r is None else options.r, options.method or "exact"
    weights = stored_weights(options.path, targets_of(options))
    return [
        measure(weight.load(), r, method=method, name=weight.name)
        for weight in tracked(weights, "layers", not options.quiet)
    ]


def _adapter_rows(options: argparse.Namespace) -> list[AdapterMagnitude]:
    if options.r is not None or options.method is not None:
        given = "-r" if options.r is not None else f"--{options.method}"
        raise ValueError(f"{given} is for models; {options.path} is an adapter with its own rank")
    layers = read_adapter(options.path, residual_base=True).layers
    return [
        measure_adapter(title, *layer.update_factors(), layer.scaling)
        for name in select_layers(layers, targets_of(options))
        for title, layer in _each_expert(name, layers[name])
    ]


def _each_expert(name: str, layer: LayerState) -> list[tuple[str, LayerState]]:
    """(title, layer) of the layer; of each expert if the layer holds experts."""
    if layer.experts is None:
        return [(name, layer)]
    return [(f"{name}[{e}]", layer.expert(e)) for e in range(layer.experts)]
