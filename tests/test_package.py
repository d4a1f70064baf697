"""The installed package: without a compiler, with any instruction set."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from lora_kernels import __version__
from lora_kernels._utils.version import torch_abi
from lora_kernels.ops import cpu_capabilities, cpu_capability, set_cpu_capability
from lora_kernels.ops._backends import extension

from .support import ROOT
from .support.exhaustive import EXHAUSTIVE

# Each process computes every operator, and the layer's gradients.
PROGRAM = """
import sys, warnings
import torch
block = {block}
if block:
    sys.modules["lora_kernels._C"] = None  # as if it had not been built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lora_kernels
    from lora_kernels import LoRALinear
messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
name = lora_kernels.ops.cpu_capability()
def numbers(*shape):  # torch.randn itself depends on the instruction set
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919 % 100003) / 50001.5 - 1.0).reshape(shape)
out = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    weight = numbers(70, 53).to(dtype)
    out += [torch.ops.lora.frobenius_stats([weight])]
    out += torch.ops.lora.loram_init(weight, 9, 2.0)
    out += [weight]
torch.manual_seed(0)
linear = torch.nn.Linear(64, 48)
with torch.no_grad():
    linear.weight.copy_(numbers(48, 64))
    linear.bias.zero_()
layer = LoRALinear.from_linear(linear, r=4, lora_dropout=0.2)
layer(numbers(5, 64)).square().sum().backward()
out += [layer.weight.detach(), layer.lora_A.grad, layer.lora_B.grad]
torch.save({{"name": name, "messages": messages, "out": out}}, sys.argv[1])
"""


def run(path: Path, capability: str | None = None, block: bool = False) -> dict:
    env = dict(os.environ)
    if capability:
        env["LORA_KERNELS_CPU_CAPABILITY"] = capability
    program = PROGRAM.format(block=block)
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=env, cwd=ROOT)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def fastest(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("package") / "fastest.pt")


def agree(got: dict, want: dict) -> None:
    for a, b in zip(got["out"], want["out"], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(a.dtype, 2e-6)
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_without_the_extension(tmp_path, fastest):
    """The references alone give the same results, with one warning that says how to get the
    kernels.
    """
    plain = run(tmp_path / "plain.pt", block=True)
    assert plain["name"] == "reference"
    assert len(plain["messages"]) == 1
    assert "pip install --no-build-isolation ." in plain["messages"][0]
    assert fastest["messages"] == []
    agree(plain, fastest)


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.13.0", "2.13"),
        ("2.13.1+cu130", "2.13"),
        ("3.0.0+cpu", "3.0"),
        ("2.14.0.dev20261128+cpu", "2.14.0.dev20261128+cpu"),
        ("2.13.0a0+git1234", "2.13.0a0+git1234"),
    ],
)
def test_part_of_the_version_that_an_extension_fits(version, fits):
    assert torch_abi(version) == fits


def test_the_extension_for_this_torch_is_chosen(tmp_path):
    """Of several; a file for another build of Python is not one."""
    names = ["_C.torch2.12.abi3.so", "_C.torch2.13.abi3.so", "_C.torch2.14.0.dev1.abi3.so"]
    for name in [*names, "_C.torch2.9.cpython-39-riscv64-linux-gnu.so", "_C.abi3.so"]:
        (tmp_path / name).touch()
    assert extension.fitting_file(tmp_path, "2.12.1+cu130").name == names[0]
    assert extension.fitting_file(tmp_path, "2.13.0").name == names[1]
    assert extension.fitting_file(tmp_path, "2.14.0.dev1").name == names[2]
    for other in ("2.9.0", "2.11.0", "2.14.0"):
        with pytest.raises(ImportError, match=rf"for torch 2\.12, 2\.13, .* this is torch {other}"):
            extension.fitting_file(tmp_path, other)
    with pytest.raises(ImportError, match="they were not built"):
        extension.fitting_file(tmp_path / "none", "2.13.0")


def test_an_extension_for_another_torch_is_not_loaded(tmp_path, monkeypatch):
    """The file is not opened: this one is no library at all."""
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    monkeypatch.setitem(sys.modules, extension.NAME, None)
    monkeypatch.delitem(sys.modules, extension.NAME)
    (tmp_path / "_C.torch1.0.abi3.so").write_bytes(b"no library")
    advice = r"built for torch 1\.0, and this is torch .*pip install --no-build-isolation \."
    with pytest.warns(RuntimeWarning, match=advice):
        loaded, reason = extension.load_extension()
    assert loaded is None and "torch 1.0" in reason
    # One that fits by its name and cannot be loaded is no error either.
    (tmp_path / f"_C.torch{torch_abi(torch.__version__)}.abi3.so").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="plain-torch references"):
        assert extension.load_extension()[0] is None


@pytest.mark.parametrize("capability", cpu_capabilities()[:-1])
def test_every_lower_instruction_set(tmp_path, capability, fastest):
    lower = run(tmp_path / "lower.pt", capability)
    assert lower["name"] == capability
    agree(lower, fastest)
    # Sums over float32 and narrower weights have the same bits on all of them.
    assert all(torch.equal(lower["out"][k], fastest["out"][k]) for k in (0, 5, 10))


def test_an_instruction_set_that_is_not_there():
    """An error names it, also when set in the environment; the current one stays in use."""
    before = cpu_capability()
    with pytest.raises(ValueError, match=r"expected one of baseline, avx2.*did you mean 'avx512'"):
        set_cpu_capability("avx-512")
    assert cpu_capability() == before
    env = dict(os.environ, LORA_KERNELS_CPU_CAPABILITY="sse9")
    command = [sys.executable, "-c", "import lora_kernels"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown LORA_KERNELS_CPU_CAPABILITY 'sse9': expected one of baseline" in done.stderr


def test_triton_kernels_is_no_top_level_package():
    """That name belongs to another package, which serving engines look for."""
    import lora_kernels.triton_kernels

    assert lora_kernels.triton_kernels.__name__ == "lora_kernels.triton_kernels"
    # In a folder of its own, and not where PYTHONPATH may point: to a checkout used in place.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import importlib.util as u; s = u.find_spec('triton_kernels'); print(s and s.origin)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", env=env, check=True, capture_output=True, text=True)
    origin = Path(done.stdout.strip())
    ours = Path(lora_kernels.triton_kernels.__file__).read_text()
    assert done.stdout.strip() == "None" or origin.read_text() != ours  # the other package's


def test_a_checkout_works_where_it_lies(tmp_path):
    """`make gpu` uses the package without installing it, with the kernels' folder beside it."""
    for folder in ("lora_kernels", "triton_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    code = (
        "import sys, warnings; warnings.simplefilter('ignore');"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import lora_kernels.triton_kernels as t; print(t.__file__)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == tmp_path / "triton_kernels" / "__init__.py"


def test_builds_without_a_compiler(tmp_path):
    """LORA_KERNELS_BUILD=none builds no extension; a misspelled value raises an error."""
    for value, code in (("none", 0), ("gpu", 1)):
        env = dict(os.environ, LORA_KERNELS_BUILD=value)
        command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode != 0) == bool(code), done.stderr
    assert "expected one of auto, cpu, cuda, none" in done.stderr
    assert not list(tmp_path.rglob("_C*")) and list(tmp_path.rglob("lora_kernels/layers/base.py"))
    for built in ("triton_kernels/linear/__init__.py", "py.typed"):
        assert list(tmp_path.rglob(f"lora_kernels/{built}"))


@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 compiles twice")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_compile_where_torch_is_held_to_a_lower_instruction_set(capability):
    """One after the other: a graph cached under the first set is not used for the second."""
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/ops/svd/test_thin_qr.py", "-k", "compile and cpu"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_source_is_compiled_once(monkeypatch):
    """On its own or in its folder's single file; sources that include torch's large headers never
    on their own.
    """
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.setenv("LORA_KERNELS_BUILD", "cpu")
    monkeypatch.setenv("CCACHE_BASEDIR", str(ROOT))
    runpy.run_path(str(ROOT / "setup.py"))
    (extension,) = asked["ext_modules"]
    compiled = []
    for name in extension.sources:
        source = ROOT / name
        if source.is_relative_to(ROOT / "csrc"):
            assert "<ATen/ATen.h>" not in source.read_text()
            compiled.append(source)
        else:
            compiled += [
                ROOT / "csrc" / part for part in re.findall(r'#include "(.+)"', source.read_text())
            ]
    here = {source for source in (ROOT / "csrc").rglob("*.cpp") if source.parent.name != "cuda"}
    assert len(compiled) == len(set(compiled)) and set(compiled) == here


def test_citation_has_this_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__
    assert citation["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert citation["references"][0]["doi"].endswith("2507.06558")


def test_project_files_are_valid():
    """YAML whose tools, targets and files are there."""
    yaml = pytest.importorskip("yaml")

    def read(name: str) -> dict:
        return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))

    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for hook in hooks:
        tool = Path(hook["entry"].split()[0])
        assert tool.parts[:2] == (".venv", "bin") and re.search(rf'"{tool.name}==', project)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    jobs = read(".github/workflows/ci.yml")["jobs"]
    targets = jobs["make"]["strategy"]["matrix"]["target"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert all((ROOT / step.get("run", ".")).exists() for step in jobs["test"]["steps"])
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert all(f"Python :: {version}" in project for version in versions)
    form = read(".github/ISSUE_TEMPLATE/bug_report.yml")
    assert any(
        "lora-kernels env" in part["attributes"].get("description", "") for part in form["body"]
    )
