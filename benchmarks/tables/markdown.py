"""Numbers and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NONE = "—"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; the first line of `heads` may be empty strings."""
    made = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*made, *("| " + " | ".join(line) + " |" for line in lines)])


def page(*parts: str) -> str:
    """Tables, pictures and captions, with empty lines between them."""
    return "\n\n".join(part for part in parts if part)


def bold(text: str, when: bool = True) -> str:
    """Bold text, where there is any."""
    return f"**{text}**" if when and text and text != NONE else text


def number(value: float | None) -> str:
    """Three significant digits, never an exponent: 0.170, 12.3, 12,345."""
    if value is None:
        return NONE
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def times(value: float | None, digits: int = 2) -> str:
    """A ratio."""
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def power(value: float | None, digits: int = 1) -> str:
    """A small number with an exponent: 1.6e-4."""
    if value is None:
        return NONE
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def seconds(milliseconds: float | None) -> str:
    """A time in seconds."""
    return number(None if milliseconds is None else milliseconds / 1e3)
