"""Several processes that write one folder: the bytes of one process, errors, and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels._utils.model_files import JOURNAL_FOLDER, is_unfinished
from lora_kernels.files.adapter.folder import write_adapter
from lora_kernels.files.checkpoint.initialize import initialize, job
from lora_kernels.files.checkpoint.initialize.run import _device as device_of
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.io.journal import JournaledFolder, Ranks, folder, meeting
from lora_kernels.files.io.journal.ranks import shares
from lora_kernels.model.config import LoRAConfig

from ...support.exhaustive import EXHAUSTIVE
from ...support.tiny_experts import tiny_experts
from .conftest import odd_shards
from .folders import fingerprint, read_file, write_file, write_model
from .killed import check
from .processes import Launched, on_ranks
from .test_merge import make_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CONFIG = LoRAConfig(r=4, init_lora_weights="pissa")
PLAN = Path(JOURNAL_FOLDER, "ranks", "plan")
Run = Callable[..., Any]


@pytest.fixture
def model(tmp_path) -> Path:
    """Six shards, of which the last are larger than the first."""
    write_model(tmp_path / "model", odd_shards(dtypes=("F16", "BF16", "F32") * 2))
    return tmp_path / "model"


@pytest.fixture
def run(model, tmp_path) -> Run:
    """Runs `initialize` into "out"; what it takes are options of it."""

    def started(**options: Any) -> Any:
        return initialize(model, tmp_path / "out", options.pop("config", CONFIG), **options)

    return started


@pytest.fixture
def expected(run, tmp_path) -> dict[str, str]:
    """The bytes that one process writes into "out", which does not exist then."""
    run()
    found = fingerprint(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "alone")
    return found


def failed_alike(ends: list) -> tuple[str, str]:
    """The type and text of the error that all ranks have raised."""
    assert len({(end.type, end.text) for end in ends}) == 1, ends
    return ends[0].type, ends[0].text


@pytest.mark.parametrize("world", [3, 8] if EXHAUSTIVE else [3])
def test_init_writes_the_bytes_of_one_process(world, expected, run, tmp_path):
    """Also with more ranks than files."""
    assert not any(end.type for end in on_ranks(world, lambda r: run(ranks=r), tmp_path / "ends"))
    assert fingerprint(tmp_path / "out") == expected


def test_implicit(model, tmp_path):
    out, config = tmp_path / "out", LoRAConfig(r=4, init_lora_weights="loram", residual="implicit")
    initialize(model, out, config)
    expected = fingerprint(out)
    out.rename(tmp_path / "alone")
    on_ranks(2, lambda ranks: initialize(model, out, config, ranks=ranks), tmp_path / "ends")
    assert fingerprint(out) == expected


def test_experts_with_tensors_in_files_of_two_ranks(tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    tiny_experts("Qwen3Moe").save_pretrained(tmp_path / "model", max_shard_size="14KB")
    names = ("experts.gate_up_proj", "experts.down_proj")
    config = LoRAConfig(r=4, target_modules=None, target_parameters=names)
    out = tmp_path / "out"
    initialize(tmp_path / "model", out, config)
    expected = fingerprint(out)
    out.rename(tmp_path / "alone")
    ends = on_ranks(
        3, lambda ranks: initialize(tmp_path / "model", out, config, ranks=ranks), tmp_path / "ends"
    )
    assert not any(end.type for end in ends) and fingerprint(out) == expected


def test_merge(model, tmp_path):
    write_adapter(tmp_path / "adapter", make_state("dst"), format="native")
    paths, out = (model, tmp_path / "adapter"), tmp_path / "out"
    merge(*paths, tmp_path / "alone", dtype=torch.float32)
    ends = on_ranks(
        3, lambda ranks: merge(*paths, out, dtype=torch.float32, ranks=ranks), tmp_path / "ends"
    )
    assert not any(end.type for end in ends)
    assert fingerprint(out) == fingerprint(tmp_path / "alone")


def test_summary_counts_all_ranks(run, tmp_path):
    """Each rank's bar counts what the rank reads."""

    def work(ranks: Ranks) -> None:
        totals: list[int] = []
        done = run(ranks=ranks, progress=lambda total: totals.append(total) or (lambda count: None))
        text = json.dumps([done.size, done.layers, totals])
        (tmp_path / f"summary-{ranks.rank}").write_text(text)

    on_ranks(3, work, tmp_path / "ends")
    found = [json.loads((tmp_path / f"summary-{rank}").read_text()) for rank in range(3)]
    files = [read_file(file)[0] for file in (tmp_path / "model").glob("*.safetensors")]
    size = sum(len(c) for tensors in files for _, _, c in tensors.values())
    assert [(s, layers) for s, layers, _ in found] == [(size, 18)] * 3
    assert sum(totals[0] for *_, totals in found) == size
    assert all(totals[0] for *_, totals in found)


def test_kills(expected, model, run, tmp_path):
    """All ranks or one are killed at random moments, and the run repeated with another number."""
    rng, out = random.Random(0), tmp_path / "out"
    kills = 100 if EXHAUSTIVE else 6
    hits = 0
    while True:
        if out.exists() and not is_unfinished(out):
            out.rename(tmp_path / f"complete-{rng.random()}")
        before, world = changed(out / PLAN), rng.choice((1, 2, 3))
        launched = Launched(world, lambda ranks: run(ranks=ranks), tmp_path / "ends")
        if kills:
            one = world > 1 and rng.random() < 0.5
            main = launched.processes[0]
            while one and changed(out / PLAN) in (0, before) and main.is_alive():
                time.sleep(0.005)  # before all have met, the others would wait for it
            time.sleep(rng.uniform(0, 0.05 if one else 0.3))
            launched.kill(*([rng.randrange(world)] if one else []))
            kills -= 1
        ends = launched.wait()
        errors = [end.text for end in ends if end.text]
        assert all("ended before its part was done" in text for text in errors), errors
        if out.exists() and not is_unfinished(out) and any(out.iterdir()):
            check(out, expected, complete=True)
            if not kills:
                break
        elif out.exists():
            check(out, expected, complete=False)
            hits += 1
    assert hits


def changed(file: Path) -> int:
    """When the file was written; 0 if there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def stop_after(count: int, monkeypatch, rank: int) -> None:
    """Kills a rank after it has finished this number of shards."""
    finish = JournaledFolder.finish

    def stopping(self, name, record, in_place=True):
        if self._ranks.rank == rank and len(self.finished) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, name, record, in_place)

    monkeypatch.setattr(JournaledFolder, "finish", stopping)


@pytest.mark.parametrize("killed,again", [(0, 1), (1, 2), (2, 3)])
def test_a_killed_rank_ends_all_and_nothing_finished_is_done_again(
    killed, again, expected, run, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(1, patch, killed)
        ends = on_ranks(3, lambda ranks: run(ranks=ranks), tmp_path / "ends")
    assert [end.killed for end in ends] == [rank == killed for rank in range(3)]
    kind, text = failed_alike([end for end in ends if not end.killed])
    assert kind == "ConnectionAbortedError"
    assert f"rank {killed} of 3 ended before its part was done: repeat the same command" in text
    kept = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
    assert kept and is_unfinished(out)
    ends = on_ranks(again, lambda ranks: run(ranks=ranks), tmp_path / "ends")
    assert not any(end.type for end in ends) and fingerprint(out) == expected
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())


def test_a_shard_that_was_finished_twice_has_the_factors_of_the_later_run(
    expected, run, tmp_path, monkeypatch
):
    """The journal of a rank of the first run says where in a file the factors were."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(1, patch, 0)
        on_ranks(2, lambda ranks: run(ranks=ranks), tmp_path / "ends")
    other = next(iter((out / JOURNAL_FOLDER).glob("journal-1-*.jsonl")))
    lines = [json.loads(line) for line in other.read_text().splitlines()]
    assert len(lines) > 1
    for line in lines[1:]:
        (out / line["finished"]).unlink()
        for start in line["starts"]:
            start["offset"] += 4
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run()
    assert fingerprint(out) == expected


@pytest.mark.parametrize("bad", ["part-1-of-6", "part-6-of-6"])
def test_an_error_in_a_weight_is_raised_on_all_ranks(bad, model, run, tmp_path):
    """Nothing is left, also if the shards of others were finished."""
    file = model / f"{bad}.safetensors"
    tensors, header = read_file(file)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    dtype, shape, content = tensors[name]
    tensors[name] = dtype, shape, b"\xff" * len(content)
    write_file(file, tensors, header["__metadata__"])
    kind, text = failed_alike(on_ranks(3, lambda ranks: run(ranks=ranks), tmp_path / "ends"))
    assert kind == "ValueError" and text.startswith(f"{name}: ")
    assert not (tmp_path / "out").exists()


def test_two_errors_become_one(model, run, tmp_path):
    for file in model.glob("*.safetensors"):
        tensors, header = read_file(file)
        bad = {n: (d, s, b"\xff" * len(c) if "q_proj.w" in n else c)
               for n, (d, s, c) in tensors.items()}  # fmt: skip
        write_file(file, bad, header["__metadata__"])
    kind, text = failed_alike(on_ranks(3, lambda ranks: run(ranks=ranks), tmp_path / "ends"))
    assert kind == "ValueError" and "q_proj.weight: " in text


def test_a_full_disk_is_resumed(expected, run, tmp_path, monkeypatch):
    pwrite = os.pwrite

    def failing(descriptor, content, position):
        if "part-2" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, content, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        ends = on_ranks(3, lambda ranks: run(ranks=ranks), tmp_path / "ends")
    _, text = failed_alike(ends)
    assert "No space left on device" in text and "part-2" in text
    assert is_unfinished(tmp_path / "out")
    assert run().layers == 18 and fingerprint(tmp_path / "out") == expected


def test_a_full_disk_keeps_no_rank_waiting(run, tmp_path, monkeypatch):
    """Where not even the message of the error can be written, either rank ends by itself."""
    write = Path.write_text

    def failing(self, text, *options, **named):
        if self.name.endswith(".message") and "kind" in text:
            raise OSError(28, "No space left on device")
        return write(self, text, *options, **named)

    def broken(self, shard):
        raise OSError("broken")

    monkeypatch.setattr(Path, "write_text", failing)
    monkeypatch.setattr(job.Job, "finished", broken)
    ends = on_ranks(2, lambda ranks: run(ranks=ranks), tmp_path / "ends")
    assert all("broken" in end.text or "ended before" in end.text for end in ends)


def test_an_error_while_rank_0_joins_the_parts(run, tmp_path, monkeypatch):
    def failing(self, *arguments):
        raise ValueError("no adapter")

    monkeypatch.setattr(job, "write_adapter", failing)
    ends = on_ranks(2, lambda ranks: run(ranks=ranks), tmp_path / "ends")
    assert failed_alike(ends) == ("ValueError", "no adapter")
    assert not is_unfinished(tmp_path / "out") and not list(
        (tmp_path / "out").glob("*.safetensors")
    )


@pytest.mark.parametrize("world", [1, 2])
def test_another_run_at_the_same_time_is_refused(world, expected, run, tmp_path, monkeypatch):
    """The first one is held after its first shard, and completes later."""
    out, go = tmp_path / "out", tmp_path / "go"
    finish = JournaledFolder.finish

    def held(self, name, record, in_place=True):
        finish(self, name, record, in_place)
        while not go.exists():
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(JournaledFolder, "finish", held)
        first = Launched(2, lambda ranks: run(ranks=ranks), tmp_path / "first")
    while not list(out.glob("*.safetensors")):
        time.sleep(0.01)
    kind, text = failed_alike(on_ranks(world, lambda r: run(ranks=r), tmp_path / "second"))
    assert (kind, text) == ("BlockingIOError", f"another process is writing {out}")
    with pytest.raises(BlockingIOError, match="another process is writing"):
        run(overwrite=True)
    go.touch()
    assert not any(end.type for end in first.wait()) and fingerprint(out) == expected


def test_one_process_at_the_same_time_is_not_joined(run, tmp_path, monkeypatch):
    """Rank 1 finds the lock of a run that it does not belong to."""
    monkeypatch.setattr(meeting, "_LEAVE", 0.1)
    with JournaledFolder(tmp_path / "out", {}, {}):
        ends = on_ranks(2, lambda ranks: run(ranks=ranks), tmp_path / "ends")
    kind, text = failed_alike(ends)
    assert kind == "BlockingIOError" and "another process is writing" in text


def test_ranks_of_a_dying_run_are_waited_for(expected, run, tmp_path, monkeypatch):
    """Rank 0 was killed, and rank 1 has not seen it yet."""
    out = tmp_path / "out"
    edit = job.Job.edit

    def slow(self, *arguments):
        if not self.work._ranks.is_main:
            time.sleep(0.5)
        edit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "edit", slow)
        first = Launched(2, lambda ranks: run(ranks=ranks), tmp_path / "first")
        while not (out / PLAN).exists():
            time.sleep(0.01)
        first.kill(0)
        first.processes[0].join()
    with monkeypatch.context() as patch, pytest.raises(BlockingIOError, match="another process"):
        patch.setattr(meeting, "_LEAVE", 0.05)
        run()
    assert run().layers == 18 and fingerprint(out) == expected
    assert [end.killed for end in first.wait()] == [True, False]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come(missing, run, tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "JOIN", 3.0 if missing else 0.5)  # rank 2 comes in time

    def work(ranks: Ranks) -> None:
        if ranks.rank != missing:
            run(ranks=ranks)

    ends = on_ranks(3, work, tmp_path / "ends")
    texts = {end.text for rank, end in enumerate(ends) if rank != missing}
    who = "rank 0 of 3" if missing == 0 else "of 3 ranks, 1"
    assert len(texts) == 1 and f"{who} did not begin to write" in texts.pop()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", [1, 3])
def test_refusals_are_those_of_one_process(world, model, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    kind, text = failed_alike(on_ranks(world, lambda r: run(ranks=r), tmp_path / "ends"))
    assert kind == "FileExistsError" and "is not empty: give another folder" in text
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with monkeypatch.context() as patch:
        stop_after(1, patch, 1)
        on_ranks(2, lambda r: run(ranks=r, overwrite=True), tmp_path / "ends")
    other = LoRAConfig(r=3, init_lora_weights="pissa")
    ends = on_ranks(world, lambda r: run(ranks=r, config=other), tmp_path / "ends")
    _, text = failed_alike(ends)
    assert "has an unfinished run that differs in r (4, now 3)" in text
    assert run().resumed > 0


def test_overwrite_replaces_a_model_and_keeps_it_if_a_rank_is_missing(run, tmp_path, monkeypatch):
    run(config=LoRAConfig(r=2))
    before = fingerprint(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(TimeoutError, match="did not begin"):
        patch.setattr(meeting, "JOIN", 0.1)
        run(overwrite=True, ranks=Ranks(0, 2))
    assert fingerprint(tmp_path / "out") == before
    ends = on_ranks(2, lambda ranks: run(overwrite=True, ranks=ranks), tmp_path / "ends")
    assert not any(end.type for end in ends) and not is_unfinished(tmp_path / "out")
    config = tmp_path / "out" / "adapter" / "adapter_config.json"
    assert json.loads(config.read_text())["r"] == 4


def test_ranks_with_different_arguments(run, tmp_path):
    ends = on_ranks(3, lambda r: run(ranks=r, seed=7 if r.rank == 2 else 0), tmp_path / "ends")
    kind, text = failed_alike(ends)
    assert kind == "ValueError" and text.startswith("rank 2 differs from rank 0 in seed (7, now 0)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("boot,kept", [("second", 5), ("second again", 2)])
def test_shards_of_a_machine_that_has_restarted_are_done_again(
    boot, kept, expected, run, tmp_path, monkeypatch
):
    """Of two machines that share a disk, one may have crashed since."""
    out, finish = tmp_path / "out", JournaledFolder.finish

    def stopping(self, name, record, in_place=True):
        while self._ranks.is_main and len(self.finished) == 2:
            if len(list(out.glob("*.safetensors"))) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        finish(self, name, record, in_place)

    def on_two_machines(*boots: str) -> list:
        def work(ranks: Ranks) -> None:
            folder.boot = lambda: boots[ranks.rank]
            run(ranks=ranks)

        return on_ranks(2, work, tmp_path / "ends")

    with monkeypatch.context() as patch:
        patch.setattr(JournaledFolder, "finish", stopping)
        assert on_two_machines("first", "second")[0].killed
    before = {file: file.stat().st_ino for file in out.glob("*.safetensors")}
    assert len(before) == 5
    assert not any(end.type for end in on_two_machines("first", boot))
    assert fingerprint(out) == expected
    assert sum(file.stat().st_ino == inode for file, inode in before.items()) == kept


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_balanced(world):
    """No rank has more than the fair share and one file; all ranks find the same."""
    rng = random.Random(world)
    for count in (0, 1, 5, 40):
        sizes = {f"{k}": rng.randrange(1, 100) for k in range(count)}
        owners = shares(sizes, world)
        assert owners == shares(dict(reversed(sizes.items())), world)
        assert owners.keys() == sizes.keys() and set(owners.values()) <= set(range(world))
        loads = [sum(sizes[n] for n in sizes if owners[n] == rank) for rank in range(world)]
        assert max(loads) <= sum(loads) / world + max(sizes.values(), default=0)


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({}, Ranks()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Ranks()),
        ({"RANK": "16"}, Ranks()),
        ({"RANK": "2", "WORLD_SIZE": "3"}, Ranks(2, 3, 2, 3, ("",) * 4)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
             "MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"},
            Ranks(5, 8, 1, 4, ("a", "1", "x", "")),
        ),
    ],
)  # fmt: skip
def test_environment(environment, expected):
    assert Ranks.of_environment(environment) == expected


@pytest.mark.parametrize(
    "environment,match",
    [
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE = 2, which"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2, WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "unset WORLD_SIZE for one process"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "are not the ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': it must be the integer"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK is '': it must be"),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK",
        ),
    ],
)
def test_environment_errors(environment, match):
    with pytest.raises(ValueError, match=match):
        Ranks.of_environment(environment)


def test_a_device_without_a_number_is_one_for_each_rank(monkeypatch):
    """The name that the user gave is in the errors, so that all ranks print the same."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for rank in range(2):
        with pytest.raises(ValueError, match=r"'cuda' gives each of 2 ranks .* there are 1: start"):
            device_of("cuda", Ranks(rank, 2, rank, 2))
    assert device_of("cpu", Ranks(1, 2, 1, 2)) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    on_meta = torch.empty(0, device="meta")
    placed: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda size, device: placed.append(device) or on_meta)
    with pytest.raises(ValueError, match="has no numbers"):
        device_of("cuda", Ranks(3, 4, 1, 2))
    assert placed == [torch.device("cuda", 1)]
