"""`lora-kernels check`: the table, JSON and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lora_kernels.cli import main

from ..files.serving.test_check import QV, gemma3, named, write, write_base
from ..support.exhaustive import paired

ENGINE_KEYS = {
    "engine", "as_of", "outcome", "refusals", "remedies", "notes", "flags", "rank",
    "rank_limit", "names_compared", "worst_error", "dropped", "layers",
}  # fmt: skip
LAYER_KEYS = {
    "name", "right", "effect", "reason", "matching_name", "scale", "trained_scale", "strength",
    "dtype", "error", "remedy",
}  # fmt: skip


def run(capsys, *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["check", *(str(argument) for argument in arguments)]) == code
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_right(tmp_path, capsys):
    adapter, base = write(tmp_path / "a"), write_base(tmp_path / "base")
    out = run(capsys, adapter, "--base", base, "--for", "vllm, sglang,llama.cpp,peft")
    for engine in ("vllm (vLLM 0.", "sglang (SGLang 0.", "llama.cpp", "peft (PEFT 0.21"):
        assert engine in out
    assert out.count("4 of 4 right") == 4 and "not compared" not in out and "compared" in out
    assert run(capsys, adapter, "--base", base / "config.json", "--for", "vllm", "--quiet") == ""
    assert "names were not compared with a base (--base)" in run(capsys, adapter)


def test_wrong_strength(tmp_path, capsys):
    adapter = write(tmp_path / "a", use_rslora=True)
    out = run(capsys, adapter, "--for", "sglang", code=1)
    assert "4 layers: applied at 0.5 times the trained strength, error up to 50 %" in out
    assert "model.layers.0.self_attn.q_proj" in out and "sglang: wrong" in out
    assert run(capsys, adapter, "--for", "vllm,peft").count("right") > 2


def test_refusals_have_rules_and_remedies(tmp_path, capsys):
    adapter = write(tmp_path / "a", target_modules="all_linears", alpha_pattern={"q_proj": 3})
    out = run(capsys, adapter, "--for", "sglang", code=1)
    assert "refused: target_modules must be a list of names" in out
    assert "remedy: lora-kernels convert ADAPTER OUT" in out and "alpha_pattern is refused" in out


def test_names_without_effect(tmp_path, capsys):
    tensors = named([name.replace("model.", "text.", 1) for name in QV])
    adapter, base = write(tmp_path / "a", tensors), write_base(tmp_path / "base")
    out = run(capsys, adapter, "--base", base, "--for", "vllm", code=1)
    assert "no effect: no module has this name; 'model.' instead of 'text.' would match" in out
    assert "remedy: lora-kernels convert ADAPTER OUT --rename text. model." in out
    text = write(tmp_path / "b")
    out = run(capsys, text, "--base", gemma3(tmp_path / "gemma"), "--for", "vllm,peft", code=1)
    assert "'model.language_model.' instead of 'model.' would match" in out  # PEFT
    assert "earlier releases silently leave these layers out" in out  # vLLM


def test_needed_flags_and_dropped_tensors(tmp_path, capsys):
    layers = {name: (torch.randn(24, 32), torch.randn(32, 24)) for name in QV}
    tensors = named(layers) | {"base_model.model.score.weight": torch.ones(2, 32)}
    adapter = write(tmp_path / "a", tensors, r=24, modules_to_save=["score"])
    out = run(capsys, adapter, "--for", "vllm", code=1)
    assert "needs --max-lora-rank 32" in out and "0.33.0 takes classifier and score" in out
    out = run(capsys, adapter, "--for", "sglang", code=1)
    assert "1 tensors are left out: tensors outside the blocks are not loaded" in out
    assert "remedy: merge it into the model" in out


def test_json(tmp_path, capsys):
    adapter, base = write(tmp_path / "a"), write_base(tmp_path / "base")
    found = json.loads(run(capsys, adapter, "--base", base, "--for", "vllm,sglang", "--json"))
    assert set(found) == {"adapter", "base", "tolerance", "right", "engines"}
    assert found["right"] is True and found["tolerance"] == 0.005
    assert (found["adapter"], found["base"]) == (str(adapter), str(base))
    assert [engine["engine"] for engine in found["engines"]] == ["vllm", "sglang"]
    for engine in found["engines"]:
        assert set(engine) == ENGINE_KEYS and engine["outcome"] == "right"
        assert engine["names_compared"] is True and 0 < engine["worst_error"] < 0.005
        assert [set(layer) for layer in engine["layers"]] == [LAYER_KEYS] * 4
        assert all(layer["dtype"] == "bfloat16" for layer in engine["layers"])
    assert found["engines"][0]["rank_limit"] == 512


def test_json_of_what_is_wrong(tmp_path, capsys):
    """It is JSON also where errors are infinite or unknown."""
    tensors = {name: 1e30 * tensor for name, tensor in named(QV).items()}
    recipe = json.dumps({"format": "start", "base_model": "x"})
    adapter = write(tmp_path / "a", tensors, {"lora_kernels": recipe}, use_dora=True)
    base = write_base(tmp_path / "base", dtype="float16")
    found = json.loads(run(capsys, adapter, "--base", base, "--json", code=1))
    assert found["right"] is False and found["engines"][0]["outcome"] == "refused"
    for engine in found["engines"]:
        assert engine["worst_error"] is None
        for layer in engine["layers"]:
            assert layer["error"] is None and layer["reason"] and not layer["right"]
    assert set(found["engines"][0]["refusals"][0]) == {"rule", "remedy"}


@pytest.mark.parametrize(
    "arguments,match",
    [
        (["--for", "vlllm"], "unknown engine 'vlllm': expected one of vllm, sglang, llama.cpp"),
        (["--for", "vlllm"], "did you mean 'vllm'?"),
        (["--for", ","], "--for is empty"),
        (["--base", "nowhere"], "nowhere does not exist"),
    ],
)
def test_errors(arguments, match, tmp_path, capsys):
    assert main(["check", str(write(tmp_path / "a")), *arguments]) == 1
    printed = capsys.readouterr()
    assert match in printed.err and printed.out == "" and printed.err.count("\n") == 1


def test_missing_and_pickled_adapters(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nothing")]) == 1
    assert "nothing does not exist" in capsys.readouterr().err
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert main(["check", str(tmp_path)]) == 1
    assert "pickled files are not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"hidden_size": "abc"}, {"hidden_size": 33}, {"num_hidden_layers": None}], ids=str
)
def test_bases_that_transformers_rejects(options, tmp_path, capsys):
    adapter, base = write(tmp_path / "a"), write_base(tmp_path / "base", **options)
    out = run(capsys, adapter, "--base", base, "--for", "vllm")
    assert "transformers cannot build it from its configuration (" in out
    assert "not compared" in out


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["MyModel"], "model_type": "mine", "auto_map": {"AutoConfig": "c.Mine"}},
        {"_class_name": "UNet2DConditionModel"},
    ],
    ids=["empty", "remote code", "diffusers"],
)
def test_bases_that_cannot_be_compared(config, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    adapter = write(tmp_path / "a")
    out = run(capsys, adapter, "--base", file, "--for", "vllm")
    assert "names" in out and "not compared" in out
    assert "note: names were not compared with the base: " in out
    found = json.loads(run(capsys, adapter, "--base", file, "--for", "vllm", "--json"))
    assert found["engines"][0]["names_compared"] is False


def test_the_adapter_is_no_base(tmp_path, capsys):
    adapter = write(tmp_path / "a")
    assert main(["check", str(adapter), "--base", str(adapter / "adapter_config.json")]) == 1
    printed = capsys.readouterr()
    assert "is the configuration of an adapter" in printed.err and printed.err.count("\n") == 1


def test_each_engine_once(tmp_path, capsys):
    adapter = write(tmp_path / "a")
    found = json.loads(run(capsys, adapter, "--for", "vllm,peft,vllm", "--json"))
    assert [engine["engine"] for engine in found["engines"]] == ["vllm", "peft"]


def test_no_layer_of_a_refused_adapter_is_right(tmp_path, capsys):
    adapter = write(tmp_path / "a", alpha_pattern={"nothing": 3})
    found = json.loads(run(capsys, adapter, "--for", "sglang", "--json", code=1))["engines"][0]
    assert found["outcome"] == "refused" and found["layers"]
    assert not any(layer["right"] for layer in found["layers"])
    assert found["remedies"] == [refusal["remedy"] for refusal in found["refusals"]]
    assert "0 of 4 right" in run(capsys, adapter, "--for", "sglang", code=1)


def test_remedies_in_json(tmp_path, capsys):
    adapter = write(tmp_path / "a", use_rslora=True)
    wrong, right = json.loads(run(capsys, adapter, "--for", "sglang,vllm", "--json", code=1))[
        "engines"
    ]
    assert right["remedies"] == [] and all(x["remedy"] is None for x in right["layers"])
    assert {x["remedy"] for x in wrong["layers"]} == set(wrong["remedies"])
    assert wrong["remedies"][0].startswith("lora-kernels convert ADAPTER OUT")
    out = run(capsys, adapter, "--for", "sglang", code=1)
    assert out.count("remedy: lora-kernels convert ADAPTER OUT") == 1


def test_one_line_for_each_reason(tmp_path, capsys):
    adapter = write(tmp_path / "a", named(QV, prefix=""))
    out = run(capsys, adapter, "--for", "peft", code=1)
    assert out.count("no effect") == 1 and "4 layers: no effect: the names of its tensors" in out


@pytest.mark.parametrize(
    ("verdict", "option"), paired([("vllm", 0), ("sglang", 1)], [(), ("--json",)])
)
def test_a_reader_that_stops_changes_no_exit_status(verdict, option, tmp_path):
    """As `lora-kernels check ... | head -0`, with a pipe that nobody reads."""
    engine, code = verdict
    adapter = write(tmp_path / "a", use_rslora=True)
    command = [sys.executable, "-m", "lora_kernels.cli", "check", adapter, "--for", engine, *option]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == code and "roken" not in errors and "Traceback" not in errors


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    printed = capsys.readouterr().out
    assert "lora-kernels check " in printed.partition("examples:")[2]
    keys = printed.partition("--json prints one object")[2].partition("examples:")[0]
    assert all(key in keys for key in ENGINE_KEYS | LAYER_KEYS)
    with pytest.raises(SystemExit):
        main(["check", "a", "--json", "--quiet"])
