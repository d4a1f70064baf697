"""Which weights `initialize` chooses by the model, and what it says of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_kernels import LoRAConfig
from lora_kernels.files.checkpoint.architecture import Architecture, read_architecture
from lora_kernels.files.checkpoint.initialize import initialize

from ...support import tiny_models

pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_models.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit_tensors(base: Path, change) -> None:
    """Replaces each tensor by the ones that `change(name, tensor)` returns."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    edited = [change(name, tensor) for name, tensor in tensors.items()]
    save_file({k: v for part in edited for k, v in part.items()}, file, {"format": "pt"})


def edit_config(base: Path, **values) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))


def packed(name, tensor):
    """As compressed-tensors stores a layer."""
    stem = name.removesuffix("weight")
    codes = torch.zeros(len(tensor), tensor.shape[1] // 8, dtype=torch.int32)
    return {f"{stem}weight_packed": codes, f"{stem}weight_scale": torch.ones(len(tensor), 1)}


def float8(name, tensor):
    return {name: tensor.to(torch.float8_e4m3fn)}


@pytest.mark.parametrize("quantize", [packed, float8])
def test_partly_quantized(quantize, base, tmp_path):
    """Nothing is started in part: the user chooses."""

    def change(name, tensor):
        return quantize(name, tensor) if "layers.1.mlp" in name else {name: tensor}

    edit_tensors(base, change)
    with pytest.raises(ValueError, match=r"3 of 14 chosen layers are quantized .*layers\.1\.mlp"):
        initialize(base, tmp_path / "out", LoRAConfig(r=4))
    assert not (tmp_path / "out").exists()
    chosen = LoRAConfig(r=4, exclude_modules=r".*layers\.1\.mlp.*")
    assert initialize(base, tmp_path / "out", chosen).layers == 11


def test_weights_that_are_not_there(base, tmp_path):
    edit_tensors(base, lambda name, tensor: {} if "up_proj" in name else {name: tensor})
    done = initialize(base, tmp_path / "out", LoRAConfig(r=4))
    reason = "its weight is not in the files"
    assert done.layers == 12 and done.assumption == ""
    assert {n for n, why in done.skipped.items() if why == reason} == {
        f"model.layers.{block}.mlp.up_proj" for block in range(2)
    }
    with pytest.raises(ValueError, match=r"names 'model\.layers\.0\.mlp\.up_proj', but its weight"):
        initialize(base, tmp_path / "named", LoRAConfig(r=4, target_modules=["up_proj"]))


def test_a_configuration_of_another_size(base, tmp_path):
    edit_config(base, hidden_size=64)
    match = r"q_proj is \[32, 64\] by config\.json, its weight in the files \[32, 32\]"
    with pytest.raises(ValueError, match=match):
        initialize(base, tmp_path / "out", LoRAConfig(r=4))


def test_code_in_the_folder_is_not_run(base, tmp_path):
    """Nor is anybody asked: the layers are chosen by their names, which the summary says."""
    edit_config(base, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    (base / "configuration_mine.py").write_text("raise SystemExit('ran')")
    done = initialize(base, tmp_path / "out", LoRAConfig(r=4))
    assert done.layers == 14
    assert "contains custom code" in done.assumption and "it is assumed" in done.assumption


def test_ranks(base, tmp_path):
    """As in `add_lora`: small layers are left out, unless they are named."""
    done = initialize(base, tmp_path / "out", LoRAConfig(r=20))
    small = {name for name, why in done.skipped.items() if why.startswith("r = 20 is larger")}
    assert small == {f"model.layers.{k}.self_attn.{p}_proj" for k in range(2) for p in "kv"}
    with pytest.raises(ValueError, match=r"rank 20 is larger .* 16 of .*k_proj"):
        initialize(base, tmp_path / "named", LoRAConfig(r=20, target_modules=["k_proj"]))


def test_a_tied_head(tmp_path):
    tiny_models.llama(tied=True).save_pretrained(tmp_path / "base")
    config = LoRAConfig(r=4, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"names 'lm_head', but its weight is model\.embed_tokens"):
        initialize(tmp_path / "base", tmp_path / "out", config)
    implicit = LoRAConfig(r=4, target_modules=["lm_head"], residual="implicit")
    assert initialize(tmp_path / "base", tmp_path / "out", implicit).layers == 1


def test_names_and_ties(base):
    tensors = load_file(base / "model.safetensors")
    architecture = read_architecture(base, tensors)
    assert isinstance(architecture, Architecture)
    assert architecture.stored == {name: name for name in tensors}
    assert not architecture.converted and not architecture.unused
    assert architecture.tied("lm_head.weight") == []
    assert all(tensor.is_meta for tensor in architecture.model.state_dict().values())
    other = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    assert "does not have most of the weights" in str(read_architecture(base, other))
