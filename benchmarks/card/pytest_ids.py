"""A pytest plugin that records every test that begins, ends or fails, in case the run is killed.

Use `-p benchmarks.card.pytest_ids`, with the path of the file to write in CARD_IDS.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def note(event: str, test: str) -> None:
    """Append one line to the file at once."""
    if path := os.environ.get("CARD_IDS"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{event}\t{test}\n")


class Notes:
    """Registered only in the process that collects the reports of all workers."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        note("begin", nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        note("end", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            note("failed", report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            note("failed", report.nodeid)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Notes())
