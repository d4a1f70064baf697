"""The pages of the site: complete, linked, and in a table of contents. Nothing is built here;
`make docs` builds the site and takes its warnings for errors.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import lora_kernels
from lora_kernels.cli import argument_parser
from lora_kernels.ops._backends.library import LIBRARY

from ..support import ROOT
from ..test_architecture import PUBLIC_MODULES
from .blocks import FENCE, PAGES

DOCS = ROOT / "docs"
REFERENCE = "\n".join(page.read_text("utf-8") for page in sorted(DOCS.glob("reference/*.md")))
CODE = ("lora_kernels", "csrc", "triton_kernels", "benchmarks")
ONLY_CITED = {"2602.04998"}  # papers that no code follows


def places(pages) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def documented() -> set[int]:
    """The ids of the objects that the reference pages name."""
    found = set()
    for kind, name in re.findall(r"^ *\.\. (?:auto|py:)(\w+):: ([\w.]+)$", REFERENCE, re.MULTILINE):
        module, _, last = name.rpartition(".")
        if kind == "module":
            found.add(id(import_module(name)))
        elif module:
            found.add(id(getattr(import_module(module), last)))
    return found


def public_names(module) -> list[str]:
    """The names of `__all__`, or those that the module or its parts define; but no modules."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "").startswith(module.__name__) and name[0] != "_"
    ]
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def text_of(page: Path) -> str:
    """A page without blocks of code and code in lines, whose brackets are no links."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", page.read_text("utf-8")))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text_of(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+ +(.+?) *$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE
    ):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = own = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = 0
        while own in found:
            count += 1
            own = f"{anchor}-{count}"
        found.add(own)
    return found


def broken(page: Path, link: str) -> bool:
    """Whether a relative link has no target, or no such heading there."""
    path, _, anchor = unquote(link).partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return True
    return bool(anchor) and anchor not in anchors(target)


def test_every_public_name_is_in_the_reference():
    known = documented()
    missing = [n for n in lora_kernels.__all__ if id(getattr(lora_kernels, n)) not in known]
    assert missing == []


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_name_of_a_public_module_is_in_the_reference(name):
    if name == "peft":
        pytest.importorskip("peft")
    module, known = import_module(f"lora_kernels.{name}"), documented()
    assert [own for own in public_names(module) if id(getattr(module, own)) not in known] == []


def test_every_operator_is_in_the_reference():
    named = re.findall(r"^\.\. operators:: (.+)\n +:module: (\S+)$", REFERENCE, re.MULTILINE)
    listed = [operator for operators, _ in named for operator in operators.split()]
    defined = {name.partition("::")[2] for name in LIBRARY._op_defs}
    assert sorted(listed) == sorted(name for name in defined if name[0] != "_")
    for operators, module in named:
        assert operators.split()[0] in inspect.getdoc(import_module(module)), module


def test_every_command_is_in_the_reference():
    (commands,) = argument_parser()._subparsers._group_actions
    listed = re.findall(r"^\.\. command:: (\w+)$", REFERENCE, re.MULTILINE)
    assert sorted(listed) == sorted(commands.choices)


def test_every_page_is_in_one_table_of_contents():
    listed: list[str] = []
    for page in DOCS.rglob("*.md"):
        for block in re.findall(
            r"^```\{toctree\}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S
        ):
            entries = [line for line in block.splitlines() if line and line[0] != ":"]
            listed += [str((page.parent / f"{entry}.md").relative_to(DOCS)) for entry in entries]
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"index.md"}
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("page", PAGES, ids=places(PAGES))
def test_links_of_a_page(page):
    relative = [link for link in links(page) if not urlsplit(link).scheme]
    assert [link for link in relative if broken(page, link)] == []
    for link in links(page):
        parts = urlsplit(link)
        assert parts.scheme in ("", "https"), link
        assert bool(parts.netloc) == (parts.scheme == "https"), link


def test_arxiv_numbers_are_those_of_the_code():
    files = [
        f
        for folder in CODE
        for f in (ROOT / folder).rglob("*")
        if f.suffix in (".py", ".h", ".cpp")
    ]
    known = set(re.findall(r"\b\d{4}\.\d{5}\b", "\n".join(f.read_text("utf-8") for f in files)))
    assert not known & ONLY_CITED
    for page in PAGES:
        text = page.read_text("utf-8")
        for number in re.findall(r"arxiv\.org/\w+/([^\s)#]+)|arXiv[: ]([\d.]*\d)", text):
            number = "".join(number)
            assert re.fullmatch(r"\d{4}\.\d{5}", number), f"{page.name}: {number}"
            assert number in known | ONLY_CITED, f"{page.name}: {number} is in no source file"


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`: d — e\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n")
    assert anchors(page) == {"a-b_c-d--e", "same", "same-1"}
    assert not broken(page, "#same-1") and not broken(page, "page.md#a-b_c-d--e")
    assert broken(page, "#no-heading") and broken(page, "other.md")
