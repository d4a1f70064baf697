"""Modules trained in full, biases, and weights that are tied or shared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    disable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)

from ..support.packages import needs_transformers
from ..support.running import TIGHT, logits, quiet, train
from ..support.tiny_models import gpt2, llama

pytestmark = needs_transformers


class Twice(nn.Module):
    """A layer with two names, two layers with the same weight, and a block in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.tied = nn.Linear(12, 12)
        self.partner = nn.Linear(12, 12)
        self.partner.weight = self.tied.weight
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh())] * 2)

    def forward(self, x):
        x = self.again(torch.tanh(self.first(x)))
        x = self.partner(torch.tanh(self.tied(x)))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["loram", "pissa"])
def test_shared_layers_and_weights(name):
    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(3, 12, dtype=torch.float64)
    base = model(x)
    report = quiet(model, LoRAConfig(r=2, init_lora_weights=name))
    rows = {row.name: row for row in report.adapted}
    assert list(rows) == ["first", "tied", "partner", "blocks.0.0"]
    assert rows["first"].aliases == ("again",) and rows["blocks.0.0"].aliases == ("blocks.1.0",)
    assert model.again is model.first and model.blocks[0] is model.blocks[1]
    assert {n: row.residual for n, row in rows.items()} == {
        "first": "absorb",
        "tied": "implicit",
        "partner": "implicit",
        "blocks.0.0": "absorb",
    }
    assert "partner.weight too" in rows["tied"].note
    assert (model(x) - base).abs().max() <= TIGHT
    with pytest.raises(
        ValueError, match=r"tied cannot absorb its start, its weight is partner\.weight"
    ):
        quiet(Twice(), LoRAConfig(r=2, residual="absorb"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    trained = model(x)
    merged = merge_lora(copy.deepcopy(model))
    assert (merged(x) - trained).abs().max() <= TIGHT
    assert merged.again is merged.first
    unload_lora(model)
    assert (model(x) - base).abs().max() <= TIGHT
    assert model.partner.weight is model.tied.weight and model.again is model.first


@pytest.mark.parametrize("merged", [True, False])
def test_a_tied_head(merged, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama(tied=True)
    base = logits(model)
    report = quiet(model, LoRAConfig(r=4, target_modules=["lm_head", "q_proj"]))
    assert [row.residual for row in report.adapted].count("implicit") == 1
    train(model)
    trained = logits(model)
    if merged:
        merge_lora(model).save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert (logits(again) - trained).abs().max() <= 1e-5
    else:
        unload_lora(model)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert (logits(model) - base).abs().max() <= 1e-5


class TestTrainedInFull:
    @pytest.mark.parametrize("tied", [False, True])
    def test_modules_to_save(self, tied, tmp_path):
        model = llama(tied=tied, dtype=torch.float64)
        base, embedding = logits(model), model.get_input_embeddings().weight.clone()
        config = LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
        report = quiet(model, config)
        assert report.saved == ("model.norm.weight", "lm_head.weight")
        assert (logits(model) - base).abs().max() <= TIGHT
        train(model)
        trained = logits(model)
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert not torch.equal(
            model.lm_head.weight, llama(tied=tied, dtype=torch.float64).lm_head.weight
        )
        with disable_adapters(model):
            assert (logits(model) - base).abs().max() <= TIGHT
        assert torch.equal(logits(model), trained)
        for format in ("peft", "native"):
            fresh = llama(tied=tied, dtype=torch.float64)
            save_adapter(model, tmp_path / format, format=format)
            load_adapter(fresh, tmp_path / format, progress=False)
            # PEFT's files are in float32.
            assert (logits(fresh) - trained).abs().max() <= (1e-5 if format == "peft" else 0)
        unload_lora(model)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert (logits(model) - base).abs().max() <= TIGHT

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases(self, bias):
        model = gpt2(dtype=torch.float64)
        base = logits(model)
        quiet(model, LoRAConfig(r=2, target_modules=["c_attn"], bias=bias))
        names = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
        every = {n for n, _ in gpt2().named_parameters() if n.endswith("bias")}
        assert names == (every if bias == "all" else {n for n in every if "c_attn" in n})
        train(model)
        trained = logits(model)
        assert (trained - base).abs().max() > 1e-3
        with disable_adapters(model):
            assert (logits(model) - base).abs().max() <= TIGHT
        merged = merge_lora(copy.deepcopy(model))
        assert (logits(merged) - trained).abs().max() <= TIGHT

    def test_misspelt(self):
        with pytest.raises(ValueError, match=r"'lm_haed', which modules_to_save.*'lm_head'"):
            quiet(llama(), LoRAConfig(r=2, modules_to_save=["lm_haed"]))
