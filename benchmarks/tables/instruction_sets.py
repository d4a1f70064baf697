"""instruction_sets.csv: operators with the baseline and the AVX2 kernels, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .aims import where_bold
from .markdown import number, page, table
from .results import Results, Row, cases, matching, value

FILE = "avx2/instruction_sets.csv"


@dataclass(frozen=True)
class Case:
    """The rows of one operator at one size."""

    operator: str
    rows: Sequence[Row]

    def ms(self, variant: str) -> float | None:
        return value(self.rows, "median_ms", variant=variant)

    def ratio(self, variant: str) -> float | None:
        """The time as a multiple of the yardstick's."""
        return value(self.rows, "ratio", variant=variant)

    def speedup(self, variant: str) -> float | None:
        """How many times as fast as the yardstick."""
        ratio = self.ratio(variant)
        return 1 / ratio if ratio else None

    def slower_than_reference(self, variant: str) -> bool:
        """Whether it takes longer than the reference; False if the reference was not measured."""
        own, reference = self.ms(variant), self.ms("reference")
        return own is not None and reference is not None and own > reference

    @property
    def name(self) -> str:
        row = self.rows[0]
        shape, tokens = f"{row['size']}×{row['size']}", row.get("tokens")
        size = f"r = {row['r']}" if not tokens else f"{tokens} token{'s' * (tokens != '1')}"
        return f"`{self.operator}` {shape}, {row['dtype']}, {size}"


def against_yardstick(
    results: Results, operators: Sequence[str], cells: Callable[[Case], list[str]], aims: str
) -> str:
    """A table with a row for each case of these operators. `cells` makes the last two columns,
    where numbers that miss the `aims` are bold.
    """
    rows = [row for row in results.rows(FILE) if row["operator"] in operators]
    lines = []
    for operator, size, r, dtype, tokens in cases(rows, "operator", "size", "r", "dtype", "tokens"):
        own = matching(rows, operator=operator, size=size, r=r, dtype=dtype, tokens=tokens)
        case = Case(operator, own)
        known = (number(case.ms(name)) for name in ("yardstick", "reference"))
        lines.append([case.name, *known, *cells(case)])
    heads = ["", "yardstick, ms", "reference, ms", "baseline", "AVX2"]
    return page(table(heads, lines), results.caption([FILE], f"{where_bold(lines)}: {aims}"))
