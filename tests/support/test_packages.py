"""Tests are skipped for packages that are not installed, and for nothing else."""

from __future__ import annotations

import pytest

from . import packages
from .packages import skipped_without_packages

MESSAGES = [
    "No module named 'peft'",
    "No module named 'peft.tuners.lora'",
    "rank 1:\nTraceback ...\nModuleNotFoundError: No module named 'peft'\n",
    "lora_kernels.peft needs the package peft: pip install 'lora-kernels[ecosystem]'",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_missing_package_skips(message, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="installs: peft"), skipped_without_packages():
        raise AssertionError(message)


@pytest.mark.parametrize("message", [*MESSAGES, "No module named 'torch'", "peft is wrong"])
def test_other_failures_fail(message, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    with pytest.raises(AssertionError), skipped_without_packages():
        raise AssertionError(message)


def test_a_module_of_this_package_is_no_missing_package(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError), skipped_without_packages():
        raise ModuleNotFoundError("No module named 'lora_kernels.nothing'")
