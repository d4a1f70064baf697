"""The scripts of `examples.distributed`, as torchrun would start them, on the CPU."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lora_kernels import LoRAConfig, add_lora, save_adapter

from ..support import ROOT
from ..support.exhaustive import EXHAUSTIVE
from ..support.packages import needs_safetensors, needs_trainer, needs_transformers
from ..support.ranks import needs_ranks, on_ranks
from ..support.tiny_models import llama
from ..support.zero3 import with_deepspeed

pytestmark = [
    needs_ranks,
    needs_safetensors,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the scripts would take the GPUs"),
]
LOSS = re.compile(r"^step \d+: loss (\S+)$", re.MULTILINE)
LOGGED = re.compile(r"'loss': '([\d.]+)'")
DIFFERENCE = re.compile(r"difference of a logit (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory) -> None:
    """Imports, in the process that is forked, what the first calls import."""
    for name in ("fsdp", "tensor", "tensor.parallel", "checkpoint"):
        import_module(f"torch.distributed.{name}")
    if find_spec("transformers"):
        import_module("transformers.models.auto.modeling_auto")
        model = llama()
        add_lora(model, LoRAConfig(r=2), progress=False)
        save_adapter(model, tmp_path_factory.mktemp("imported"))


def output(
    world: int, main: Callable[[list[str]], None], *argv: str, before: Callable = lambda: None
) -> str:
    """What the first of `world` processes prints; the others leave this to it."""

    def work(rank: int) -> str:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        before()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(list(argv))
        return printed.getvalue()

    first, *others = on_ranks(world, work)
    said = ("adapter 'default'", "loss", "saved to")
    assert not any(text in other for other in others for text in said)
    return first


def losses(text: str, pattern: re.Pattern[str] = LOSS) -> list[float]:
    return [float(loss) for loss in pattern.findall(text)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def check_same_run(
    main: Callable[[list[str]], None], folder: Path, *layouts: tuple[str, ...]
) -> list[str]:
    """Two processes in each layout print the losses of one, and save its factors. Returns what the
    two print.
    """
    alone = output(1, main, "--out", str(folder / "alone"))
    texts = []
    for index, layout in enumerate(layouts):
        out = folder / str(index)
        text = output(2, main, *layout, "--out", str(out))
        texts.append(text)
        assert losses(text) == pytest.approx(losses(alone), abs=2e-4)
        assert len(losses(text)) == 3
        found, expected = tensors(out), tensors(folder / "alone")
        assert found.keys() == expected.keys()
        assert max(float((found[n] - expected[n]).abs().max()) for n in expected) < 1e-4
        assert float(DIFFERENCE.search(text)[1]) < 1e-5
        assert f"saved to {out}" in text
    return texts


@needs_transformers
def test_fsdp2(tmp_path):
    from examples.distributed.fsdp2 import main

    fsdp, tp = check_same_run(main, tmp_path, (), ("--tp", "2"))
    assert "mlp.down_proj [32, 48] in 2 parts by rows" in fsdp
    assert "mlp.down_proj [32, 48] in 2 parts by columns" in tp


def test_from_meta(tmp_path):
    from examples.distributed.from_meta import main

    (text,) = check_same_run(main, tmp_path, ())
    assert "blocks.*.qkv [96, 32] in 2 parts by rows" in text


def forget_accelerate() -> None:
    """accelerate keeps what it found in the process that was forked."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@needs_trainer
def test_trainer(tmp_path):
    from examples.distributed.trainer import main

    alone = output(1, main, "--out", str(tmp_path / "1"), "--batch", "8", before=forget_accelerate)
    text = output(2, main, "--out", str(tmp_path / "2"), before=forget_accelerate)
    assert len(losses(text, LOGGED)) == 3
    assert losses(text, LOGGED) == pytest.approx(losses(alone, LOGGED), abs=2e-3)
    assert tensors(tmp_path / "1").keys() == tensors(tmp_path / "2").keys()


@needs_trainer
def test_trainer_with_zero3(tmp_path):
    """The losses of DDP."""
    deepspeed = with_deepspeed()
    from examples.distributed.trainer import main

    ddp = output(2, main, "--out", str(tmp_path / "ddp"), before=forget_accelerate)
    zero3 = str(ROOT / "examples/distributed/zero3.json")
    out = ("--out", str(tmp_path / "zero3"))

    def before() -> None:
        forget_accelerate()
        deepspeed.init_distributed("gloo")

    text = output(2, main, "--deepspeed", zero3, *out, before=before)
    assert losses(text, LOGGED) == pytest.approx(losses(ddp, LOGGED), abs=2e-3)
    found, expected = tensors(tmp_path / "zero3"), tensors(tmp_path / "ddp")
    assert max(float((found[n] - expected[n]).abs().max()) for n in expected) < 1e-4


@needs_trainer
def test_trainer_takes_fsdp_on_gpus_only(tmp_path, monkeypatch, capsys):
    from examples.distributed import trainer

    with pytest.raises(SystemExit):
        trainer.parse(["--fsdp"])
    assert "--fsdp needs GPUs" in capsys.readouterr().err
    options = trainer.parse(["--out", str(tmp_path)])
    options.fsdp = True

    def plugin(rank: int) -> dict[str, object]:
        forget_accelerate()
        return trainer.arguments(options).fsdp_plugin_args

    (wanted,) = on_ranks(1, plugin)
    assert wanted["fsdp_version"] == 2 and wanted["cpu_ram_efficient_loading"]


@pytest.mark.skipif(not EXHAUSTIVE, reason="new processes take long to import everything")
@needs_trainer
@pytest.mark.parametrize("name", ["fsdp2", "from_meta", "trainer"])
def test_torchrun(name, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", f"examples.distributed.{name}", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"saved to {tmp_path}" in run.stdout
    assert len(tensors(tmp_path)) > 0


def test_a_batch_that_cannot_be_cut():
    from examples.distributed.common import batches

    with pytest.raises(ValueError, match="8 rows cannot be cut into 3 parts: change --batch"):
        next(batches(1, 8, 96, 0, 3))
