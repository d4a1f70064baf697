"""Tables between the markers of a Markdown file, so that no figure in it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lora_kernels._utils.errors import unknown_name

_BLOCK = re.compile(
    r"^<!-- table (?P<name>\S+) -->\n(?P<old>.*?)^<!-- end of table (?P=name) -->$", re.S | re.M
)
_MARKER = re.compile(r"^<!-- (?:end of )?table (\S+) -->$", re.M)


def marked(name: str, table: str) -> str:
    """A table between its markers."""
    return f"<!-- table {name} -->\n{table}\n<!-- end of table {name} -->"


def with_tables(text: str, tables: Mapping[str, str], document: str) -> str:
    """Put the table of that name between `<!-- table NAME -->` and `<!-- end of table NAME -->`,
    each on a separate line. `document` is the name of the text in errors.

    Raises:
        ValueError: a marker has a name that no table has, or has no matching marker.

    """
    for name in _MARKER.findall(text):
        if name not in tables:
            raise unknown_name(f"table in {document}", name, list(tables))
    left = _MARKER.findall(_BLOCK.sub("", text))
    if left:
        raise ValueError(
            f"{document}: a marker of the table {left[0]!r} has no other end; a table stands "
            f"between the lines <!-- table {left[0]} --> and <!-- end of table {left[0]} -->"
        )
    return _BLOCK.sub(lambda match: marked(match["name"], tables[match["name"]]), text)


def names_in(text: str) -> list[str]:
    """The names of the tables in a text, in their order."""
    return [match["name"] for match in _BLOCK.finditer(text)]


def put_tables(document: Path, tables: Mapping[str, str]) -> list[str]:
    """Replace the tables of a file as `with_tables` does; return the names that the file has.

    Raises:
        ValueError: as for `with_tables`. The document is unchanged.

    """
    text = document.read_text(encoding="utf-8")
    replace_text(document, with_tables(text, tables, document.name))
    return names_in(text)


def replace_text(document: Path, text: str) -> None:
    """Replace a file in one step: a reader finds either the old text or the new text."""
    unfinished = document.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(document)
