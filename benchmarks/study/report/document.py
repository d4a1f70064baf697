"""Tables between the markers of a Markdown file, so that no figure in it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lora_kernels._utils.errors import unknown_name

_BLOCK = re.compile(
    r"<!-- table (?P<name>\S+) -->\n(?P<old>.*?)<!-- end of table (?P=name) -->", re.S
)
_MARKER = re.compile(r"<!-- (?:end of )?table (\S+) -->")


def marked(name: str, table: str) -> str:
    """A table between its markers."""
    return f"<!-- table {name} -->\n{table}\n<!-- end of table {name} -->"


def put_tables(document: Path, tables: Mapping[str, str]) -> list[str]:
    """Replace what is between `<!-- table NAME -->` and `<!-- end of table NAME -->`, both on lines
    of their own, by the table of that name; returns the names that the document has.

    Raises:
        ValueError: a marker has a name that no table has, or lacks its other end. The document is
            as it was.

    """
    text = document.read_text(encoding="utf-8")
    names = [match["name"] for match in _BLOCK.finditer(text)]
    for name in _MARKER.findall(text):
        if name not in tables:
            raise unknown_name(f"table in {document.name}", name, list(tables))
    left = _MARKER.findall(_BLOCK.sub("", text))
    if left:
        raise ValueError(
            f"{document.name}: a marker of the table {left[0]!r} has no other end; a table stands "
            f"between the lines <!-- table {left[0]} --> and <!-- end of table {left[0]} -->"
        )
    text = _BLOCK.sub(lambda match: marked(match["name"], tables[match["name"]]), text)
    unfinished = document.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(document)
    return names
