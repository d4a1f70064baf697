"""`init` and `merge` on several processes: who prints, errors of one line, and torchrun itself."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_kernels._utils.model_files import JOURNAL_FOLDER, is_unfinished
from lora_kernels.cli import main
from lora_kernels.files.checkpoint.folder import ModelFolder
from lora_kernels.files.io.journal import Ranks

from ..files.checkpoint.folders import fingerprint, read_file, write_file
from ..files.checkpoint.processes import on_ranks
from ..support import ROOT
from ..support.exhaustive import EXHAUSTIVE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def on_command_ranks(world: int, folder: Path, *arguments: object) -> list[tuple[int, str, str]]:
    """The exit status and what is printed of a command on each rank, as torchrun starts it."""

    def work(ranks: Ranks) -> None:
        os.environ |= {"RANK": str(ranks.rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_RANK": str(ranks.rank), "LOCAL_WORLD_SIZE": str(world)}
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        for name, text in (("code", str(code)), ("out", out.getvalue()), ("err", err.getvalue())):
            (folder / f"{ranks.rank}.{name}").write_text(text)

    _ = ModelFolder(Path(str(arguments[1]))).architecture  # imports transformers before the fork
    ends = on_ranks(world, work, folder)
    assert not any(end.killed or end.type for end in ends), ends
    read = [
        [(folder / f"{k}.{n}").read_text() for n in ("code", "out", "err")] for k in range(world)
    ]
    return [(int(code), out, err) for code, out, err in read]


def test_only_rank_0_prints(odd_model, tmp_path):
    (tmp_path / "ends").mkdir()
    out, trained = tmp_path / "out", tmp_path / "trained"
    arguments = ("init", odd_model, out, "-r", 4, "--residual", "implicit")
    first, *others = on_command_ranks(2, tmp_path / "ends", *arguments)
    assert first[0] == 0 and "9 layers start with loram, r = 4" in first[1] and first[2] == ""
    assert others == [(0, "", "")]
    out.rename(trained)
    arguments = ("merge", odd_model, trained, out, "--dtype", "float32")
    first, *others = on_command_ranks(2, tmp_path / "ends", *arguments)
    assert first[0] == 0 and f"{out}: 9 layers merged" in first[1] and first[2] == ""
    assert others == [(0, "", "")]


def test_an_error_of_one_rank_is_a_line_on_each(odd_model, tmp_path):
    (tmp_path / "ends").mkdir()
    file = odd_model / "part-2-of-3.safetensors"
    tensors, header = read_file(file)
    name = "model.layers.1.q_proj.weight"
    dtype, shape, content = tensors[name]
    tensors[name] = dtype, shape, b"\xff" * len(content)
    write_file(file, tensors, header["__metadata__"])
    arguments = ("init", odd_model, tmp_path / "out", "-r", 4)
    ended = on_command_ranks(3, tmp_path / "ends", *arguments)
    assert len(set(ended)) == 1
    code, out, err = ended[0]
    assert (code, out) == (1, "") and err.startswith(f"lora-kernels init: {name}: ")
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments,match",
    [(["-r", "99"], "rank 99 is larger"), (["--device", "cuda:99"], "'cuda:99' cannot be used")],
)
def test_wrong_arguments_do_not_wait(arguments, match, odd_model, tmp_path):
    (tmp_path / "ends").mkdir()
    ended = on_command_ranks(2, tmp_path / "ends", "init", odd_model, tmp_path / "out", *arguments)
    assert len(set(ended)) == 1
    assert ended[0][0] == 1 and match in ended[0][2] and not (tmp_path / "out").exists()


def test_an_environment_that_makes_no_sense(odd_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    for arguments in (["init", odd_model], ["merge", odd_model, odd_model]):
        assert main([*map(str, arguments), str(tmp_path / "out")]) == 1
        assert "unset WORLD_SIZE for one process" in capsys.readouterr().err


def test_help_names_torchrun(capsys):
    for command in ("init", "merge"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert f"torchrun --nproc-per-node 8 -m lora_kernels.cli {command} " in text
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.skipif(not EXHAUSTIVE, reason="starts a dozen interpreters")
def test_torchrun_continues_killed_processes(odd_model, tmp_path):
    """Two processes with torchrun's variables are killed; torchrun repeats them with three."""
    out = tmp_path / "out"
    command = ["-m", "lora_kernels.cli", "init", str(odd_model), str(out), "-r", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment}
    subprocess.run([sys.executable, *command], **options, check=True)
    expected = fingerprint(out)
    out.rename(tmp_path / "alone")
    for delay in (0.0, 0.05, 0.1):
        ranks = []
        for rank in range(2):
            variables = {"RANK": str(rank), "WORLD_SIZE": "2"}
            started = {"cwd": ROOT, "env": environment | variables}
            ranks.append(subprocess.Popen([sys.executable, *command], **started))
        while not (out / JOURNAL_FOLDER / "ranks" / "plan").exists() and ranks[0].poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        for process in ranks:
            process.kill()
            process.wait()
        if out.exists() and not is_unfinished(out):
            out.rename(tmp_path / f"complete-{delay}")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run([*run, *command], **options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 layers start with loram") == 1
    assert fingerprint(out) == expected
