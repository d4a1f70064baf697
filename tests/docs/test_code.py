"""Every snippet and command of README and docs is executed, from the top of a page to its end."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from lora_kernels.cli import main

from ..support import ROOT
from .blocks import PAGES, Block, blocks_of, module_of

RUN = ("python", "sh")
WITH_CODE = [
    page for page in PAGES if any(b.language in RUN and not b.reason for b in blocks_of(page))
]
# Commands that would take minutes or install something: what runs them, and proves them, instead.
ELSEWHERE = {
    "make": "the workflow runs demo, test, docs and wheel",
    "pip": "make wheel installs the package into clean environments",
    ".ci/run": "runs these tests",
}


def setup_of(page) -> ModuleType | None:
    name = f"{__package__}.pages.{module_of(page)}"
    return importlib.import_module(name) if find_spec(name) else None


def run(block: Block, names: dict) -> None:
    if block.language == "python":
        exec(compile(block.code, str(block.page), "exec"), names)
        return
    for words in block.commands():
        if words[0] == "lora-kernels":
            assert main(words[1:]) in (0, None), f"{block.place}: {' '.join(words)}"
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, f"{block.place}: the Makefile has no {words[1]}"
        else:
            assert words[0] in ELSEWHERE, f"{block.place}: what runs {' '.join(words)}?"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=module_of)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    setup = setup_of(page)
    # A module of its own, because dataclasses and pickle look their module up.
    module = ModuleType(f"page_{module_of(page)}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = module.__dict__
    if setup is not None:
        names.update(setup.names(tmp_path))
    capsys.readouterr()
    for block in blocks_of(page):
        if block.language in RUN and block.reason is None:
            run(block, names)
    if hasattr(setup, "check"):
        setup.check(names, capsys.readouterr().out, tmp_path)


def test_every_command_is_in_a_block_of_sh():
    programs = "make|pip|lora-kernels|python|torchrun|accelerate"
    commands = re.compile(rf"^(\$ |({programs}) )", re.MULTILINE)
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language or not commands.search(block.text), block.place


def test_every_setup_has_its_page():
    known = {module_of(page) for page in PAGES} | {"__init__"}
    assert {path.stem for path in (ROOT / "tests/docs/pages").glob("*.py")} <= known
