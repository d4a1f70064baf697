"""Run PEFT's own tests, plain and with `lora_kernels.peft.accelerate`, and list which differ.

    python -m benchmarks.peft_suite FOLDER [arguments of pytest]

FOLDER is a checkout or an unpacked sdist of the installed version of PEFT; its tests are copied to
a temporary folder. Without arguments, the tests with "lora" in their names run. The exit status is
1 if an outcome differs, and 2 if no test passes. PEFT's tests import other packages, such as
diffusers: files that cannot be imported are listed.

In the second run, every `PeftModel` is accelerated when it is made and when it gets an adapter. In
both runs, this module is also the pytest plugin that records the outcomes.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

_OUTCOMES = "PEFT_SUITE_OUTCOMES"  # the file that the plugin writes
_ACCELERATED = "PEFT_SUITE_ACCELERATED"
_LORA = ("-k", "lora", "tests")
_METHODS = ("__init__", "add_adapter", "load_adapter")  # every way to make one calls these


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print("give the folder of PEFT: make peft-suite PEFT=<checkout or unpacked sdist>")
        return 2
    source, options = Path(arguments[0]), list(arguments[1:]) or list(_LORA)
    if not (source / "tests").is_dir():
        print(f"{source} has no folder 'tests': give a checkout or an unpacked sdist of PEFT")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "peft"
        shutil.copytree(source / "tests", copy / "tests")
        (copy / "tests" / "__init__.py").touch()  # missing in the sdist
        shutil.copy(source / "pyproject.toml", copy)  # for pytest's markers
        plain, fused = (_run(copy, options, accelerated) for accelerated in (False, True))
    return report(plain, fused)


def report(plain: dict[str, list[str]], fused: dict[str, list[str]]) -> int:
    """Prints the numbers of outcomes and all differences; returns the exit status."""
    for name, outcomes in (("plain", plain), ("accelerated", fused)):
        counts = Counter(outcome for outcome, _ in outcomes.values())
        print(f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items()))}")
    missing = ["not run", ""]
    different = 0
    for test in [*plain, *(test for test in fused if test not in plain)]:
        (before, old), (after, new) = plain.get(test, missing), fused.get(test, missing)
        if before != after:
            different += 1
            print(f"{test}: {before} -> {after}  {new or old}")
    for file, (outcome, error) in plain.items():
        if outcome == "failed" and "::" not in file:
            print(f"{file} cannot be imported: {error}")
    print(f"{different} of {len(plain)} outcomes differ")
    if different:
        return 1
    return 0 if any(outcome == "passed" for outcome, _ in plain.values()) else 2


def _run(folder: Path, options: Sequence[str], accelerated: bool) -> dict[str, list[str]]:
    """{test: [outcome, last line of its error]}."""
    outcomes = folder / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    environment |= {_OUTCOMES: str(outcomes), _ACCELERATED: "1" if accelerated else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_suite", "-p", "no:benchmark"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=no", "-rN"]
    command += ["-o", "addopts="]  # coverage
    print("accelerated:" if accelerated else "plain:", *command[1:], *options, flush=True)
    subprocess.run([*command, *options], cwd=folder, env=environment, check=False)
    return json.loads(outcomes.read_text()) if outcomes.exists() else {}


class Plugin:
    """Records the outcomes of all tests."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._outcomes: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for setup, call and teardown: the first that does not pass is recorded."""
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        if self._outcomes.get(report.nodeid, ("passed", ""))[0] == "passed":
            self._outcomes[report.nodeid] = (outcome, _last_line(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that cannot be imported as an outcome too."""
        if not report.passed:
            self._outcomes[report.nodeid] = (report.outcome, _last_line(report))

    def pytest_sessionfinish(self) -> None:
        """Writes the file."""
        self._file.write_text(json.dumps(self._outcomes))


def pytest_configure(config: pytest.Config) -> None:
    """Called in both runs, in which this module is a plugin."""
    config.pluginmanager.register(Plugin(Path(os.environ[_OUTCOMES])))
    if os.environ[_ACCELERATED]:
        import peft

        for name in _METHODS:
            setattr(peft.PeftModel, name, _accelerating(getattr(peft.PeftModel, name)))


def _accelerating(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `PeftModel` that then also accelerates the model, if its adapter is LoRA."""
    from lora_kernels.peft import accelerate

    @functools.wraps(method)
    def call(model: Any, *args: Any, **options: Any) -> Any:
        result = method(model, *args, **options)
        with suppress(TypeError):  # a method other than LoRA
            accelerate(model)
        return result

    return call


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The message of an error or the reason of a skip, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    else:
        text = crash.message if crash else report.longreprtext
    return " ".join(text.split())[-200:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
