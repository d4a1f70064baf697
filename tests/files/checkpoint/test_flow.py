"""From a checkpoint to a trained adapter, with the command and plain PEFT, as users do it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_kernels import LoRAConfig, add_lora, load_adapter
from lora_kernels.cli import main
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.checkpoint.verify import TOLERANCE

from ...support import tiny_models
from ...support.packages import needs_real_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
IDS = torch.arange(24).view(2, 12)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Apart from the order of float32 sums in two layers."""
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())


def train(model) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def test_mica_keeps_B_frozen(llama, tmp_path):
    """In PEFT, which makes the start anew and then loads this one; here, after the conversion."""
    out, trained, adapter = tmp_path / "out", tmp_path / "trained", tmp_path / "adapter"
    run("init", llama, out, "--method", "mica", "-r", 4, "--residual", "absorb")
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    with safe_open(out / "adapter" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    with torch.no_grad():  # not what an SVD of the base gives
        signs = {key: torch.tensor([-1.0, 1, 1, -1]) for key in tensors if "lora_B" in key}
    flipped = {key: tensor * signs.get(key, 1.0) for key, tensor in tensors.items()}
    save_file(flipped, out / "adapter" / "adapter_model.safetensors", metadata)
    model = peft.PeftModel.from_pretrained(load(out), out / "adapter", is_trainable=True)
    B = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    assert len(B) == len(signs)
    assert all(torch.equal(B[k.replace(".weight", ".default.weight")], flipped[k]) for k in signs)
    assert_same(logits(model), logits(load(llama)))
    train(model)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in B.items())
    model.save_pretrained(trained)
    run("convert", trained, adapter, "--start", out / "adapter")
    ours = load(llama)
    load_adapter(ours, adapter, progress=False)
    assert_same(logits(ours), logits(model))
    names = {n.rpartition(".")[2] for n, p in ours.named_parameters() if p.requires_grad}
    assert names == {"lora_A"}


@pytest.mark.parametrize(
    "name,method,options",
    [
        ("llama", "loram", ["--lora-alpha", "4"]),
        ("llama", "pissa", ["--rslora"]),
        ("gpt2", "loram", []),
        ("gpt2", "init_ab", []),
    ],
)
def test_absorb_train_convert(name, method, options, request, tmp_path, capsys):
    base = request.getfixturevalue(name)
    out, trained, adapter = tmp_path / "out", tmp_path / "trained", tmp_path / "adapter"
    run("init", base, out, "--method", method, "-r", 4, *options)
    assert "layers start with" in capsys.readouterr().out

    model = peft.PeftModel.from_pretrained(load(out), out / "adapter", is_trainable=True)
    want = logits(load(base))
    assert_same(logits(model), want)
    assert float((logits(load(out)) - want).abs().max()) > 1e-3 * float(want.abs().max())
    train(model)
    model.save_pretrained(trained)
    after = logits(model)
    assert float((after - want).abs().max()) > 1e-2 * float(want.abs().max())

    run("convert", trained, adapter, "--start", out / "adapter")
    on_original = peft.PeftModel.from_pretrained(load(base), adapter)
    assert_same(logits(on_original), after)
    assert on_original.peft_config["default"].r == 8
    ours = load(base)
    load_adapter(ours, adapter)
    assert_same(logits(ours), after)
    state = read_adapter(adapter)
    assert state.base_model == str(base) and state.config.init_lora_weights == method
    assert (next(iter(state.layers.values())).beta is not None) == (method == "loram")

    run("merge", base, adapter, tmp_path / "merged")
    assert_same(logits(load(tmp_path / "merged")), after)
    run("merge", out, trained, tmp_path / "merged2")  # on the base it was trained on
    assert_same(logits(load(tmp_path / "merged2")), after)
    assert not (tmp_path / "merged2" / "adapter").exists()
    run("verify", adapter, base)
    assert "WRONG" not in capsys.readouterr().out


def test_classifier(tmp_path):
    """PEFT loads the start of a model whose task has a head that no adapter file holds."""
    model = tiny_models.llama(task="ForSequenceClassification", num_labels=3, pad_token_id=0)
    model.save_pretrained(tmp_path / "base")
    run("init", tmp_path / "base", tmp_path / "out", "-r", 2, "--quiet")
    residual = type(model).from_pretrained(tmp_path / "out")
    adapted = peft.PeftModel.from_pretrained(residual, tmp_path / "out" / "adapter")
    assert_same(logits(adapted), logits(model))


def test_mixture(tmp_path, capsys):
    """Its files have a matrix for each expert; the model that transformers loads has not."""
    base, out, trained = tmp_path / "base", tmp_path / "out", tmp_path / "trained"
    tiny_models.mixtral().save_pretrained(base)
    run("init", base, out, "-r", 8)  # more than there are experts
    printed = capsys.readouterr().out
    assert "4 layers start" in printed and "experts: its experts are 3-D parameters" in printed
    model = peft.PeftModel.from_pretrained(load(out), out / "adapter", is_trainable=True)
    assert_same(logits(model), logits(load(base)))
    train(model)
    model.save_pretrained(trained)
    run("convert", trained, tmp_path / "adapter", "--start", out / "adapter")
    run("verify", tmp_path / "adapter", base)
    on_original = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert_same(logits(on_original), logits(model))
    assert main(["init", str(base), str(tmp_path / "none"), "--targets", "w1", "gate"]) == 1
    assert "no module is called 'w1'" in capsys.readouterr().err


def test_start_is_not_overwritten(llama, tmp_path, capsys):
    """Adapters that are trained on its base need it later."""
    out, trained = tmp_path / "out", tmp_path / "trained"
    run("init", llama, out, "-r", 4, "--quiet")
    model = peft.PeftModel.from_pretrained(load(out), out / "adapter", is_trainable=True)
    model.save_pretrained(trained)
    for folder in (out, out / "adapter"):
        arguments = ["convert", trained, folder, "--start", out / "adapter"]
        assert main([str(a) for a in arguments]) == 1
        assert "use another folder" in capsys.readouterr().err


def test_trained_on_the_residual_is_no_adapter_of_the_original(llama, tmp_path, capsys):
    """PEFT's files look like those of any other adapter."""
    out, trained = tmp_path / "out", tmp_path / "trained"
    run("init", llama, out, "-r", 4, "--quiet")
    model = peft.PeftModel.from_pretrained(load(out), out / "adapter", is_trainable=True)
    model.save_pretrained(trained)
    for arguments in (["merge", llama, trained, tmp_path / "merged"],
                      ["convert", trained, tmp_path / "converted"]):  # fmt: skip
        assert main([str(a) for a in arguments]) == 1
        error = capsys.readouterr().err
        assert "was trained on" in error and f"--start {out / 'adapter'}" in error
    assert main(["verify", str(trained), str(llama)]) == 1
    # Of another rank, or another model.
    run("init", llama, tmp_path / "other", "-r", 5, "--quiet")
    for start in ("other/adapter", "trained", "nowhere"):
        arguments = ["convert", trained, tmp_path / "converted", "--start", tmp_path / start]
        assert main([str(a) for a in arguments]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "converted").exists() and not (tmp_path / "merged").exists()


def test_loftq_stays_on_its_base(llama, tmp_path, capsys):
    out = tmp_path / "out"
    run("init", llama, out, "-r", 4, "--method", "loftq", "--quiet")
    model = peft.PeftModel.from_pretrained(load(out), out / "adapter", is_trainable=True)
    train(model)
    model.save_pretrained(tmp_path / "trained")
    start = ["--start", out / "adapter"]
    arguments = ["convert", tmp_path / "trained", tmp_path / "adapter", *start]
    assert main([str(a) for a in arguments]) == 1
    assert "has made a new base" in capsys.readouterr().err
    run("verify", tmp_path / "trained", out, "--quiet")


def test_implicit(gpt2, tmp_path, capsys):
    """Native folders: load, train, convert; before training the output is that of the base."""
    native, adapter = tmp_path / "native", tmp_path / "adapter"
    run("init", gpt2, native, "-r", 4, "--method", "pissa", "--residual", "implicit", "--quiet")
    model = load(gpt2)
    load_adapter(model, native)
    want = logits(load(gpt2))
    assert_same(logits(model), want)
    run("convert", native, adapter, "--quiet")
    assert_same(logits(peft.PeftModel.from_pretrained(load(gpt2), adapter)), want)
    run("convert", native, tmp_path / "small", "--compress-to", 2)
    assert "truncated in rank" in capsys.readouterr().out
    run("verify", native, gpt2)
    assert "convert it" in capsys.readouterr().out


@needs_real_model
def test_real_model(real_model, tmp_path):
    """SmolLM2, whose head is tied, in shards of 100 MB: the weights are those that `add_lora` makes
    in memory, bit for bit, and with the start the logits are the model's.
    """
    base, out = tmp_path / "base", tmp_path / "out"
    real_model.save_pretrained(base, max_shard_size="100MB")
    run("init", base, out, "--quiet")
    residual, adapted = load(out), copy.deepcopy(real_model)
    add_lora(adapted, LoRAConfig(r=16), progress=False)
    want = adapted.state_dict()
    assert all(torch.equal(weight, want[name]) for name, weight in residual.state_dict().items())
    model = peft.PeftModel.from_pretrained(residual, out / "adapter")
    got, want = logits(model), logits(real_model)
    # 30 layers, and tokens that make no sense: 2e-5 measured.
    assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())


class TestVerify:
    @pytest.fixture
    def adapter(self, llama, tmp_path):
        run("init", llama, tmp_path / "native", "-r", 4, "--residual", "implicit", "--quiet")
        run("convert", tmp_path / "native", tmp_path / "adapter", "--quiet")
        return tmp_path / "adapter"

    def test_other_base(self, adapter, gpt2, capsys):
        assert main(["verify", str(adapter), str(gpt2)]) == 1
        printed = capsys.readouterr().out
        assert "WRONG" in printed and "logits" not in printed

    def test_files_only(self, adapter, llama, capsys):
        run("verify", adapter, llama, "--files-only")
        assert "14 layers, r = 4" in capsys.readouterr().out

    def test_truncated(self, adapter, llama, capsys):
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        assert main(["verify", str(adapter), str(llama), "--quiet"]) == 1
        assert capsys.readouterr().out == ""

    def test_scaling_that_was_edited(self, adapter, llama, capsys):
        """PEFT would use the configuration, which contradicts the recipe."""
        file = adapter / "adapter_config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"lora_alpha": 1}))
        assert main(["verify", str(adapter), str(llama)]) == 1
        assert "lora_alpha" in capsys.readouterr().out

    def test_someone_computes_something_else(self, adapter, llama, monkeypatch, capsys):
        from lora_kernels.files.checkpoint import verify

        def wrong(model, folder, **options):
            load_adapter(model, folder, **options)
            next(p for n, p in model.named_parameters() if "lora_B" in n).data.add_(0.1)

        monkeypatch.setattr(verify, "load_adapter", wrong)
        assert main(["verify", str(adapter), str(llama)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if "WRONG" in line] == [
            line for line in lines if "load_adapter" in line
        ]
