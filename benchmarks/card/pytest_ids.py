"""A plugin that writes down every test as it begins, ends and fails, so that a run that is killed
leaves their names: `-p benchmarks.card.pytest_ids`, and the file's path in CARD_IDS.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def note(event: str, test: str) -> None:
    """One line, in the file as soon as it is known."""
    if path := os.environ.get("CARD_IDS"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{event}\t{test}\n")


class Notes:
    """Of the process that collects the reports: the workers' own are not written twice."""

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
