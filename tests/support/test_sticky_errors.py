"""A test that breaks its device fails alone: the following tests run in another process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import ROOT

CONFTEST = """
import pytest
from tests.support.sticky_errors import end_if_broken

class Device:  # a stand-in: an illegal address stays, a wrong launch is reported once
    error, stays = None, False

    def synchronize(self):
        if self.error:
            said, self.error = self.error, self.error if self.stays else None
            raise RuntimeError(said)

DEVICE = Device()

@pytest.fixture(autouse=True)
def _device_stays_usable(request):
    yield
    end_if_broken(request.config, request.node.nodeid, DEVICE.synchronize)

@pytest.fixture
def broken():
    def set_error(text, stays):
        DEVICE.error, DEVICE.stays = text, stays
    return set_error
"""
TESTS = """
def test_before(): pass
def test_wrong_launch(broken): broken("CUDA error: invalid configuration", False)
def test_between(): pass
def test_breaks(broken): broken("CUDA error: an illegal memory access", True)
def test_after(): pass
def test_last(): pass
"""


def run(folder: Path, *options: str) -> str:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_device.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rA", "-c", os.devnull, "--rootdir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command += ["-p", "no:cacheprovider", *options, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="pytest-xdist is not installed")
def test_under_xdist_another_worker_goes_on(tmp_path):
    output = run(tmp_path, "-p", "xdist.plugin", "-n", "1")
    for name in ("before", "between", "breaks", "after", "last"):
        assert f"PASSED test_device.py::test_{name}" in output
    assert "crashed while running 'test_device.py::test_breaks'" in output
    assert "ERROR test_device.py::test_wrong_launch" in output


def test_alone_the_run_stops_and_names_the_test(tmp_path):
    output = run(tmp_path)
    assert "ERROR test_device.py::test_wrong_launch" in output
    assert "PASSED test_device.py::test_between" in output
    assert "test_device.py::test_breaks left the device unusable: CUDA error: an illegal" in output
    assert "test_after" not in output
