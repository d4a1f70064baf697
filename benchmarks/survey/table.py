"""docs/families.md from the rows of the survey."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from .checks import CHECKS, Row

_HEAD = """\
# Architectures

Written by `make survey`; do not edit. With lora_kernels {lora_kernels}, peft {peft},
transformers {transformers} and torch {torch}, on the CPU in float32.

The survey builds a random model of a few thousand parameters for every class of transformers'
AutoModel mappings (`benchmarks/survey/families.py`) and makes these checks (`benchmarks/survey/`):

{checks}

Outputs are the same if they differ by at most 1e-4 of the largest value. *refused* is a one-line
error. *warned* means that this package had warned that PEFT would give other results. *left out*
means that the check says nothing about the package here. {built} of {total} classes could be built.
"""


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the page; failures come first."""
    built = [row for row in rows if row.built == "ok"]
    parts = [_head(rows, built), _failures(built), _families(built), _insensitive(built)]
    parts += [_reasons(built), _skipped(built), _not_built(rows)]
    path.write_text("\n".join(parts), encoding="utf-8")


def _head(rows: Sequence[Row], built: Sequence[Row]) -> str:
    names = ("lora-kernels", "transformers", "peft", "torch")
    versions = {name.replace("-", "_"): version(name) for name in names}
    checks = "\n".join(f"- **{name}**: {text}" for name, text in CHECKS.items())
    head = _HEAD.format(checks=checks, built=len(built), total=len(rows), **versions)
    lines = [head, "| | " + " | ".join(_KINDS) + " |", "|---" * (len(_KINDS) + 1) + "|"]
    for check in CHECKS:
        counts = Counter(_kind(row.checks.get(check, "-")) for row in built)
        lines.append(
            f"| {check} | " + " | ".join(str(counts[kind] or "") for kind in _KINDS) + " |"
        )
    return "\n".join(lines) + "\n"


_KINDS = ("ok", "FAIL", "warned", "refused", "left out", "-")


def _kind(verdict: str) -> str:
    return next((kind for kind in _KINDS if verdict.startswith(kind)), "FAIL")


def _failures(built: Sequence[Row]) -> str:
    lines = ["## FAIL", ""]
    for row in built:
        for check, verdict in row.checks.items():
            if _kind(verdict) == "FAIL":
                lines.append(f"- **{row.name}**, {check}: {_cell(verdict)}")
    return "\n".join([*lines, "" if len(lines) > 2 else "Nothing.\n"])


def _families(built: Sequence[Row]) -> str:
    names = list(CHECKS)
    lines = ["## Families", "", "| family | classes | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for family in sorted({row.family for row in built}):
        rows = [row for row in built if row.family == family]
        cells = [_summary([row.checks.get(name, "-") for row in rows]) for name in names]
        lines.append(f"| {family} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _summary(verdicts: Sequence[str]) -> str:
    counts = Counter(_kind(verdict) for verdict in verdicts)
    shown = [kind for kind in _KINDS if counts[kind]]
    if len(shown) == 1:
        return f"**{shown[0]}**" if shown == ["FAIL"] else shown[0]
    return ", ".join(f"{counts[k]} {f'**{k}**' if k == 'FAIL' else k}" for k in shown)


def _insensitive(built: Sequence[Row]) -> str:
    names = [row.name for row in built if row.effect < 1e-3]
    return (
        "## Outputs that hardly depend on the adapters\n\n"
        "The adapters of these random models change the outputs by less than 1e-3 of the largest "
        "value. Comparisons of outputs therefore say little here, unlike comparisons of weights "
        "and gradients: "
        f"{', '.join(names) or 'none'}.\n"
    )


def _reasons(built: Sequence[Row]) -> str:
    """Everything that was refused, warned about or left out, each text once."""
    lines = ["## Refused, warned of, left out", ""]
    for check in CHECKS:
        found = [(_general(v), row) for row in built if _said(v := row.checks.get(check, "-"))]
        for text, rows in _grouped(found):
            lines.append(f"- {check}, {_names(rows)}: {text}")
    return "\n".join(lines) + "\n"


def _said(verdict: str) -> bool:
    return _kind(verdict) in ("warned", "refused", "left out")


def _skipped(built: Sequence[Row]) -> str:
    lines = ["## Layers that `add_lora` leaves out", ""]
    found = []
    for row in built:
        for part in row.skipped.split(" | ") if row.skipped else ():
            found.append((_general(part.split(": ", 1)[1]), row))
    lines += [f"- {text}: {_names(rows)}" for text, rows in _grouped(found)]
    return "\n".join(lines) + "\n"


def _not_built(rows: Sequence[Row]) -> str:
    lines = ["## Classes that were not surveyed", ""]
    found = [(row.built, row) for row in rows if row.built != "ok"]
    lines += [f"- {', '.join(r.name for r in who)}: {_cell(text)}" for text, who in _grouped(found)]
    return "\n".join(lines) + "\n"


def _grouped(found: Iterable[tuple[str, Row]]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for text, row in found:
        groups.setdefault(text, []).append(row)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def _names(rows: Sequence[Row]) -> str:
    families = list(dict.fromkeys(row.family for row in rows))
    more = f" and {len(families) - 12} more" if len(families) > 12 else ""
    return ", ".join(families[:12]) + more


def _general(text: str) -> str:
    """The text without the numbers and names that differ from class to class."""
    text = re.sub(r"'[\w.]*\.[\w.]+'", "'...'", _cell(text))
    text = re.sub(r"\b\d(\.\d)?e[-+]\d+", "x", text)
    text = re.sub(r"\b(\w+\.)+\w+\b", "...", text)
    text = re.sub(r"\bno layer of \w+", "no layer", text)
    text = re.sub(r"for \w+; please override", "for it; please override", text)
    text = re.sub(r"\b\d+ layers", "some layers", text)
    return re.sub(r"\bits \w+ (reads|keeps)", r"its module \1", text)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")
