"""`lora-kernels env`: what it prints, also where packages are missing or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import lora_kernels
from lora_kernels.cli import env, main

from ..support import ROOT


def printed(capsys, *options: str) -> str:
    assert main(["env", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_text_and_json_have_the_same_facts(capsys):
    text = printed(capsys)
    facts = json.loads(printed(capsys, "--json"))
    assert list(facts) == ["lora_kernels", "torch", "system", "gpus", "packages", "environment"]
    lines = text.splitlines()
    for section, values in facts.items():
        assert any(line.startswith(f"{section}:") for line in lines)
        for name, value in values.items():
            assert f"  {name}: {env._in_words(value)}" in lines
    assert not any(line != line.rstrip() or "\t" in line for line in lines)  # pastes well


def test_facts(capsys):
    facts = json.loads(printed(capsys, "--json"))
    own, ops = facts["lora_kernels"], lora_kernels.ops
    assert own["version"] == lora_kernels.__version__
    assert own["instruction_set"] == ops.cpu_capability()
    assert own["supported"] == ops.cpu_capabilities()
    assert bool(own["compiled_kernels"]) == bool(own["supported"]) == ("reason" not in own)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["packages"]["numpy"] == metadata.version("numpy")


def test_only_relevant_variables(monkeypatch, capsys):
    for name in ("LORA_KERNELS_TUNE", "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "HF_TOKEN"):
        monkeypatch.setenv(name, f"value of {name}")
    text = printed(capsys)
    assert "  LORA_KERNELS_TUNE: value of LORA_KERNELS_TUNE" in text
    assert "  ATEN_CPU_CAPABILITY: value of ATEN_CPU_CAPABILITY" in text
    assert "  CUDA_VISIBLE_DEVICES: value of CUDA_VISIBLE_DEVICES" in text
    assert "HF_TOKEN" not in text


def test_packages_are_not_imported(tmp_path):
    """All of them raise an error when they are imported."""
    names = ("transformers", "peft", "accelerate", "trl", "bitsandbytes", "torchao")
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels.cli", "env", "--json"],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(names) <= json.loads(done.stdout)["packages"].keys()


@pytest.mark.parametrize(
    ("module", "information", "version"),
    [
        (True, "Version: 1.2", "1.2"),
        (False, "Version: 1.2", "1.2, but the package is not found"),
        (True, None, "found, without metadata"),
        (False, None, None),
    ],
)
def test_package_version(module, information, version, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if module:
        (tmp_path / "some_package.py").write_text("raise SystemExit('imported')")
    if information:
        (tmp_path / "some_package-1.2.dist-info").mkdir()
        (tmp_path / "some_package-1.2.dist-info" / "METADATA").write_text(f"{information}\n")
    assert env._package_version("some_package") == version


def test_broken_metadata(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_package-1.2.dist-info").mkdir()
    (tmp_path / "some_package-1.2.dist-info" / "METADATA").write_text("Name: some_package\n")
    assert "broken metadata" in str(env._package_version("some_package"))


def test_gpus(monkeypatch):
    gpu = SimpleNamespace(name="A GPU", total_memory=141 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: gpu)
    assert env._gpus() == {"0": "A GPU, 141.0 GiB, 9.0", "1": "A GPU, 141.0 GiB, 9.0"}

    def fails(k: int) -> None:
        raise RuntimeError("the driver is\ntoo old")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    assert env._gpus() == {"error": "the driver is too old"}


@pytest.mark.parametrize(
    ("value", "words"),
    [(True, "yes"), (False, "no"), (None, "none"), (1, "1"), (0, "0"), ([], "none"), ("x", "x")],
)
def test_words(value, words):
    assert env._in_words(value) == words


def test_without_the_extension(monkeypatch, capsys):
    monkeypatch.setattr(env.kernels, "extension", None)
    monkeypatch.setattr(env.kernels, "missing", "built for torch 2.99")
    own = json.loads(printed(capsys, "--json"))["lora_kernels"]
    assert own["reason"] == "built for torch 2.99" and own["compiled_kernels"] is None
    assert own["instruction_set"] == "reference" and "built_for_torch" not in own
