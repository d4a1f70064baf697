"""The subcommands for checkpoints: their output, and errors of one line."""

from __future__ import annotations

import json

import pytest

from lora_kernels._utils import progress
from lora_kernels.cli import main

from ..files.checkpoint.folders import read_file, write_file


def error_of(capsys, *arguments: object, code: int = 1) -> str:
    assert main([str(a) for a in arguments]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(f"lora-kernels {arguments[0]}: ")
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


def test_init_prints_what_to_do(odd_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["init", str(odd_model), str(out), "-r", "4"]) == 0
    printed = capsys.readouterr()
    assert "9 layers start with loram, r = 4" in printed.out and printed.err == ""
    assert f"convert TRAINED ADAPTER --start {out / 'adapter'}" in printed.out
    assert main(["init", str(odd_model), str(tmp_path / "quiet"), "-r", "4", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_options_arrive(odd_model, tmp_path):
    out = tmp_path / "out"
    arguments = ["--method", "pissa", "-r", "3", "--targets", "q_proj", "up_proj", "--rslora",
                 "--exclude", "layers.0.up_proj", "--lora-alpha", "5", "--dtype", "bfloat16",
                 "--seed", "7", "--residual", "absorb", "--sync", "--quiet"]  # fmt: skip
    assert main(["init", str(odd_model), str(out), *arguments]) == 0
    values = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (values["r"], values["use_rslora"]) == (3, False)
    assert values["lora_alpha"] / 3 == pytest.approx(5 / 3**0.5, rel=1e-15)
    tensors, header = read_file(out / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 5
    recipe = json.loads(header["__metadata__"]["lora_kernels"])
    assert recipe["format"] == "start" and recipe["original"] == str(odd_model)
    assert recipe["config"]["init_lora_weights"] == "pissa"
    stored = read_file(out / "part-1-of-3.safetensors")[0]["model.layers.0.q_proj.weight"]
    assert stored[0] == "BF16"


@pytest.mark.parametrize(
    "arguments,match",
    [
        (["--method", "lorram"], "did you mean 'loram'?"),
        (["--method", "lora_one"], "capture_gradients"),
        (["--method", "corda"], "capture_activations"),
        (["--method", "kasa"], "trains a diagonal between A and B"),
        (["--method", "orthogonal", "-r", "3"], "Orthogonal needs an even rank"),
        (["--targets", "q_prok"], "did you mean 'q_proj'?"),
        (["-r", "0"], "r must be at least 1"),
        (["-r", "99"], "rank 99 is larger than min(n, m)"),
        (["--lora-alpha", "-1"], "lora_alpha must be positive"),
        (["--residual", "implicit", "--dtype", "float16"], "dtype is for a base that is written"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used here"),
        (["--device", "meta"], "'meta' has no numbers"),
        (["--method", "loftq", "--residual", "implicit"], "a base that it rewrites"),
    ],
)
def test_init_errors(arguments, match, odd_model, tmp_path, capsys):
    assert match in error_of(capsys, "init", odd_model, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_paths(odd_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert "does not exist" in error_of(capsys, "init", tmp_path / "nowhere", out)
    assert "are inside each other" in error_of(capsys, "init", odd_model, odd_model)
    out.mkdir()
    (out / "x").touch()
    assert "--overwrite" in error_of(capsys, "init", odd_model, out, "-r", 4)
    assert "nowhere" in error_of(capsys, "merge", odd_model, tmp_path / "nowhere", out)
    assert "nowhere" in error_of(capsys, "convert", tmp_path / "nowhere", out)
    assert "nowhere" in error_of(capsys, "verify", tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file,content,match",
    [
        ("config.json", '{"model_type": ["llama"]}', "has model_type = ['llama']"),
        ("config.json", '{"architectures": {"a": 1}}', "has architectures = {'a': 1}"),
        ("config.json", '{"text_config": 1}', "has text_config = 1"),
        ("model.safetensors.index.json", "[" * 100_000, "is not valid JSON"),
    ],
)
def test_foreign_json(file, content, match, odd_model, tmp_path, capsys):
    (odd_model / file).write_text(content)
    assert match in error_of(capsys, "init", odd_model, tmp_path / "out", "-r", 4)
    assert not (tmp_path / "out").exists()


def test_tensor_in_two_shards(odd_model, tmp_path, capsys):
    """The start would be subtracted from one of them only."""
    tensors, _ = read_file(odd_model / "part-1-of-3.safetensors")
    again, _ = read_file(odd_model / "part-2-of-3.safetensors")
    name = "model.layers.1.q_proj.weight"
    write_file(odd_model / "part-1-of-3.safetensors", tensors | {name: again[name]})
    error = error_of(capsys, "init", odd_model, tmp_path / "out", "-r", 4)
    assert f"{name!r} is in both part-1-of-3.safetensors and part-2-of-3.safetensors" in error


def test_truncated_shard(odd_model, tmp_path, capsys):
    file = odd_model / "part-3-of-3.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "part-3-of-3" in error_of(capsys, "init", odd_model, tmp_path / "out", "-r", 4)


@pytest.mark.parametrize("command", ["init", "merge", "convert", "verify"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert (
        raised.value.code == 0 and f"lora-kernels {command} " in printed.partition("examples:")[2]
    )
    with pytest.raises(SystemExit) as raised:
        main([command])
    assert raised.value.code == 2


def test_bar(odd_model, tmp_path, monkeypatch, capsys):
    """It counts bytes, if standard error is a terminal; none if disabled."""
    rich = pytest.importorskip("rich.console")
    console = rich.Console

    def terminal(*args, **options):
        return console(*args, **options, force_terminal=True)

    monkeypatch.setattr(rich, "Console", terminal)
    with progress.byte_bar("init") as begin:
        begin(100)(60)
    assert "init" in capsys.readouterr().err
    with progress.byte_bar("init", enabled=False) as begin:
        begin(100)(60)
    assert capsys.readouterr().err == ""


def test_bytes_are_counted(odd_model, tmp_path):
    """The data of all files is counted once."""
    from lora_kernels.files.checkpoint.initialize import initialize
    from lora_kernels.model.config import LoRAConfig

    totals: list[int] = []
    counts: list[int] = []

    def progress(total):
        totals.append(total)
        return counts.append

    done = initialize(odd_model, tmp_path / "out", LoRAConfig(r=4), progress=progress)
    size = sum(
        len(c) for f in odd_model.glob("*.safetensors") for _, _, c in read_file(f)[0].values()
    )
    assert totals == [size] and sum(counts) == size == done.size
