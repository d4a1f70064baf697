"""PEFT's adapters of experts whose weights are one tensor are refused by what they are, whether the
configuration names them or not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_kernels import load_adapter
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.cli import main
from lora_kernels.files.adapter.folder import read_adapter

from ...support.packages import needs_peft
from ...support.running import move
from ...support.tiny_models import llama

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
pytestmark = needs_peft

R, EXPERTS = 2, 4
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
REFUSED = r"experts whose weights are one tensor.*not implemented here: load it with PEFT"


def save(folder: Path, parameters: list[str], kind: str = "qwen3_moe", **options) -> Path:
    """By PEFT, with `target_parameters`."""
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = {
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **sizes, num_experts=EXPERTS, moe_intermediate_size=16, head_dim=8
        ),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, num_local_experts=EXPERTS),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **sizes, num_local_experts=EXPERTS, head_dim=8, layer_types=["full_attention"]
        ),
    }[kind]()
    options = {"r": R, "target_modules": ["q_proj"], "target_parameters": parameters} | options
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    move(model)
    model.save_pretrained(folder)
    return folder


def without_names(folder: Path) -> Path:
    """As older programs and other ones than PEFT write the configuration."""
    file = folder / ADAPTER_CONFIG
    values = json.loads(file.read_text())
    values.pop("target_parameters")
    file.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("parameters", [[GATE_UP, DOWN], [DOWN], [GATE_UP]], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_experts_in_one_tensor(kind, parameters, options, tmp_path):
    folder = save(tmp_path / "a", parameters, kind, **options)
    with pytest.raises(ValueError, match=r"target_parameters.*not implemented here"):
        read_adapter(folder)
    tensors = safetensors.load_file(without_names(folder) / ADAPTER_FILE)
    rows = {len(t) for name, t in tensors.items() if "experts" in name and "lora_A" in name}
    assert rows == {R * EXPERTS}
    with pytest.raises(ValueError, match=rf"has {R * EXPERTS} rows.*r = {R}.*{REFUSED}") as caught:
        read_adapter(folder)
    assert "different adapters" not in str(caught.value)
    with pytest.raises(ValueError, match=REFUSED):
        load_adapter(llama(), folder, progress=False)


def test_commands(tmp_path, capsys):
    folder = without_names(save(tmp_path / "a", [GATE_UP, DOWN]))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
    assert "load it with PEFT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (R * EXPERTS, "different adapters, or it is one of 4 experts in one tensor.*with PEFT"),
        (3 * R + 1, "rank 7, the configuration says 2: they belong to different adapters$"),
        (1, "rank 1, the configuration says 2: they belong to different adapters$"),
    ],
)
def test_layers_of_other_names(rows, match, tmp_path):
    """GraniteMoe calls its experts `input_linear`; another rank can be the reason, too."""
    folder = without_names(save(tmp_path / "a", [DOWN]))
    tensors = {k: t for k, t in safetensors.load_file(folder / ADAPTER_FILE).items() if "q_p" in k}
    name = "base_model.model.model.layers.0.block_sparse_moe.input_linear"
    tensors |= {f"{name}.lora_A.weight": torch.randn(rows, 32)}
    tensors |= {f"{name}.lora_B.weight": torch.randn(64, rows)}
    safetensors.save_file(tensors, folder / ADAPTER_FILE)
    with pytest.raises(ValueError, match=match):
        read_adapter(folder)
