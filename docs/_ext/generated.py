"""What Sphinx does not do by itself: signatures of operators, help texts of commands, links."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from docutils.statemachine import StringList
from sphinx.domains.python import PyXRefRole
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

from lora_kernels.cli import argument_parser

_TYPES = {"SymInt": "int", "ScalarType": "torch.dtype", "Device": "torch.device"}
_COLUMNS = "84"  # of help texts
_NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^]]*)\]\((?P<target>[^):#]+)[^)]*\)")
_AS_LINK = PyXRefRole()


def _type(schema_type: Any) -> str:
    """The Python spelling of a schema's type: "Optional[Tensor]" -> "Tensor | None"."""
    text = str(schema_type)
    if text.startswith("Optional["):
        return f"{_type(text[len('Optional[') : -1])} | None"
    if text.startswith("List["):
        return f"list[{_type(text[len('List[') : -1])}]"
    return _TYPES.get(text, text)


def _schema(name: str) -> Any:
    return getattr(torch.ops.lora, name).default._schema


def _signature(name: str) -> str:
    """The signature of an operator, from its schema."""
    schema, parameters = _schema(name), []
    for argument in schema.arguments:
        if argument.kwarg_only and "*" not in parameters:
            parameters.append("*")
        default = f" = {argument.default_value!r}" if argument.has_default_value() else ""
        parameters.append(f"{argument.name}: {_type(argument.real_type)}{default}")
    results = [_type(result.real_type) for result in schema.returns]
    result = f"tuple[{', '.join(results)}]" if len(results) > 1 else (results or ["None"])[0]
    return f"torch.ops.lora.{name}({', '.join(parameters)}) -> {result}"


def _results(name: str) -> list[str]:
    """A sentence about the results of an operator, if they have names."""
    names = [f"`{result.name}`" for result in _schema(name).returns if result.name]
    return ["", f"`{name}` returns {', '.join(names)}."] if names else []


class Operators(Directive):
    """Signatures of `torch.ops.lora.*`, and the docstring of the module that defines them."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar = {"module": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        names = self.arguments[0].split()
        first, *others = map(_signature, names)
        text = inspect.getdoc(importlib.import_module(self.options["module"])) or ""
        body = [*text.splitlines(), *(line for name in names for line in _results(name))]
        lines = [f".. py:function:: {first}", *(f"   {own}" for own in others), ""]
        lines += [f"   {line}" for line in body]
        node = nodes.Element()
        source = self.state_machine.get_source(self.lineno)
        self.state.nested_parse(StringList(lines, source), self.content_offset, node)
        return node.children


class Command(Directive):
    """What `lora-kernels COMMAND --help` prints; without an argument, what `--help` does."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        parser = argument_parser()
        if self.arguments:
            (commands,) = parser._subparsers._group_actions
            parser = commands.choices[self.arguments[0]]
        description, examples = parser.description or "", parser.epilog or ""
        parser.description = parser.epilog = None
        os.environ |= {"COLUMNS": _COLUMNS, "NO_COLOR": "1"}
        found = [_paragraph(text) for text in description.strip().split("\n\n")]
        return [*found, _literal(parser.format_help()), *([_literal(examples)] if examples else [])]


def _literal(text: str) -> nodes.Node:
    return nodes.literal_block(text=text.strip("\n"), language="none")


def _paragraph(text: str) -> nodes.Node:
    """A part of a description: text with `code`, or lines to be kept if one of them is indented."""
    if re.search(r"^ ", text, re.MULTILINE):
        return _literal(text)
    paragraph = nodes.paragraph()
    for k, part in enumerate(text.split("`")):
        paragraph += nodes.literal(text=part) if k % 2 else nodes.Text(part)
    return paragraph


def _code(name: str, rawtext: str, text: str, lineno: int, inliner: Any, *rest: Any) -> Any:
    """The role of `code` in docstrings: a link if it is a name of the reference."""
    if _NAME.fullmatch(text):
        return _AS_LINK("py:obj", rawtext, text, lineno, inliner)
    return [nodes.literal(rawtext, text)], []


def _fields(app: Any, what: str, name: str, own: Any, *rest: Any) -> tuple[str, str] | None:
    """The signature of a dataclass: without private fields, and with the defaults that are made."""
    if what != "class" or not is_dataclass(own):
        return None
    made = {own.name: own.default_factory for own in fields(own) if callable(own.default_factory)}
    found = signature_of(own.__init__, bound_method=True)
    public = [
        one.replace(default=made[one.name]()) if one.name in made else one
        for one in found.parameters.values()
        if not one.name.startswith("_")
    ]
    found = found.replace(parameters=public, return_annotation=inspect.Signature.empty)
    return stringify_signature(found, unqualified_typehints=True), ""


def _keep_colons(app: Any, what: str, name: str, own: Any, options: Any, lines: list[str]) -> None:
    """Keeps napoleon from taking the words before a colon for the type of a property."""
    if what == "property":
        lines[:0] = ["..", ""]  # an empty comment


def _without_links_out(app: Any, docname: str, source: list[str]) -> None:
    """Leaves the text of links to folders and Markdown files outside of docs/. Sphinx copies other
    files to the site.
    """
    root = Path(app.srcdir)

    def shown(link: re.Match[str]) -> str:
        target = ((root / docname).parent / link["target"]).resolve()
        there = target.is_dir() or (target.suffix == ".md" and target.exists())
        return link["text"] if there and not target.is_relative_to(root) else link[0]

    source[0] = _LINK.sub(shown, source[0])


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("operators", Operators)
    app.add_directive("command", Command)
    app.add_role("code-or-link", _code)
    app.connect("autodoc-process-signature", _fields)
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # napoleon has 500
    app.connect("source-read", _without_links_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
