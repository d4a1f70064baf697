"""Weights in files: which ones are selected, their order and orientation, and errors."""

from __future__ import annotations

import json

import pytest
import torch

from lora_kernels._utils.model_files import INDEX, stored_tensors
from lora_kernels.files.checkpoint.weights import stored_weights

safetensors = pytest.importorskip("safetensors.torch")


def write(path, tensors, **config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    if config:
        (path.parent / "config.json").write_text(json.dumps(config))


def model_tensors(layers=12):
    tensors = {
        "model.embed_tokens.weight": torch.randn(9, 4),
        "lm_head.weight": torch.randn(9, 4),
        "model.norm.weight": torch.randn(4),
        "model.layers.0.q_proj.bias": torch.randn(4),
        "model.layers.0.conv.weight": torch.randn(2, 2, 2),
        "model.layers.0.packed.weight": torch.zeros(4, 4, dtype=torch.uint8),
    }
    for layer in range(layers):
        tensors[f"model.layers.{layer}.q_proj.weight"] = torch.randn(4, 4)
        tensors[f"model.layers.{layer}.up_proj.weight"] = torch.randn(6, 4).bfloat16()
    return tensors


class TestWeights:
    def test_single_file_and_folder(self, tmp_path):
        tensors = model_tensors()
        write(tmp_path / "model.safetensors", tensors)
        write(tmp_path / "consolidated.safetensors", tensors)  # the same again, as some models have
        for path in (tmp_path, tmp_path / "model.safetensors"):
            weights = stored_weights(path)
            assert [w.name for w in weights] == [
                f"model.layers.{layer}.{end}"
                for layer in range(12)
                for end in ("q_proj", "up_proj")
            ]
            for weight in weights:
                assert torch.equal(weight.load(), tensors[f"{weight.name}.weight"])
        assert len(stored_tensors(tmp_path)) == len(tensors)

    def test_shards(self, tmp_path):
        tensors = model_tensors()
        halves = [dict(list(tensors.items())[k::2]) for k in (0, 1)]
        index = {}
        for k, half in enumerate(halves):
            write(tmp_path / f"model-{k}.safetensors", half)
            index |= dict.fromkeys(half, f"model-{k}.safetensors")
        write(tmp_path / "stray.safetensors", {"other.weight": torch.randn(3, 3)})
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
        weights = stored_weights(tmp_path)
        assert len(weights) == 24 and weights[20].name == "model.layers.10.q_proj"
        for weight in weights:
            assert torch.equal(weight.load(), tensors[f"{weight.name}.weight"])
        (tmp_path / "model-1.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"names model-1.safetensors, which is not in"):
            stored_weights(tmp_path)

    def test_targets(self, tmp_path):
        write(tmp_path / "model.safetensors", model_tensors())

        def names(targets):
            return [weight.name for weight in stored_weights(tmp_path, targets)]

        assert len(names(["q_proj"])) == 12
        assert names(["layers.3.q_proj", "lm_head"]) == ["lm_head", "model.layers.3.q_proj"]
        assert names(r".*\.1\.up_proj") == ["model.layers.1.up_proj"]
        assert len(names("All-Linear")) == 24
        with pytest.raises(ValueError, match="'q_prok'; did you mean 'q_proj'"):
            names(["q_prok"])

    @pytest.mark.parametrize("model_type,shape", [("gpt2", (6, 4)), ("llama", (4, 6))])
    def test_conv1d_models_are_transposed(self, model_type, shape, tmp_path):
        weight = torch.randn(4, 6)
        write(tmp_path / "model.safetensors", {"h.0.c_fc.weight": weight}, model_type=model_type)
        loaded = stored_weights(tmp_path)[0].load()
        assert loaded.shape == shape
        assert torch.equal(loaded if model_type == "llama" else loaded.T, weight)

    def test_nothing_to_take(self, tmp_path):
        write(tmp_path / "a.safetensors", {"x.weight": torch.zeros(4, 4, dtype=torch.uint8)})
        with pytest.raises(ValueError, match="its tensors are U8"):
            stored_weights(tmp_path / "a.safetensors")
        write(tmp_path / "b.safetensors", {"x.lora_A.weight": torch.zeros(4, 4)})
        with pytest.raises(ValueError, match="holds a LoRA adapter: give the folder"):
            stored_weights(tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match=r"several .safetensors files and no index"):
            stored_weights(tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"no .safetensors file"):
            stored_weights(tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            stored_weights(tmp_path / "nowhere")
        (tmp_path / "model.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=r"is not a \.safetensors file"):
            stored_weights(tmp_path / "model.bin")

    @pytest.mark.parametrize("length", [0, 4, 40, -8])
    def test_truncated(self, length, tmp_path):
        path = tmp_path / "model.safetensors"
        write(path, model_tensors())
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            stored_weights(path)

    @pytest.mark.parametrize(
        "text,match", [("{", "is not valid JSON"), ("[]", "does not hold a JSON object")]
    )
    def test_bad_index(self, text, match, tmp_path):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ValueError, match=match):
            stored_weights(tmp_path)
        for text in ("{}", '{"weight_map": {"a.weight": 5}}'):
            (tmp_path / INDEX).write_text(text)
            with pytest.raises(ValueError, match="has no weight_map"):
                stored_weights(tmp_path)
