"""The compiled inner loops of products keep their vectors in registers.

With vectors wider than a register, GCC kept every sum in memory: correct, but an SVD took 30 times
as long.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from lora_kernels.ops import cpu_capabilities

_C = pytest.importorskip("lora_kernels._C")
if "avx2" not in cpu_capabilities() or not (shutil.which("nm") and shutil.which("objdump")):
    pytest.skip("needs x86 with AVX2, nm and objdump", allow_module_level=True)

FUSED = re.compile(r"\bvfn?m(add|sub)\d+p[sd]\b")
STACK = re.compile(r"\(%r[sb]p\)")


def functions(isa: str) -> dict[str, tuple[int, int]]:
    """Address and size of the functions of an instruction set that multiply strips."""
    lines = subprocess.run(
        ["nm", "--defined-only", "-S", _C.__file__], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    wanted = re.compile(rf"_ZN4lora\d+{isa}12_GLOBAL__N_1\d+(multiply_|strip_f)")
    fields = [line.split() for line in lines if wanted.search(line)]
    return {f[3]: (int(f[0], 16), int(f[1], 16)) for f in fields if len(f) == 4}


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_sums_of_products_stay_in_registers(isa):
    found = functions(isa)
    assert found, "no symbols: was the extension stripped?"
    fused = stack = 0
    for start, size in found.values():
        span = [f"--start-address={start}", f"--stop-address={start + size}"]
        code = subprocess.run(
            ["objdump", "-d", *span, _C.__file__], check=True, capture_output=True, text=True
        ).stdout
        fused += len(FUSED.findall(code))
        stack += len(STACK.findall(code))
    # Two tiles of 12 vectors at least. What lies on the stack is saved once a tile: 1.6 accesses a
    # multiplication with GCC 12; with the sums in memory there were 16.
    assert fused >= 24
    assert stack < 5 * fused
