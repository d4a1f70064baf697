"""`lora-kernels convert`: formats, ranks, dtypes and names, on real tiny models in folders."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels import add_lora, load_adapter, save_adapter
from lora_kernels._utils.peft_names import ADAPTER_FILE
from lora_kernels.cli import main
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.model.config import LoRAConfig

from ..support.adapters import IDS, assert_agree, peft_config, peft_logits, tiny_model, train
from ..support.tiny_models import gpt2

safetensors = pytest.importorskip("safetensors.torch")


def run(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture()
def trained(tmp_path):
    """(the base's folder, the adapter's folder, the logits)"""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = copy.deepcopy(tiny_model("llama"))
    model.save_pretrained(base)
    model.name_or_path = model.config._name_or_path = str(base)
    add_lora(model, LoRAConfig(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"v_proj": 3}))
    train(model, 3)
    with torch.no_grad():
        logits = model(IDS).logits
    save_adapter(model, adapter)
    return base, adapter, logits


def test_rank_and_dtype(trained, tmp_path, capsys):
    _, adapter, logits = trained
    assert run(adapter, tmp_path / "small", "--compress-to", 8, "--dtype", "bfloat16") == 0
    assert "truncated in rank and rounded to bfloat16 with a relative error of" in (
        capsys.readouterr().out
    )
    stored = safetensors.load_file(tmp_path / "small" / ADAPTER_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    got = peft_logits(tiny_model("llama"), tmp_path / "small")[1]
    base = tiny_model("llama")(IDS).logits
    assert (got - logits).norm() < 5e-3 * (logits - base).norm()


def test_gguf(trained, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    base, adapter, _ = trained
    file = tmp_path / "adapter.gguf"
    assert run(adapter, file, "--to", "gguf") == 0  # the adapter names its base
    assert "for a GGUF model of llama" in capsys.readouterr().out
    reader = gguf.GGUFReader(file)
    assert reader.get_field("adapter.lora.alpha").contents() == 8.0
    assert len(reader.tensors) == 2 * len(read_adapter(adapter).layers)
    small = tmp_path / "small.gguf"
    arguments = ["--compress-to", 2, "--dtype", "float16", "--base", base / "config.json"]
    assert run(adapter, small, "--to", "gguf", *arguments) == 0
    assert "rank 2 in float16" in (printed := capsys.readouterr().out)
    assert "with a relative error of" in printed
    assert run(adapter, tmp_path / "bf16.gguf", "--to", "gguf", "--dtype", "bfloat16") == 0
    error = float(capsys.readouterr().out.split()[-1])
    assert 5e-4 < error < 5e-3


def test_gguf_without_a_base(trained, tmp_path, capsys):
    _, adapter, _ = trained
    state = read_adapter(adapter)
    from lora_kernels.files.adapter.folder import write_adapter

    state.base_model = "some/base"
    write_adapter(tmp_path / "far", state)
    assert run(tmp_path / "far", tmp_path / "x.gguf", "--to", "gguf") == 1
    assert "'some/base' is not a folder here: give --base" in capsys.readouterr().err
    assert run(adapter, tmp_path / "x.gguf", "--to", "gguf", "--base", tmp_path / "no") == 1
    assert run(adapter, tmp_path, "--to", "gguf") == 1
    assert "give the name of a file" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gguf"))


class Outer(nn.Module):
    """The text model under another name, as in classes for pictures and text."""

    def __init__(self, text):
        super().__init__()
        self.language_model = text
        self.config = text.config

    def forward(self, ids):
        return self.language_model(ids)


def test_rename(trained, tmp_path, capsys):
    _, adapter, logits = trained
    renamed = tmp_path / "renamed"
    assert run(adapter, renamed, "--rename", "model.", "language_model.model.") == 0
    outer = Outer(copy.deepcopy(tiny_model("llama")))
    load_adapter(outer, renamed)
    with torch.no_grad():
        assert torch.equal(outer(IDS).logits, logits)
    outer = Outer(copy.deepcopy(tiny_model("llama")))
    assert_agree(peft_logits(outer, renamed)[1], logits.double())
    assert all(n.startswith("language_model.") for n in peft_config(renamed)["target_modules"])
    back = tmp_path / "back"
    assert run(renamed, back, "--rename", "language_model", "", "--to", "native") == 0
    model = copy.deepcopy(tiny_model("llama"))
    load_adapter(model, back)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    capsys.readouterr()
    assert run(adapter, tmp_path / "x", "--rename", "modle.", "y.") == 1
    assert "begins with 'modle.'" in (printed := capsys.readouterr().err) and "model" in printed
    assert not (tmp_path / "x").exists()


def test_targets_end_as_in_a_given_base(trained, tmp_path):
    base, adapter, _ = trained
    assert run(adapter, tmp_path / "a", "--base", base) == 0
    assert all("." not in name for name in peft_config(tmp_path / "a")["target_modules"])


def test_unknown_format(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(trained[1], tmp_path / "x", "--to", "gguff")
    assert "gguf" in capsys.readouterr().err


def save_other(kind: str, folder: Path) -> Path:
    """The configuration of another model than the adapter's, or a broken one."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = {
        "wider": lambda: transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"]
        ),
        "falcon": lambda: transformers.FalconConfig(**sizes, architectures=["FalconForCausalLM"]),
        "bert": lambda: transformers.BertConfig(**sizes, architectures=["BertModel"]),
    }[kind]()
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("wider", "is another base model; give the one that the adapter was trained on (--base)"),
        ("gpt2", "cannot be adapted in a GGUF model of GPT2LMHeadModel: it has no tensor"),
        ("falcon", "'FalconForCausalLM'"),
        ("bert", "'BertModel'"),
    ],
)
def test_gguf_for_another_base(kind, match, as_file, trained, tmp_path, capsys):
    pytest.importorskip("gguf")
    other = save_other(kind, tmp_path / "other")
    out = tmp_path / "x.gguf"
    arguments = ["--to", "gguf", "--base", other / "config.json" if as_file else other]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(trained[1], out, *arguments) == 1
    assert match in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    out.write_text("old")
    assert run(trained[1], out, *arguments) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "x.gguf"])
    assert out.read_text() == "old"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("to", ["peft", "native"])
@pytest.mark.parametrize("fault", ["prefix", "base", "start", "itself", "factor", "dtype"])
def test_after_an_error_the_old_folder_is_as_it_was(fault, to, trained, tmp_path, capsys):
    _, adapter, _ = trained
    arguments, match = {
        "prefix": (["--rename", "modle.", "x."], "begins with 'modle.'"),
        "base": (["--base", tmp_path / "no"], str(tmp_path / "no")),
        "start": (["--start", tmp_path / "no"], "is not a start"),
        "itself": (["--start", adapter], "is the trained adapter itself"),
        "factor": ([], "do not fit each other"),
        "dtype": (["--dtype", "float16"], "format='peft'" if to == "native" else "too large"),
    }[fault]
    out = tmp_path / "out"
    assert run(adapter, out) == 0
    old = contents(out)
    if fault in ("factor", "dtype"):
        adapter = shutil.copytree(adapter, tmp_path / "bad")
        stored = safetensors.load_file(adapter / ADAPTER_FILE)
        if fault == "factor":
            name = next(name for name in stored if "lora_A" in name)
            stored[name] = stored[name].repeat(4, 1)
        else:
            stored = {name: 1e9 * tensor for name, tensor in stored.items()}
        safetensors.save_file(stored, adapter / ADAPTER_FILE)
    capsys.readouterr()
    assert run(adapter, out, "--to", to, *arguments) == 1
    assert match in capsys.readouterr().err
    assert contents(out) == old
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(adapter, tmp_path / "new", "--to", to, *arguments) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", ["peft", "native"])
@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("gpt2", {}, "which .* does not have: it is another base model; give the one"),
        ("llama", {"num_hidden_layers": 1}, r"layers\.1.*which .* does not have"),
        (
            "llama",
            {"hidden_size": 32, "head_dim": 8},
            r"\[out, in\].* for the adapter.*another base model",
        ),
        ("llama", {"intermediate_size": 48}, r"mlp.*for the adapter.*another base model"),
    ],
)
def test_folders_for_another_base(kind, options, match, to, trained, tmp_path, capsys):
    other = gpt2()
    if kind == "llama":
        config = copy.deepcopy(tiny_model("llama").config)
        config.update(options)
        other = type(tiny_model("llama"))(config)
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    for out in (tmp_path / "new", shutil.copytree(trained[1], tmp_path / "old")):
        arguments = ["--to", to, "--base", tmp_path / "other"]
        assert run(trained[1], out, *arguments) == 1
        assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
    assert contents(tmp_path / "old") == contents(trained[1])
