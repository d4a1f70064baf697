"""The GPU, the driver, the versions and the place of CUDA, on one line and in a JSON file."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.card.names import slug


def card() -> str:
    """Name, memory and driver from nvidia-smi, which needs no torch."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    said = (done.stdout or done.stderr).strip().splitlines()
    return said[0] if said else f"nvidia-smi: no answer, status {done.returncode}"


def version(name: str) -> str:
    """The version of a module, or the error of its import."""
    try:
        return importlib.import_module(name).__version__
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(path: Path) -> int:
    """Return 0 if torch finds a CUDA GPU."""
    known = {
        "card": card(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton"),
        "cpus": os.cpu_count(),
        "nvcc": shutil.which("nvcc"),
        "CUDA_HOME": os.environ.get("CUDA_HOME"),
        "xdist": importlib.util.find_spec("xdist") is not None,
        "pytest_timeout": importlib.util.find_spec("pytest_timeout") is not None,
    }
    usable = False
    try:
        import torch

        usable = torch.cuda.is_available()
        known["slug"] = slug(torch.cuda.get_device_name()) if usable else "no-gpu"
    except Exception as error:
        known["error"] = f"{type(error).__name__}: {error}"
    path.write_text(json.dumps(known))
    print(", ".join(f"{key} {value}" for key, value in known.items()))
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
