"""Compile one launch without a GPU, as the runtime would, and report on its code."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "tma.load": r"\bcp\.async\.bulk\.tensor[\w.]*\.shared::\w+(::\w+)?\.global",
    "tma.store": r"\bcp\.async\.bulk\.tensor[\w.]*\.global\.shared",
    "cp.async": r"\bcp\.async\.c[ag]\.shared",
    "griddepcontrol.wait": r"\bgriddepcontrol\.wait",
    "griddepcontrol.launch_dependents": r"\bgriddepcontrol\.launch_dependents",
    "ld.global.128": r"\bld\.global[\w.:]*\.(v4\.[bfu]32|v2\.[bfu]64)\b",
    "ld.global.256": r"\bld\.global[\w.:]*\.(v8\.[bfu]32|v4\.[bfu]64)\b",
    "st.global.128": r"\bst\.global[\w.:]*\.(v4\.[bfu]32|v2\.[bfu]64)\b",
    "fma.f64": r"\bfma\.rn\.f64\b",
}
# ptxas's remarks on lost speed: C7508 to C7515 say that wgmma instructions wait for one another.
REMARK = r"\(C75\d\d\)[^\n]*"


@dataclass(frozen=True)
class Launch:
    """A launch as specialized by Triton: everything that determines the machine code."""

    fn: JITFunction
    arch: int
    key: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def identity(self) -> tuple[str, int, str]:
        """Equal for launches that compile to the same code."""
        return self.fn.cache_key, self.arch, self.key

    @property
    def arguments(self) -> dict[str, str]:
        """Type ("/16": divisible by 16) or constant value of each parameter, for reading."""
        described = {}
        for i, (name, kind) in enumerate(self.signature.items()):
            inner = {k[1:]: v for k, v in self.constexprs.items() if k[0] == i}
            aligned = "/16" if self.attrs.get((i,)) else ""
            described[name] = repr(inner[()]) if () in inner else f"{kind}{aligned}{inner or ''}"
        return described


@dataclass(frozen=True)
class Report:
    """One compiled launch; `instructions` counts those of `INSTRUCTIONS` in the PTX."""

    kernel: str
    arch: int
    arguments: dict[str, str]
    num_warps: int
    num_stages: int
    launch_pdl: bool
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    remarks: list[str]
    seconds: float
    case: str = ""
    missing: list[str] = field(default_factory=list)


def compile_launch(launch: Launch) -> Report:
    """Compile as the runtime would, and examine the PTX and the cubin."""
    start = time.perf_counter()
    source = ASTSource(launch.fn, launch.signature, launch.constexprs, launch.attrs)
    target = GPUTarget("cuda", launch.arch, 32)
    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True  # it is printed
        compiled = triton.compile(source, target=target, options=launch.options)
    seconds = time.perf_counter() - start
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    counts = {name: len(re.findall(regex, ptx)) for name, regex in INSTRUCTIONS.items()}
    return Report(
        kernel=launch.fn.__name__,
        arch=launch.arch,
        arguments=launch.arguments,
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
        launch_pdl=launch.options["launch_pdl"],
        registers=resources["REG"],
        stack=resources["STACK"] + resources["LOCAL"],
        shared=compiled.metadata.shared,
        instructions={name: count for name, count in counts.items() if count},
        remarks=sorted({each.strip() for each in re.findall(REMARK, log.getvalue())}),
        seconds=round(seconds, 2),
    )
