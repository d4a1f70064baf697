"""`lora-kernels env`: prints what a bug report needs."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import torch

from .._utils.version import __version__
from ..ops._backends import cpu_capability as kernels
from ._options import Commands, add_command

Value: TypeAlias = "str | int | bool | list[str] | None"
Facts: TypeAlias = dict[str, dict[str, Value]]

PACKAGES = (
    *("numpy", "safetensors", "triton", "transformers", "peft", "accelerate", "trl"),
    *("bitsandbytes", "torchao"),
)
# Environment variables by the first part of their names, and by the whole name. No others are
# printed, because variables may hold passwords.
PREFIXES = (
    *("ATEN_", "KMP_", "LORA_KERNELS_", "MKL_", "NVIDIA_TF32_", "OMP_", "ONEDNN_", "PYTORCH_"),
    *("TORCHDYNAMO_", "TORCHINDUCTOR_", "TRITON_"),
)
NAMES = ("CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK", "WORLD_SIZE")

_DESCRIPTION = """\
Prints what a bug report needs: versions, how the kernels were built, the instruction set in use,
PyTorch's settings, the processor, GPUs, and environment variables that change the results or the
speed. Packages are looked up and not imported, so the command works if one of them is broken.
"""
_EXAMPLES = """\
examples:
  lora-kernels env
  lora-kernels env --json > environment.json
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "env", "what a bug report needs", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_env)


def _env(options: argparse.Namespace) -> None:
    facts = environment()
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))


def environment() -> Facts:
    """Facts by section and name."""
    return {
        "lora_kernels": _own_kernels(),
        "torch": _torch(),
        "system": _system(),
        "gpus": _gpus(),
        "packages": {name: _package_version(name) for name in PACKAGES},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(PREFIXES) or name in NAMES
        },
    }


def as_text(facts: Facts) -> str:
    """A line for each fact, indented below its section."""
    lines = []
    for section, values in facts.items():
        lines.append(f"{section}:" if values else f"{section}: none")
        lines += [f"  {name}: {_in_words(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _in_words(value: Value) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    words = {True: "yes", False: "no", None: "none"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _own_kernels() -> dict[str, Value]:
    extension = kernels.extension
    facts: dict[str, Value] = {"version": __version__, "compiled_kernels": None}
    if extension is None:
        facts["reason"] = kernels.missing
    else:
        facts["compiled_kernels"] = "CPU and CUDA" if extension.has_cuda_kernels else "CPU"
        facts["built_for_torch"] = extension.torch_version
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        **facts,
        "triton_kernels": has_kernel("lora::linear_forward", "CUDA"),
        "instruction_set": kernels.cpu_capability(),
        "supported": kernels.cpu_capabilities(),
    }


def _torch() -> dict[str, Value]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    return {
        "version": str(torch.__version__),
        "build": build,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def _system() -> dict[str, Value]:
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": _own_cores(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _own_cores() -> int | None:
    """The cores that this process may use; None where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _gpus() -> dict[str, Value]:
    """Name, memory and compute capability by number; an error where the driver raises one."""
    try:
        found = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    except (AssertionError, RuntimeError) as error:
        return {"error": " ".join(str(error).split())}
    return {
        str(k): f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {gpu.major}.{gpu.minor}"
        for k, gpu in enumerate(found)
    }


def _package_version(name: str) -> str | None:
    """From the package's metadata; None if the package is not installed."""
    try:
        there = find_spec(name) is not None
    except (ImportError, ValueError):  # another program has put something else in its place
        there = False
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "found, without metadata" if there else None
    except Exception as error:  # metadata that cannot be read
        return f"broken metadata ({type(error).__name__})"
    version = version or "broken metadata"  # older versions of Python return None
    return version if there else f"{version}, but the package is not found"
