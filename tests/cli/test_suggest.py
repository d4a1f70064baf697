"""`lora-kernels suggest`: the numbers of `lora_kernels.suggest`, without the model in memory."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import LoRAConfig, init, suggest
from lora_kernels._utils.model_files import StoredTensor
from lora_kernels.cli import main
from lora_kernels.training.rescaling import STUDY

from ..support.packages import needs_transformers

safetensors = pytest.importorskip("safetensors.torch")


def printed(capsys, path: Path, *arguments: object) -> str:
    capsys.readouterr()  # transformers' bars, of a model that was loaded before
    assert main(["suggest", str(path), *map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def values(capsys, path: Path, *arguments: object) -> dict[str, Any]:
    return json.loads(printed(capsys, path, "--json", *arguments))


def loaded(path: Path) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path)


class TestNumbers:
    @needs_transformers
    @pytest.mark.parametrize("method", ["loram", "pissa", "milora", "lora_xs", "mica"])
    @pytest.mark.parametrize("model", ["llama", "gpt2"])
    def test_of_the_loaded_model(self, model, method, request, capsys):
        """Shards, Conv1D, a tied head, sampling and proposed s included."""
        path = request.getfixturevalue(model)
        config = LoRAConfig(r=4, init_lora_weights=method)
        found = suggest(loaded(path), config, layers=1, progress=False)
        got = values(capsys, path, "--method", method, "-r", 4, "--layers", 1)
        numbers = ("learning_rate", "low", "high", "step_size", "next_step_size", "scaling")
        for name in (*numbers, "lora_alpha"):
            assert got[name] == pytest.approx(getattr(found, name), rel=1e-6), name
        for name in ("measured", "layers", "scaling_rule", "reference", "ratio"):
            assert got[name] == getattr(found, name), name
        assert got["notes"] == list(found.notes)
        assert got["config"]["use_rslora"] == found.config.use_rslora
        assert LoRAConfig(**got["config"]).lora_alpha == found.lora_alpha

    @needs_transformers
    def test_reference_and_options(self, llama, capsys):
        arguments = ["-r", 8, "--lora-alpha", 6, "--use-rslora", "--targets", "q_proj", "up_proj"]
        arguments += ["--exclude", "layers.0.mlp.up_proj", "--layers", "all", "--method", "pissa"]
        reference = ["--reference-method", "loram", "--reference-r", 4, "--reference-lr", 2e-4]
        reference += ["--reference-alpha", 12, "--reference-rslora", "--ratio", 4]
        got = values(capsys, llama, *arguments, *reference)
        layers = {
            "target_modules": ["q_proj", "up_proj"],
            "exclude_modules": ["layers.0.mlp.up_proj"],
        }
        config = LoRAConfig(r=8, lora_alpha=6, use_rslora=True, init_lora_weights="pissa", **layers)
        other = LoRAConfig(r=4, lora_alpha=12, use_rslora=True, **layers)
        options = {"reference": (other, 2e-4), "ratio": 4, "layers": None, "progress": False}
        found = suggest(loaded(llama), config, **options)
        assert got["learning_rate"] == pytest.approx(found.learning_rate, rel=1e-6)
        assert got["reference"] == found.reference and got["layers"] == got["measured"] == 3
        # By default the reference is plain LoRA of the same rank, which alpha = 8 belongs to.
        text = values(capsys, llama, "-r", 4, "--reference-lr", 1e-3)["reference"]
        assert text.startswith("lora, r=4, lora_alpha=8 (s=2) at the rate 0.001")

    @needs_transformers
    def test_random_starts_are_the_same_in_every_run(self, llama, capsys):
        state = torch.get_rng_state()
        first = values(capsys, llama, "--method", "lora", "-r", 4)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert values(capsys, llama, "--method", "lora", "-r", 4) == first
        config = LoRAConfig(r=4, init_lora_weights=init.LoRA(seed=0))
        found = suggest(loaded(llama), config, progress=False)
        assert first["step_size"] == pytest.approx(found.step_size, rel=0.05)

    def test_a_folder_that_transformers_does_not_know(self, odd_model, capsys):
        """The layers that `init` starts there: 9 of three dtypes, without the fp8 tensors."""
        got = values(capsys, odd_model, "-r", 4)
        assert got["layers"] == got["measured"] == 9
        assert got["learning_rate"] * got["next_step_size"] == pytest.approx(STUDY.product)

    def test_a_file(self, tmp_path, capsys):
        weights = {f"layers.{k}.{n}.weight": torch.randn(24, 16) for k in (0, 1) for n in "qv"}
        path = tmp_path / "model.safetensors"
        safetensors.save_file({**weights, "layers.0.small.weight": torch.randn(2, 16)}, path)
        got = values(capsys, path, "-r", 4, "--method", "olora", "--layers", 1)
        # `small` cannot have the rank; OLoRA's QR is slow, and there are two kinds.
        assert (got["measured"], got["layers"]) == (2, 4)

    def test_text(self, odd_model, capsys):
        text = printed(capsys, odd_model, "-r", 4)
        assert text.startswith("loram, r=4, lora_alpha=4 (s=1): learning rate ")
        assert "all 9 layers" in text and "tune around this rate" in text

    @needs_transformers
    @pytest.mark.parametrize("method", ["loram", "pissa"])
    def test_one_weight_at_a_time(self, method, llama, monkeypatch, capsys):
        held, most, load = [], [], StoredTensor.load

        def counted(self):
            tensor = load(self)
            held.append(1)
            weakref.finalize(tensor, held.pop)
            most.append(len(held))
            return tensor

        monkeypatch.setattr(StoredTensor, "load", counted)
        values(capsys, llama, "--method", method, "-r", 4)
        assert len(most) == 14 and max(most) <= 2  # the loop's own name holds the last one


class TestErrors:
    @pytest.mark.parametrize(
        "arguments,match",
        [
            (["--method", "lorram"], "did you mean 'loram'?"),
            (["--method", "lora_one"], "lora_kernels.suggest with gradients=capture_gradients"),
            (["--method", "eva"], "lora_kernels.suggest with activations=capture_activations"),
            (["-r", "0"], "r must be at least 1"),
            (["-r", "99"], "is left to adapt with r = 99"),
            (["-r", "20", "--targets", "q_proj"], "model.layers.0.q_proj: rank must be in [1, 16]"),
            (["--lora-alpha", "-1"], "lora_alpha must be positive"),
            (["--ratio", "0"], "--ratio must be positive"),
            (["--targets", "q_prok"], "did you mean 'q_proj'?"),
            (["--reference-r", "4"], "--reference-r needs the learning rate of that reference"),
            (["--reference-rslora"], "--reference-rslora needs the learning rate"),
            (["--reference-lr", "0"], "--reference-lr must be positive"),
            (["--reference-lr", "1e-3", "--reference-method", "corda"], "'corda' starts from the"),
        ],
    )
    def test_one_line(self, arguments, match, odd_model, capsys):
        self.fails(capsys, odd_model, *arguments, match=match)

    def test_paths(self, odd_model, tmp_path, capsys):
        self.fails(capsys, tmp_path / "nowhere", match="does not exist")
        out = tmp_path / "start"
        assert main(["init", str(odd_model), str(out), "-r", "4", "--quiet"]) == 0
        self.fails(capsys, out, match="is a residual base, from which a start was subtracted")
        self.fails(capsys, out / "adapter", match="is an adapter: give the model that it adapts")

    @pytest.mark.parametrize("layers", ["0", "-1", "some"])
    def test_wrong_usage(self, layers, odd_model, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(["suggest", str(odd_model), "--layers", layers])
        assert "must be a number of at least 1, or all" in capsys.readouterr().err

    @staticmethod
    def fails(capsys, path: Path, *arguments: str, match: str) -> None:
        assert main(["suggest", str(path), *arguments]) == 1
        error = capsys.readouterr().err
        assert match in error and error.startswith("lora-kernels suggest: ")
        assert error.count("\n") == 1
