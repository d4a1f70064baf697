"""The code of README and docs: fenced blocks of Markdown files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it is not run, as the comment before it does."""

    page: Path
    line: int  # of its first line of code
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def code(self) -> str:
        """The text below as many empty lines as precede it on the page, for right tracebacks."""
        return "\n" * (self.line - 1) + self.text

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a block of sh, without comments."""
        for command in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(command, comments=True):
                yield words


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["language"].strip(),
            found["text"],
            found["reason"],
        )
        for found in FENCE.finditer(text)
    ]


def module_of(page: Path) -> str:
    """`docs/guide/models.md` -> "guide_models", README.md -> "readme"."""
    parts = page.relative_to(ROOT).with_suffix("").parts
    return "_".join(part.lower() for part in parts if part != "docs")
