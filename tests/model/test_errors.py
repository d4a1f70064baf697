"""Invalid calls raise an error and leave the model unchanged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    disable_adapters,
    enable_adapters,
    merge_lora,
    unload_lora,
)
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state, apply_state

from ..support.packages import needs_transformers
from ..support.running import quiet, snapshot, start_data
from ..support.tiny_models import gpt2, llama

pytestmark = needs_transformers


def zero_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()


def bad_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan


ERRORS = [
    (zero_weight, {}, ValueError, r"layers\.1\.mlp\.down_proj: weight is zero"),
    (bad_weight, {}, ValueError, r"layers\.1\.mlp\.down_proj: .*NaN"),
    (bad_weight, {"init_lora_weights": "pissa"}, ValueError, r"layers\.1\.mlp\.down_proj: .*NaN"),
    (
        None,
        {"r": 17, "target_modules": ["k_proj"]},
        ValueError,
        r"r = 17 is larger than min\(out, in\) = 16 of .*k_proj",
    ),
    (None, {"target_modules": ["q_porj"]}, ValueError, "'q_porj'.*did you mean 'q_proj'"),
    (None, {"target_modules": "q_proj"}, ValueError, "regular expression 'q_proj'"),
    (None, {"target_modules": ["norm"]}, TypeError, "'model.norm', a LlamaRMSNorm"),
    (None, {"exclude_modules": ["q_porj"]}, ValueError, "exclude_modules.*'q_proj'"),
    (None, {"exclude_modules": ".*"}, ValueError, "no layer .* is left to adapt"),
    (None, {"rank_pattern": {"q_porj": 2}}, ValueError, "rank_pattern has 'q_porj'.*'q_proj'"),
    (None, {"alpha_pattern": {"head": 2}}, ValueError, "alpha_pattern has 'head'"),
    (None, {"layers_to_transform": [0, 7]}, ValueError, "names block 7.* 0 to 1"),
    (None, {"init_lora_weights": "lora_ga"}, ValueError, "gradients=capture_gradients"),
]


@pytest.mark.parametrize("spoil,options,error,message", ERRORS)
def test_errors_change_nothing(spoil, options, error, message):
    model = llama()
    if spoil:
        spoil(model)
    check_unchanged = snapshot(model)
    with pytest.raises(error, match=message):
        quiet(model, LoRAConfig(**{"r": 4, **options}))
    check_unchanged()


class TestWrongCalls:
    def test_no_adapters(self):
        for function in (merge_lora, unload_lora, disable_adapters, enable_adapters, adapter_state):
            with pytest.raises(ValueError, match="has no adapters: add_lora"):
                function(llama())

    def test_other_things(self):
        peft = pytest.importorskip("peft")
        with pytest.raises(TypeError, match="config must be a LoRAConfig, got dict"):
            quiet(llama(), {"r": 4})
        with pytest.raises(TypeError, match=r"lora_kernels\.peft\.initialize"):
            quiet(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])))
        with pytest.raises(TypeError, match=r"use LoRALinear\.from_linear"):
            quiet(nn.Linear(8, 8))
        with pytest.raises(TypeError, match="before it is wrapped"):
            quiet(torch.compile(llama()))
        with pytest.raises(ValueError, match="does not use gradients"):
            quiet(llama(), LoRAConfig(r=2), gradients={})

    def test_gradients_of_other_layers(self):
        model, config = llama(), LoRAConfig(r=2, init_lora_weights="lora_ga")
        gradients = start_data(model, config)["gradients"]
        del gradients["model.layers.1.mlp.up_proj"]
        with pytest.raises(ValueError, match=r"none for model\.layers\.1\.mlp\.up_proj"):
            quiet(model, config, gradients=gradients)

    def test_a_state_that_does_not_fit(self):
        model = llama()
        quiet(model, LoRAConfig(r=2))
        state = adapter_state(model)
        other = gpt2()
        with pytest.raises(
            ValueError, match=r"layers\.0\.self_attn\.q_proj.* no linear layer of this GPT2"
        ):
            apply_state(other, state, progress=False)
        assert not adapted_layers(other)
