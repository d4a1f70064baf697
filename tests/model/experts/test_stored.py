"""Where checkpoints store experts: against what `save_pretrained` writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_kernels.model.experts.stored import StoredMatrix, stored_matrices

from ...support.tiny_experts import EXPERTS, FAMILIES, expert_parameters, tiny_experts

transformers = pytest.importorskip("transformers", minversion="5.0")
# The names of each expert's tensors, or of the 3-D tensors, as the published files have them.
NAMES = {
    "Mixtral": ("model.layers.0.block_sparse_moe.experts.{}.", "w1", "w3", "w2"),
    "Qwen3Moe": ("model.layers.0.mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
    "Qwen2Moe": ("model.layers.0.mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
    "Olmoe": ("model.layers.0.mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
    "DeepseekV3": ("model.layers.0.mlp.experts.{}.", "gate_proj", "up_proj", "down_proj"),
    "NemotronH": ("backbone.layers.0.mixer.experts.{}.", "up_proj", "down_proj"),
    "GptOss": ("model.layers.0.mlp.experts.", "gate_up_proj", "down_proj"),
    "GraniteMoe": ("model.layers.0.block_sparse_moe.", "input_linear", "output_linear"),
    "Qwen3VLMoe": ("model.language_model.layers.0.mlp.experts.", "gate_up_proj", "down_proj"),
}


def parts_of(model: nn.Module, parameter: str, **options) -> list[StoredMatrix]:
    found = stored_matrices(model, parameter, **options)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_those_that_save_pretrained_writes(family, tmp_path):
    model = tiny_experts(family)
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    named = []
    for parameter in expert_parameters(model):
        owner = model.get_submodule(parameter.rpartition(".")[0])
        value = model.get_parameter(parameter).detach()
        weight = value.mT if getattr(owner, "is_transposed", False) else value  # [E, out, in]
        for part in parts_of(model, parameter):
            stored = files[part.name]
            assert stored.shape == part.shape(EXPERTS, weight.shape[2])
            assert torch.equal(stored, part.part_of(weight))
            named.append(part.name)
    prefix, *endings = NAMES[family]
    weight = ".weight" if family not in ("GptOss", "Qwen3VLMoe") else ""
    experts = range(EXPERTS) if "{}" in prefix else range(1)
    assert sorted(named) == sorted(
        f"{prefix.format(e)}{ending}{weight}" for e in experts for ending in endings
    )


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_the_order_is_by_experts_and_then_by_rows(family):
    model = tiny_experts(family, num_local_experts=11)
    fused, down = (parts_of(model, name) for name in expert_parameters(model))
    if family == "GptOss":
        assert [(p.expert, p.rows, p.transposed) for p in fused] == [(None, slice(0, 48), True)]
        assert [(p.expert, p.rows, p.transposed) for p in down] == [(None, slice(0, 32), True)]
        return
    halves = (slice(0, 24), slice(24, 48))
    assert [(p.expert, p.rows) for p in fused] == [(e, rows) for e in range(11) for rows in halves]
    assert [(p.expert, p.rows) for p in down] == [(e, slice(0, 32)) for e in range(11)]
    assert not any(p.transposed for p in (*fused, *down))


def test_a_loaded_model_has_the_names_of_its_checkpoint(tmp_path):
    """Files in the model's own form are loaded as they are, and saved so."""
    model = tiny_experts("Mixtral")
    name = expert_parameters(model)[0]
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "joined", save_original_format=False)
    cls = transformers.MixtralForCausalLM
    each, joined = (cls.from_pretrained(tmp_path / kind) for kind in ("each", "joined"))
    assert len(parts_of(each, name)) == 2 * EXPERTS
    assert parts_of(joined, name) == [StoredMatrix(name, None, slice(0, 48), False)]


def test_a_model_on_meta_and_a_copy_give_the_same():
    with torch.device("meta"):
        config = transformers.Qwen3MoeConfig(**tiny_experts("Qwen3Moe").config.to_dict())
        on_meta = transformers.Qwen3MoeForCausalLM(config)
    model = tiny_experts("Qwen3Moe")
    name = expert_parameters(model)[1]
    assert parts_of(on_meta, name) == parts_of(model, name)


def test_files_of_another_shape_are_transposed_on_loading():
    """The published qwen3_vl_moe has [E, in, out] on disk; transformers saves [E, out, in]."""
    model = tiny_experts("Qwen3VLMoe")
    name = expert_parameters(model)[0]
    (saved,) = parts_of(model, name)
    (published,) = parts_of(model, name, loaded_as_other_shape=True)
    assert saved.shape(EXPERTS, 32) == (EXPERTS, 48, 32)
    assert published.shape(EXPERTS, 32) == (EXPERTS, 32, 48)
    assert saved.name == published.name


def test_text_and_vision_experts_in_one_list_are_not_known():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "moe_intermediate_size": [24, 16]}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 96}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config={
            **sizes,
            **{"rope_parameters": rope, "mlp_layer_types": ["dense", "sparse"]},
            **{"moe_num_experts": EXPERTS, "moe_k": 2, "intermediate_size": 40},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
    )
    with torch.device("meta"):
        model = transformers.Ernie4_5_VLMoeForConditionalGeneration(config)
    name = next(n for n in expert_parameters(model) if "text_moe" in n)
    reason = stored_matrices(model, name)
    assert isinstance(reason, str) and "cannot convert it apart from the rest" in reason


def test_interleaved_rows_are_not_known():
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Interleave, WeightConverter

    class InterleavedForTest(transformers.MixtralForCausalLM):
        pass

    converter = WeightConverter(
        "experts.w13_weight", "experts.gate_up_proj", operations=[Interleave(dim=1)]
    )
    register_checkpoint_conversion_mapping("InterleavedForTest", [converter])
    model = InterleavedForTest(tiny_experts("Mixtral").config)
    model._weight_conversions = [converter]
    reason = stored_matrices(model, expert_parameters(model)[0])
    assert isinstance(reason, str) and "another arrangement" in reason and "w13_weight" in reason


def test_a_module_of_its_own_stores_its_parameter():
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(3, 5, 7))

    (part,) = parts_of(nn.ModuleDict({"experts": Experts()}), "experts.up_proj")
    assert part == StoredMatrix("experts.up_proj", None, slice(0, 7), True)


def test_names_that_are_no_expert_parameters():
    model = tiny_experts("Qwen3Moe")
    with pytest.raises(ValueError, match=r"has no parameter 'experts\.up_proj'"):
        stored_matrices(model, "experts.up_proj")
    with pytest.raises(ValueError, match=r"is \[96, 32\], not \[experts"):
        stored_matrices(model, "lm_head.weight")
