"""A cache of compilation reports on disk, one small JSON file each.

The key contains everything in Triton's own cache key (its version and ptxas's, the source of the
kernel and its callees, signature, constants, options) and the source of the reporting code.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

UNUSED_FOR = 30 * 24 * 3600  # seconds until an entry is deleted
REPORTER = Path(__file__).with_name("aot_compile.py").read_text()


class Cache:
    """Reports by launch in a folder; without a folder it stores nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for entry in folder.glob("*.json"):
                if entry.stat().st_mtime < time.time() - UNUSED_FOR:
                    entry.unlink(missing_ok=True)

    def read(self, launch) -> dict | None:
        """The stored report for `launch`, if any."""
        if self.folder is None:
            return None
        try:
            entry = self._entry(launch)
            report = json.loads(entry.read_text())
            os.utime(entry)
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return report

    def write(self, launch, report: dict) -> None:
        if self.folder is not None:
            entry = self._entry(launch)
            part = entry.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(report))
            part.replace(entry)  # other processes never see an incomplete file

    def _entry(self, launch) -> Path:
        source = ASTSource(launch.fn, launch.signature, launch.constexprs, launch.attrs)
        backend = make_backend(GPUTarget("cuda", launch.arch, 32))
        options = backend.parse_options(dict(launch.options))
        key = REPORTER + str(launch.arch) + get_cache_key(source, backend, options, env_vars={})
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
