"""Adapters that replace each other: the old one or the new one, never a mixture."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from torch import nn

from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.files.adapter import folder as reading
from lora_kernels.files.adapter.content import NATIVE_FILE
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
from lora_kernels.files.io import replace

from ...support import ROOT
from ...support.adapters import assert_same, one_layer, peft_config

safetensors = pytest.importorskip("safetensors.torch")


class Killed(BaseException):
    pass


class TestReplacing:
    """The old one or the new one, never a mixture."""

    @pytest.fixture()
    def pair(self):
        return one_layer(init_lora_weights="loram")[0], one_layer(r=3, init_lora_weights="lora")[0]

    def test_other_files_stay(self, pair, tmp_path):
        folder = tmp_path / "out"
        write_adapter(folder, pair[0])
        (folder / "checkpoint-1").mkdir()
        for name in ("README.md", "optimizer.pt", "checkpoint-1/adapter_config.json"):
            (folder / name).write_text(name)
        for form in ("peft", "native", "peft"):
            for state in pair:
                write_adapter(folder, state, format=form)
                assert_same(read_adapter(folder), state)
                assert (folder / "checkpoint-1/adapter_config.json").exists()
                ours = {ADAPTER_CONFIG, NATIVE_FILE if form == "native" else ADAPTER_FILE}
                assert {p.name for p in folder.iterdir()} == ours | {
                    "README.md",
                    "optimizer.pt",
                    "checkpoint-1",
                }
        assert (folder / "README.md").read_text() == "README.md"
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("alone", [True, False], ids=["exchanged", "one by one"])
    def test_formats_replace_each_other(self, alone, pair, tmp_path):
        folder = tmp_path / "out"
        folder.mkdir()
        if not alone:
            (folder / "notes").write_text("mine")
        before = folder.stat().st_ino
        for form in ("peft", "native", "peft"):
            write_adapter(folder, pair[0], format=form)
            ours = {ADAPTER_CONFIG, NATIVE_FILE if form == "native" else ADAPTER_FILE}
            assert {p.name for p in folder.iterdir()} - {"notes"} == ours
        if not alone:
            assert folder.stat().st_ino == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_only_the_tensors_change(self, pair, tmp_path):
        """The usual case of repeated saves in training: one rename, in the same folder."""
        write_adapter(tmp_path, pair[0])
        config = (tmp_path / ADAPTER_CONFIG).stat()
        pair[0].layers["block.1.q"].lora_A.add_(1.0)
        write_adapter(tmp_path, pair[0])
        now = (tmp_path / ADAPTER_CONFIG).stat()
        assert (config.st_ino, config.st_mtime_ns) == (now.st_ino, now.st_mtime_ns)
        assert_same(read_adapter(tmp_path), pair[0])

    @pytest.mark.parametrize("form", ["peft", "native"])
    @pytest.mark.parametrize("step", range(1, 11))
    def test_stopped_at_every_step(self, step, form, pair, tmp_path, monkeypatch):
        """Where the folder cannot be exchanged: PEFT finds no configuration rather than one that
        is not of the tensors, and this package reads one of the two.
        """
        old, new = pair
        folder = tmp_path / "out"
        write_adapter(folder, old)
        (folder / "notes").write_text("mine")
        steps = 0

        def stopping(method):
            def call(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == step:
                    raise Killed
                return method(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for method in ("replace", "unlink"):
                patch.setattr(Path, method, stopping(getattr(Path, method)))
            patch.setattr(replace, "_discard", lambda *_: None)
            try:
                write_adapter(folder, new, format=form)
            except Killed:
                pass
            else:
                assert steps < step
        got = read_adapter(folder)
        assert got.config in (old.config, new.config)
        assert_same(got, old if got.config == old.config else new)
        if (folder / ADAPTER_CONFIG).exists() and peft_config(folder)["peft_type"] == "LORA":
            pytest.importorskip("peft").PeftConfig.from_pretrained(folder)
            r = peft_config(folder)["r"]
            stored = safetensors.load_file(folder / ADAPTER_FILE)
            assert stored["base_model.model.block.1.q.lora_A.weight"].shape[0] == r
        write_adapter(folder, new, format=form)  # clears what was left
        assert len(list(folder.iterdir())) == 3 and len(list(tmp_path.iterdir())) == 1
        assert_same(read_adapter(folder), new)

    def test_what_a_killed_process_left(self, pair, tmp_path):
        """Its incomplete files are removed; other files of the old folder are kept."""
        folder = tmp_path / "out"
        write_adapter(folder, pair[0])
        for parent, mark in ((folder, True), (tmp_path, True), (tmp_path, False)):
            stage = parent / f".out.saving-{mark}"
            stage.mkdir()
            for name in (ADAPTER_FILE, "half" if mark else "notes", *([".unfinished"] * mark)):
                (stage / name).write_text("x")
        write_adapter(folder, pair[1])
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        left = {p.name for p in folder.iterdir()}
        assert left == {ADAPTER_CONFIG, ADAPTER_FILE, "notes"}

    def test_modes(self, pair, tmp_path):
        """The tensors are as readable as the configuration; a folder keeps its mode."""
        (tmp_path / "out").mkdir(mode=0o750)
        for state in pair:
            write_adapter(tmp_path / "out", state)
            modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
            assert len(modes) == 1 and (tmp_path / "out").stat().st_mode & 0o777 == 0o750

    def test_a_stage_at_work_is_left_alone(self, pair, tmp_path):
        folder = tmp_path / "out"
        write_adapter(folder, pair[0])
        with replace._staged(folder, ()) as stage:
            write_adapter(folder, pair[1])
            assert stage.is_dir()
        assert not stage.exists()

    def test_disk_full(self, pair, tmp_path, monkeypatch):
        write_adapter(tmp_path, pair[0])

        def full(path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(replace, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            write_adapter(tmp_path, pair[1])
        assert_same(read_adapter(tmp_path), pair[0])
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize("forms", [("peft", "peft"), ("peft", "native"), ("native", "peft")])
    def test_read_while_it_is_replaced(self, forms, pair, tmp_path, monkeypatch):
        """A reader that has read the old configuration reads again."""
        write_adapter(tmp_path, pair[0], format=forms[0])
        load, replaced = reading.load_tensors, []

        def late(file):
            if not replaced:
                replaced.append(True)
                if forms[0] != forms[1]:  # which this reader has opened already
                    result = load(file)
                    write_adapter(tmp_path, pair[1], format=forms[1])
                    return result
                write_adapter(tmp_path, pair[1], format=forms[1])
            return load(file)

        monkeypatch.setattr(reading, "load_tensors", late)
        assert_same(read_adapter(tmp_path), pair[1])

    def test_symbolic_links_and_relative_paths(self, pair, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        for state in pair:
            write_adapter(tmp_path / "link", state)
        assert (tmp_path / "link").is_symlink()
        assert_same(read_adapter(tmp_path / "real"), pair[1])
        monkeypatch.chdir(tmp_path / "real")
        for state in pair:
            write_adapter(".", state)
            assert_same(read_adapter("."), state)  # the folder that we stand in is still there


class TestAtOnce:
    """Several savers of one folder: the last one wins, all return, and nothing stays behind."""

    @pytest.fixture()
    def pair(self):
        return one_layer()[0], one_layer(r=3, init_lora_weights="lora")[0]

    @pytest.mark.parametrize("name", ["mkdtemp", "wait_for_lock"])
    def test_a_stage_that_is_not_locked_yet(self, name, pair, tmp_path, monkeypatch):
        """Another saver takes it for that of a killed process: the first one makes a new one."""
        write_adapter(tmp_path / "out", pair[1])
        real, meanwhile = getattr(replace, name), threading.Event()
        stages = []

        def late(*args, **options):
            result = real(*args, **options) if name == "mkdtemp" else None
            if threading.current_thread() is first and list(tmp_path.glob("*.saving-*")):
                stages.extend(tmp_path.glob("*.saving-*"))
                if len(stages) == 1:
                    other.start()
                    assert meanwhile.wait(20)
            return result if name == "mkdtemp" else real(*args, **options)

        def save(state):
            write_adapter(tmp_path / "out", state)
            meanwhile.set()

        monkeypatch.setattr(replace, name, late)
        first = threading.Thread(target=save, args=(pair[0],))
        other = threading.Thread(target=save, args=(pair[1],))
        first.start()
        first.join(20)
        assert len(set(stages)) == 2  # the first one was removed
        assert_same(read_adapter(tmp_path / "out"), pair[0])
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("alone", [True, False], ids=["exchanged", "one by one"])
    def test_one_renames_after_the_other(self, alone, pair, tmp_path):
        folder = tmp_path / "out"
        write_adapter(folder, pair[0])
        if not alone:
            (folder / "notes").write_text("mine")
        saving = threading.Thread(target=write_adapter, args=(folder, pair[1]))
        with replace._locked(folder) as locked:
            assert locked
            saving.start()
            saving.join(0.1)
            assert saving.is_alive()
            assert_same(read_adapter(folder), pair[0])
        saving.join(20)
        assert_same(read_adapter(folder), pair[1])
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_a_file_system_without_locks(self, pair, tmp_path, monkeypatch):
        """Adapters are replaced all the same; no stage is taken for a killed process's."""
        for name in ("wait_for_lock", "try_lock"):
            monkeypatch.setattr(replace, name, lambda _: False)
        (tmp_path / ".out.saving-x").mkdir()
        for state in pair:
            write_adapter(tmp_path / "out", state)
            assert_same(read_adapter(tmp_path / "out"), state)
        assert {p.name for p in tmp_path.iterdir()} >= {"out", ".out.saving-x"}

    def test_stages_of_a_folder_with_a_similar_name(self, pair, tmp_path):
        """Each folder's lock protects its own stages only."""
        stage = tmp_path / ".out.saving-x.saving-abc"
        stage.mkdir()
        write_adapter(tmp_path / "out", pair[0])
        assert stage.is_dir()
        write_adapter(tmp_path / "out.saving-x", pair[0])
        assert not stage.exists()

    @pytest.mark.parametrize("kind", ["processes", "threads"])
    def test_many(self, kind, pair, memory_folder):
        """4 savers, 20 saves each, of two adapters by turns. Readers see one of the two, or none
        while files are renamed one by one.
        """
        for index, state in enumerate(pair):
            write_adapter(memory_folder / str(index), state)
        folders = [memory_folder / "made" / "alone", memory_folder / "made" / "shared"]
        folders[1].mkdir(parents=True)
        (folders[1] / "notes").write_text("mine")
        running, failed = RUNNING[kind]([*folders, memory_folder / "0", memory_folder / "1"])
        seen = [0, 0]
        while running():
            for folder in folders:
                try:
                    got = read_adapter(folder)
                except (OSError, RuntimeError):  # files come and go
                    continue
                index = 0 if got.config == pair[0].config else 1
                assert_same(got, pair[index])
                seen[index] += 1
        assert failed() == [] and min(seen) > 0
        assert sorted(p.name for p in folders[0].parent.iterdir()) == ["alone", "shared"]
        for folder, more in zip(folders, ([], ["notes"]), strict=True):
            got = read_adapter(folder)
            assert_same(got, pair[0 if got.config == pair[0].config else 1])
            names = sorted(p.name for p in folder.iterdir())
            assert names == [ADAPTER_CONFIG, ADAPTER_FILE, *more]


def save_by_turns(folders, states, turn: int) -> None:
    for number in range(turn, turn + 20):
        for folder in folders:
            write_adapter(folder, states[number % 2])


def saving_threads(folders):
    states = [read_adapter(folder) for folder in folders[2:]]
    errors = []

    def save(turn):
        try:
            save_by_turns(folders[:2], states, turn)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    return lambda: any(thread.is_alive() for thread in threads), lambda: errors


def saving_processes(folders):
    """Forked from a new process, since that of the tests has threads."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    code = f"""
import os, pathlib, sys
import torch
from lora_kernels.files.adapter.folder import read_adapter
from {__name__} import save_by_turns
torch.set_num_threads(1)
folders = [pathlib.Path(name) for name in sys.argv[1:]]
states = [read_adapter(folder) for folder in folders[2:]]
children = []
for turn in range(4):
    child = os.fork()
    if not child:
        save_by_turns(folders[:2], states, turn)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
    command = [sys.executable, "-c", code, *map(str, folders)]
    savers = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def failed():
        errors = savers.communicate()[1]
        return [errors] if savers.returncode else []

    return lambda: savers.poll() is None, failed


RUNNING = {"processes": saving_processes, "threads": saving_threads}


# Forks a saver for each line it reads: importing torch anew for each would take minutes.
SAVERS = """
import os, sys
import torch
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
torch.set_num_threads(1)
states = [read_adapter(folder) for folder in sys.argv[2:4]]

def say(text):  # in one write: both processes share the pipe
    os.write(1, f"{text}\\n".encode())

say("ready")
for line in sys.stdin:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        say("ended")
        continue
    say(os.getpid())
    turn = int(line)
    while True:
        write_adapter(sys.argv[1], states[turn % 2])
        if turn == int(line):
            say("saved")
        turn += 1
"""


@pytest.fixture()
def memory_folder(tmp_path):
    """A folder in memory if possible: kills are the same there, without a busy disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kills,alone", [(50, True), (15, False)], ids=["alone", "shared"])
def test_kill_9(kills, alone, memory_folder):
    """Savers that write two adapters over each other by turns, killed at a random moment: what is
    there is one of the two, to this package and to plain PEFT. In a folder with other files, which
    is not exchanged, PEFT may find no configuration.
    """
    peft = pytest.importorskip("peft")
    states = [
        one_layer(init_lora_weights="loram")[0],
        one_layer(r=3, lora_alpha=24, init_lora_weights="lora")[0],
    ]
    inner = nn.ModuleList([nn.Identity(), nn.ModuleDict({"q": nn.Linear(48, 40)})])
    base = nn.ModuleDict({"block": inner})
    want = []
    for index, state in enumerate(states):
        write_adapter(memory_folder / str(index), state)
        layer = state.layers["block.1.q"]
        right, left = layer.update_factors()
        want.append(layer.scaling * left @ right)
    folder = memory_folder / "out"
    folder.mkdir()
    if not alone:
        (folder / "notes").write_text("mine")
    command = [
        sys.executable,
        "-c",
        SAVERS,
        str(folder),
        str(memory_folder / "0"),
        str(memory_folder / "1"),
    ]
    generator = random.Random(0)
    seen = [0, 0]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as savers:
        assert savers.stdout.readline() == "ready\n"
        for turn in range(kills):
            print(turn, file=savers.stdin, flush=True)
            child = int(savers.stdout.readline())
            assert savers.stdout.readline() == "saved\n"
            time.sleep(generator.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert savers.stdout.readline() == "ended\n"
            got = read_adapter(folder)
            index = 0 if got.config == states[0].config else 1
            assert_same(got, states[index])
            seen[index] += 1
            if not alone and not (folder / ADAPTER_CONFIG).exists():
                continue
            adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
            delta = adapted.base_model.model.block[1]["q"].get_delta_weight("default")
            # One product of rank 8 in float32, twice.
            assert (delta - want[index]).abs().max() <= 1e-5 * want[index].abs().max()
        savers.stdin.close()
    assert min(seen) >= kills // 10
    write_adapter(folder, states[0])
    assert sorted(p.name for p in memory_folder.iterdir()) == ["0", "1", "out"]
    ours = [ADAPTER_CONFIG, ADAPTER_FILE]
    assert sorted(p.name for p in folder.iterdir()) == ours + ([] if alone else ["notes"])
