"""The rooms of `lora_kernels`: which may import which, how large they are, and what is public.

Imports are read from the source; nothing is imported for it.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from .support import ROOT

PACKAGE = ROOT / "lora_kernels"
# From the ground up. A file imports its own room and rooms on lower floors.
FLOORS = (
    ("triton_kernels", "_C"),
    ("_utils",),
    ("ops",),
    ("init",),
    ("layers",),
    ("model.experts",),
    ("model",),
    ("files.io", "training"),
    ("files.adapter",),
    ("files.checkpoint",),
    ("files.serving",),
    ("files",),
    ("peft", "cli"),
    ("", "integrations"),  # the front door, lora_kernels/__init__.py; and plugins
)
STRANGERS = (("files", "training"), ("peft", "cli"))  # neither imports the other
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
LIMIT = 9  # parts in a room
NOT_PARTS = ("__init__.py", "__main__.py", "__pycache__", "py.typed")
PLUGINS = (
    "integrations"  # in lora_kernels/, not counted: other programs import it, nothing here does
)
PUBLIC = {
    *("LoRAConfig", "LoRALinear", "__version__", "adapter_names", "add_lora", "capture_gradients"),
    *("adapters_per_row", "add_weighted_adapter", "capture_activations"),
    *("disable_adapters", "enable_adapters", "hotswap_adapter", "init", "load_adapter"),
    *("lora_plus_groups", "magnitude", "merge_lora", "ops", "optim", "rescaling", "save_adapter"),
    *("set_adapter", "start_adapters", "suggest", "svd", "trainer", "unload_lora"),
    "with_expert_rank",
}
PUBLIC_MODULES = ("init", "magnitude", "ops", "optim", "rescaling", "svd", "trainer", "peft", "cli")


def module_name(path: Path, package: Path) -> str:
    """`layers/linear.py` -> "layers.linear", `layers/__init__.py` -> "layers"."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str, modules: Collection[str]) -> str:
    """The longest prefix of the module's name that has a floor; what is no module is a name of the
    front door.
    """
    parts = module.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    room = next((prefix for prefix in prefixes if prefix in LEVELS), None)
    return room or (parts[0] if parts[0] in modules else "")


@functools.cache
def imported(text: str, here: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, full name) of all that a file in the package `here` imports, lazy imports included."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            name = node.args[0]
            spelt = name.value if isinstance(name, ast.Constant) else ast.unparse(name)
            spelt = spelt.removeprefix("f").strip("'\"")
            names = [here[0] + spelt if spelt.startswith(".") else spelt]
        found += [(node.lineno, name) for name in names]
    return found


def imports(path: Path, package: Path, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of `lora_kernels`) for every import."""
    here = path.relative_to(package.parent).parent.parts
    for line, full in imported(path.read_text(encoding="utf-8"), here):
        root, _, name = full.partition(".")
        if root == package.name:
            while name and name not in modules and "." in name:
                name = name.rpartition(".")[0]
            yield line, name


def sources(package: Path) -> dict[str, Path]:
    return {module_name(path, package): path for path in sorted(package.rglob("*.py"))}


def strangers(own: str, other: str) -> bool:
    tops = {own.partition(".")[0], other.partition(".")[0]}
    return any(tops == set(pair) for pair in STRANGERS)


def violations(package: Path) -> list[str]:
    """What breaks the import rule, a line each."""
    found = []
    modules = sources(package)
    for module, path in modules.items():
        own = room_of(module, modules)
        if own not in LEVELS:
            found.append(f"{module}: the room {own!r} has no floor")
            continue
        for line, imported in imports(path, package, set(modules)):
            other = room_of(imported, modules)
            if other not in LEVELS:
                found.append(f"{module}:{line} imports {imported}: {other!r} has no floor")
            elif other != own and (LEVELS[other] >= LEVELS[own] or strangers(own, other)):
                found.append(f"{module}:{line} imports {imported}, which is not below")
    return found


def circle(package: Path) -> list[str]:
    """Files that import each other in a circle; empty if there is none."""
    modules = sources(package)
    graph = {
        name: {other for _, other in imports(path, package, set(modules)) if other in modules}
        - {name}
        for name, path in modules.items()
    }
    while graph:
        free = {name for name, others in graph.items() if not others & graph.keys()}
        if not free:
            return sorted(graph)
        graph = {name: others for name, others in graph.items() if name not in free}
    return []


def oversized(package: Path) -> dict[str, list[str]]:
    """Folders with more than `LIMIT` parts."""
    folders = [package, *(path.parent for path in package.rglob("__init__.py"))]
    parts = {
        module_name(folder / "__init__.py", package): sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.name not in NOT_PARTS and (entry.is_dir() or entry.suffix == ".py")
            if (folder, entry.name) != (package, PLUGINS)
        )
        for folder in folders
    }
    return {name: found for name, found in parts.items() if len(found) > LIMIT}


@pytest.fixture
def copy(tmp_path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    return Path(shutil.copytree(PACKAGE, tmp_path / "lora_kernels", ignore=ignored))


def test_imports_go_down():
    assert violations(PACKAGE) == []


def test_no_circle():
    assert circle(PACKAGE) == []


def test_rooms_are_small():
    assert oversized(PACKAGE) == {}
    names = {entry.name for entry in PACKAGE.iterdir() if not entry.name.startswith("_C.")}
    assert {n for n in names if (PACKAGE / n).is_file()} == {"__init__.py", "py.typed"}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("layers/options.py", "from ..model import lora"),
        ("layers/options.py", "def late():\n    from ..files.adapter.saving import save_adapter"),
        ("_utils/checks.py", "import lora_kernels.ops.linear"),
        ("ops/linear/lora.py", "if TYPE_CHECKING:\n    from ...init.base import Initializer"),
        ("files/checkpoint/merge.py", "from ...training.magnitude import measure"),
        ("training/optim.py", "from ..files.adapter.saving import save_adapter"),
        ("files/io/blocks.py", "from ..adapter import recipe"),
        ("files/adapter/recipe.py", "from ..checkpoint.merge import merge"),
        ("peft/layers.py", "from ..cli import main"),
        ("model/config.py", "from lora_kernels import add_lora"),
        ("init/base.py", "import importlib\nimportlib.import_module('lora_kernels.layers.linear')"),
        ("init/base.py", "from .. import model"),
        ("cli/init.py", "from ..integrations import axolotl"),
    ],
)
def test_an_import_planted_upward_is_found(file, line, copy):
    path = copy / file
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    (found,) = violations(copy)
    assert found.startswith(file.removesuffix(".py").replace("/", "."))


def test_other_breaches_are_found(copy):
    (copy / "attic").mkdir()
    (copy / "attic/__init__.py").write_text("")
    assert any("'attic' has no floor" in line for line in violations(copy))
    assert oversized(copy)[""]  # a tenth room
    planted = copy / "layers/state.py"
    planted.write_text(f"{planted.read_text()}\n\nfrom .adapter import Adapter\n")
    assert {"layers.state", "layers.adapter"} <= set(circle(copy))


def test_public_names():
    import lora_kernels

    assert set(lora_kernels.__all__) == PUBLIC
    assert all(hasattr(lora_kernels, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_modules(name):
    import importlib

    import lora_kernels

    if name == "peft":
        pytest.importorskip("peft")
    module = importlib.import_module(f"lora_kernels.{name}")
    assert module is getattr(lora_kernels, name)


def test_the_wheel_has_every_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    listed = re.findall(r'"([\w.]+)"', block[1])
    folders = [path.parent for path in PACKAGE.rglob("__init__.py")]
    ours = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    kernels = [path.parent for path in (ROOT / "triton_kernels").rglob("__init__.py")]
    ours |= {".".join(("lora_kernels", *folder.relative_to(ROOT).parts)) for folder in kernels}
    assert sorted(listed) == sorted(ours)
