"""The scripts of `examples`, by the commands that their docstrings give."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from ..support import ROOT
from ..support.exhaustive import EXHAUSTIVE
from ..support.packages import (
    needs_bitsandbytes,
    needs_peft,
    needs_real_model,
    needs_safetensors,
    needs_trainer,
    needs_transformers,
    needs_trl,
)

pytestmark = [
    needs_safetensors,
    needs_transformers,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the scripts would take the GPUs"),
]
LOSS = re.compile(r"^step \d+: loss (\S+)$", re.MULTILINE)
LOGGED = re.compile(r"'loss': '?([\d.]+)")
FROM = re.compile(r"(\w[\w ]*): (\S+) from the (?:original|trained) model$", re.MULTILINE)
DIFFERENCE = re.compile(r"largest difference(?: of a logit)? (\S+)$", re.MULTILINE)


def commands(script: str) -> list[list[str]]:
    """The arguments of each `python -m` in a script's docstring, after the module's name."""
    text = ast.get_docstring(ast.parse((ROOT / f"examples/{script}.py").read_text())) or ""
    start = ["python", "-m", f"examples.{script}"]
    found = [shlex.split(line) for line in text.splitlines() if line.startswith("    python ")]
    assert found and all(words[:3] == start for words in found), script
    return [words[3:] for words in found]


def run(script: str, arguments: list[str]) -> None:
    """As `python -m` does, but in this process, where the imports are done."""
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        runpy.run_module(f"examples.{script}", run_name="__main__")
    finally:
        sys.argv = before


def check_losses(text: str, pattern: re.Pattern[str] = LOSS, least: int = 4) -> list[float]:
    losses = [float(loss) for loss in pattern.findall(text)]
    assert len(losses) >= least and losses[-1] < losses[0], text
    return losses


def check_loop(text: str) -> None:
    """Of the scripts with a loop of their own, and a model that has loaded the adapter."""
    check_losses(text)
    differences = [float(value) for _, value in FROM.findall(text)]
    differences += [float(value) for value in DIFFERENCE.findall(text)]
    assert differences and max(differences) < 1e-4, text


def check_trainer(text: str) -> None:
    """The first command trains 4 steps, the second one 4 more."""
    assert len(check_losses(text, LOGGED)) == 8
    assert text.count("saved to out/adapter") == 2


def check_sft(text: str) -> None:
    check_losses(text, LOGGED)
    assert "saved to out/adapter" in text


def check_dpo(text: str) -> None:
    assert "LoRAM start of adapter 'default'" in text
    assert check_losses(text, LOGGED)[0] == pytest.approx(0.6931, abs=1e-3)


def check_peft_bridge(text: str) -> None:
    check_loop(text)
    assert "fused forward in 14 of 14 LoRA layers" in text
    assert [name for name, _ in FROM.findall(text)] == [
        "started", "disabled", "loaded by plain PEFT"
    ]  # fmt: skip


def check_qlora(text: str) -> None:
    check_losses(text, LOGGED)
    assert float(DIFFERENCE.search(text)[1]) < 1e-4


def check_experts(text: str) -> None:
    check_loop(text)
    assert "experts.gate_up_proj" in text


def check_streaming(text: str) -> None:
    """Both ways give a model as it was trained; the second one overwrites the first."""
    merged = [float(value) for _, value in FROM.findall(text)]
    assert len(merged) == 2 and max(merged) < 1e-4
    assert text.count("$ lora-kernels") == 3


def check_diffusers(text: str) -> None:
    check_loop(text)
    assert "saved to out/adapter/pytorch_lora_weights.safetensors" in text


def check_lightning(text: str) -> None:
    check_loop(text)
    assert "out/checkpoints/adapter-5" in text and "out/checkpoints/adapter-10" in text


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


# What each script prints, and what it needs.
SCRIPTS: dict[str, tuple[Callable[[str], None], tuple[pytest.MarkDecorator, ...]]] = {
    "plain_loop": (check_loop, ()),
    "trainer": (check_trainer, (needs_trainer,)),
    "trl_sft": (check_sft, (needs_trl,)),
    "trl_dpo": (check_dpo, (needs_trl,)),
    "peft_bridge": (check_peft_bridge, (needs_peft,)),
    "qlora": (check_qlora, (needs_bitsandbytes, needs_trainer)),
    "experts": (check_experts, (needs_peft,)),
    "streaming": (check_streaming, (needs_peft,)),
    "custom_start": (check_loop, ()),
    "diffusers_lora": (check_diffusers, (needs("diffusers"), needs_peft)),
    "lightning_callback": (check_lightning, (needs("lightning"),)),
}


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=marks) for name, (_, marks) in SCRIPTS.items()]
)
def test_script(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_kernels.init.base._REGISTRY", dict(registry()))
    for arguments in commands(script):
        if script == "plain_loop" and "--tiny" not in arguments:
            continue  # `test_real_model`
        run(script, arguments)
    SCRIPTS[script][0](capsys.readouterr().out)


def registry() -> dict[str, object]:
    from lora_kernels.init import base

    return base._REGISTRY


@needs_peft
@pytest.mark.skipif(not EXHAUSTIVE, reason="a new process takes long to import everything")
def test_in_a_new_process(tmp_path):
    command = [sys.executable, "-m", "examples.peft_bridge"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    check_peft_bridge(done.stdout)


@needs_real_model
@pytest.mark.skipif(not EXHAUSTIVE, reason="trains a model of 135 million parameters")
def test_real_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("plain_loop", [])
    check_loop(capsys.readouterr().out)


def test_every_script_is_run():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert {name for name in scripts if not name.startswith("_")} == set(SCRIPTS)


def test_every_script_is_listed():
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    folder = ROOT / "examples"
    linked = set(re.findall(r"\]\(([\w./]+)\)", text))
    assert linked >= {*map("{}.py".format, SCRIPTS), "axolotl.yml"}
    assert all((folder / link).exists() for link in linked)
