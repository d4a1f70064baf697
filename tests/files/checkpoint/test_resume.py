"""Runs that are killed, repeated, repeated with other arguments, or concurrent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels._utils.model_files import JOURNAL_FOLDER, is_unfinished
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.files.checkpoint.initialize import job as module
from lora_kernels.files.io.journal import JournaledFolder
from lora_kernels.model.config import LoRAConfig

from ...support import ROOT
from ...support.exhaustive import EXHAUSTIVE
from .conftest import odd_shards
from .folders import fingerprint, read_file, write_file, write_model

CONFIG = LoRAConfig(r=4)


def stop_after(shards: int, monkeypatch) -> None:
    """Simulates a kill after this number of finished shards."""
    finish = JournaledFolder.finish

    def stopping(self, name, record, in_place=True):
        if len(self.finished) == shards:
            raise KeyboardInterrupt
        finish(self, name, record, in_place)

    monkeypatch.setattr(JournaledFolder, "finish", stopping)


@pytest.fixture
def unfinished(odd_model, tmp_path, monkeypatch) -> Path:
    """The folder of a run that was stopped with one of three shards finished."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        initialize(odd_model, tmp_path / "out", CONFIG)
    assert is_unfinished(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_many_kills(tmp_path):
    """After kill -9 at random moments all files are complete; repeated, the bytes are the same."""
    shards = odd_shards(dtypes=("F32", "BF16", "F16") * 5)
    write_model(tmp_path / "model", shards)
    command = [
        sys.executable,
        "-m",
        "tests.files.checkpoint.killed",
        str(tmp_path),
        "100" if EXHAUSTIVE else "15",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    # Kills hit runs in all states; how often depends on what else the machine does.
    assert min(counts["between"], counts["completed"], counts["kept"]) > 0
    assert counts["before"] > 0 or not EXHAUSTIVE


def test_only_what_is_left_is_done(unfinished, odd_model, tmp_path):
    initialize(odd_model, tmp_path / "other", CONFIG)
    done = initialize(odd_model, unfinished, CONFIG)
    assert done.resumed > 0 and done.size > 0 and done.layers == 9
    assert not is_unfinished(unfinished)
    got, want = fingerprint(unfinished), fingerprint(tmp_path / "other")
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        del got[name], want[name]  # they name the folder
    assert got == want


@pytest.mark.parametrize("what", ["half a line", "nothing", "a lost shard", "a shard's half"])
def test_damage(what, unfinished, odd_model):
    """What a kill can leave, and files that were removed."""
    journal = unfinished / JOURNAL_FOLDER / "journal.jsonl"
    shard = next(unfinished.glob("*.safetensors"))
    if what == "half a line":
        journal.write_bytes(journal.read_bytes() + b'{"finished": "part-')
    elif what == "nothing":
        journal.write_bytes(b"")
    elif what == "a lost shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:100])
    done = initialize(odd_model, unfinished, CONFIG)
    assert (done.resumed > 0) == (what == "half a line")
    assert done.layers == 9 and not is_unfinished(unfinished)
    for file in odd_model.glob("*.safetensors"):
        assert list(read_file(unfinished / file.name)[0]) == list(read_file(file)[0])


def test_other_arguments(unfinished, odd_model):
    with pytest.raises(FileExistsError, match=r"differs in r \(4, now 5\): repeat it as it was"):
        initialize(odd_model, unfinished, LoRAConfig(r=5))
    done = initialize(odd_model, unfinished, LoRAConfig(r=5), overwrite=True)
    assert done.resumed == 0
    values = json.loads((unfinished / "adapter" / "adapter_config.json").read_text())
    assert values["r"] == 5


def test_changed_input(unfinished, odd_model):
    file = odd_model / "part-2-of-3.safetensors"
    tensors, header = read_file(file)
    write_file(file, tensors, header["__metadata__"])
    with pytest.raises(FileExistsError, match=r"its input: part-2-of-3\.safetensors changed"):
        initialize(odd_model, unfinished, CONFIG)


def test_system_went_down(unfinished, odd_model):
    """The disk may lack what was written: nothing of it is used."""
    journal = unfinished / JOURNAL_FOLDER / "journal.jsonl"
    first, *rest = journal.read_text().splitlines()
    first = json.dumps(json.loads(first) | {"boot": "another"})
    journal.write_text("\n".join([first, *rest, ""]))
    assert initialize(odd_model, unfinished, CONFIG).resumed == 0


def test_journal_is_damaged(unfinished, odd_model, tmp_path):
    """As after a crash of the system: blocks that were never written are zeros."""
    journal = unfinished / JOURNAL_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + bytes(100) + b"\n")
    assert initialize(odd_model, unfinished, CONFIG).resumed == 0
    assert not is_unfinished(unfinished)


def test_journal_is_written_in_parts(odd_model, tmp_path, monkeypatch):
    """As on a nearly full disk, where a call writes only a part."""
    out, write = tmp_path / "out", os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:7]))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        initialize(odd_model, out, CONFIG)
    assert initialize(odd_model, out, CONFIG).resumed > 0


def test_completed_but_for_the_journal(odd_model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rmdir", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        initialize(odd_model, out, CONFIG)
    before = fingerprint(out)
    assert is_unfinished(out) and (out / "config.json").is_file()
    assert initialize(odd_model, out, CONFIG).size == 0
    left = {k: v for k, v in before.items() if not k.startswith(JOURNAL_FOLDER)}
    assert fingerprint(out) == left and not is_unfinished(out)


def test_not_a_model_until_complete(unfinished):
    from lora_kernels.files.checkpoint.weights import stored_weights

    for name in ("config.json", "model.safetensors.index.json", "adapter"):
        assert not (unfinished / name).exists()
    with pytest.raises(ValueError, match="is unfinished: repeat the command"):
        stored_weights(unfinished)


def test_two_at_once(odd_model, tmp_path):
    out = tmp_path / "out"
    with (
        JournaledFolder(out, {}, {}),
        pytest.raises(BlockingIOError, match="another process is writing"),
    ):
        initialize(odd_model, out, CONFIG)


def test_folder_with_something_in_it(odd_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        initialize(odd_model, out, CONFIG)
    with pytest.raises(FileExistsError, match="is a file"):
        initialize(odd_model, out / "mine.txt", CONFIG)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_overwrite(odd_model, tmp_path):
    """The old model is removed, other files stay."""
    out = tmp_path / "out"
    write_model(out, odd_shards(seed=5, dtypes=("F32",)), index=False)
    (out / "mine.txt").write_text("mine")
    initialize(odd_model, out, CONFIG, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    assert sorted(p.name for p in out.glob("*.safetensors")) == [
        f"part-{k}-of-3.safetensors" for k in (1, 2, 3)
    ]


def test_full_disk_is_resumed(odd_model, tmp_path, monkeypatch):
    """After an error that is not in the weights, finished shards stay."""
    out = tmp_path / "out"
    pwrite = os.pwrite

    def failing(descriptor, content, position):
        if "part-3" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, content, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(OSError, match=r"No space left on device: .*part-3"):
            initialize(odd_model, out, CONFIG)
    assert is_unfinished(out)
    assert initialize(odd_model, out, CONFIG).layers == 9


def test_sync(odd_model, tmp_path, monkeypatch):
    """All other files have reached the disk before the last one is written."""
    synced: list[str] = []
    fsync, out = os.fsync, tmp_path / "out"

    def noted(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not (out / "config.json").exists():
            synced.append(path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    initialize(odd_model, out, CONFIG, sync=True)
    shards = {f"part-{k}-of-3.safetensors" for k in (1, 2, 3)}
    assert shards | {"adapter_model.safetensors", "tokenizer.json"} <= set(synced)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")
def test_ctrl_c(odd_model, tmp_path, capsys, monkeypatch):
    from lora_kernels.cli import main

    monkeypatch.setattr(
        module, "rewrite", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["init", str(odd_model), str(tmp_path / "out"), "-r", "4"]) == 130
    assert capsys.readouterr().err == (
        "lora-kernels init: interrupted; repeat the same command to continue\n"
    )
