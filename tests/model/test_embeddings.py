"""Adapted embeddings of whole models: selection, tied heads, resized vocabularies, files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    adapter_names,
    capture_gradients,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state, apply_state

from ..support.packages import needs_transformers
from ..support.running import TIGHT, logits, quiet, token_ids, train
from ..support.tiny_models import VOCABULARY, gpt2, llama

pytestmark = needs_transformers

EMBED, HEAD = "model.embed_tokens", "lm_head"


def config(*targets, **options) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "target_modules": list(targets or ["embed_tokens"])} | options)


def double(tied: bool = False, **options) -> nn.Module:
    return llama(tied=tied, dtype=torch.float64, **options)


class TestSelection:
    def test_all_linear_knows_no_embedding(self):
        report = quiet(llama(), LoRAConfig(r=4))
        assert not any("embed" in name for name in [r.name for r in report.adapted])
        assert not any("embed" in name for name in report.skipped)
        assert not any("embed" in name for name in quiet(llama(), config("q_proj")).skipped)

    def test_named(self):
        report = quiet(llama(), config("embed_tokens", "q_proj"))
        row = report.adapted[0]
        assert (row.name, row.kind, row.residual) == (EMBED, "embedding", "absorb")
        assert (row.out_features, row.in_features) == (32, VOCABULARY)
        assert f"1 x {EMBED} [32, {VOCABULARY}]: r=4" in str(report)
        report = quiet(gpt2(), config("wte", "wpe", "c_attn", rank_pattern={"wpe": 2}))
        assert [row.r for row in report.adapted[:2]] == [4, 2]
        expression = LoRAConfig(r=4, target_modules=r".*embed_tokens")
        assert [row.name for row in quiet(llama(), expression).adapted] == [EMBED]

    def test_excluded(self):
        report = quiet(llama(), config("embed_tokens", "q_proj", exclude_modules=["embed_tokens"]))
        assert report.skipped[EMBED] == "in exclude_modules"

    def test_rank_too_large(self):
        with pytest.raises(ValueError, match=rf"r = 64 is larger than .* 32 of {EMBED} \[32, 96\]"):
            quiet(llama(), config(r=64))

    def test_a_single_embedding_is_no_model(self):
        with pytest.raises(TypeError, match="the model is a single Embedding"):
            quiet(nn.Embedding(8, 8), config("0"))


class TestLife:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
    @pytest.mark.parametrize("init", ["loram", "lora"])
    def test_from_start_to_end(self, init, targets, tied, tmp_path):
        model = double(tied)
        base, original = logits(model), copy.deepcopy(model)
        report = quiet(model, config(*targets, init_lora_weights=init))
        by_name = {row.name: row for row in report.adapted}
        assert by_name[EMBED].residual == ("implicit" if tied else "absorb")
        assert (logits(model) - base).abs().max() <= TIGHT
        if tied and len(targets) == 1:
            assert torch.equal(logits(model), base) and "lm_head.weight too" in str(report)
            assert model.lm_head.weight is model.model.embed_tokens.weight
        losses = train(model, lr=3e-3)
        trained = logits(model)
        assert all(map(torch.isfinite, torch.tensor(losses))) and not torch.equal(trained, base)
        with disable_adapters(model):
            assert (logits(model) - base).abs().max() <= TIGHT
        state = adapter_state(model)
        assert state.layers[EMBED].embedding and state.layers[EMBED].shape == (32, VOCABULARY)
        for form in ("peft", "native"):
            fresh = copy.deepcopy(original)
            save_adapter(model, tmp_path / form, format=form)
            load_adapter(fresh, tmp_path / form, progress=False)
            assert (logits(fresh) - trained).abs().max() <= (1e-5 if form == "peft" else TIGHT)
        merged = merge_lora(copy.deepcopy(model))
        assert (logits(merged) - trained).abs().max() <= TIGHT
        assert type(merged.model.embed_tokens) is nn.Embedding
        assert not merged.config.tie_word_embeddings
        unload_lora(model)
        assert (logits(model) - base).abs().max() <= TIGHT
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    def test_a_merged_model_is_saved_untied(self, tmp_path):
        model = double(tied=True)
        head = model.lm_head.weight.detach().clone()
        quiet(model, config())
        train(model)
        trained = logits(model)
        merge_lora(model)
        assert torch.equal(model.lm_head.weight, head)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        assert (logits(again) - trained).abs().max() <= TIGHT

    def test_several_adapters(self):
        model = double(tied=True)
        base = logits(model)
        quiet(model, config(residual="implicit"), adapter_name="one")
        train(model)
        one = logits(model)
        quiet(model, config("q_proj", residual="implicit"), adapter_name="two")
        assert torch.equal(logits(model), base)
        quiet(model, config(residual="implicit", r=2), adapter_name="three")
        assert torch.equal(logits(model), base)
        set_adapter(model, "one")
        assert torch.equal(logits(model), one)
        assert adapter_names(model) == ["one", "two", "three"]

    def test_a_start_of_gradients(self):
        model, ids = double(), token_ids()
        batches = [{"input_ids": ids, "labels": ids}]
        gradients = capture_gradients(model, batches, ["embed_tokens"], progress=False)
        assert gradients[EMBED].shape == (32, VOCABULARY)
        model(**batches[0]).loss.backward()
        assert torch.allclose(gradients[EMBED], model.model.embed_tokens.weight.grad.T)
        base = logits(model)
        quiet(model, config(init_lora_weights="lora_ga"), gradients=gradients)
        assert (logits(model) - base).abs().max() <= TIGHT
        tied = double(tied=True)
        found = capture_gradients(tied, batches, ["embed_tokens", "lm_head"], progress=False)
        assert torch.equal(found[EMBED], found[HEAD].T)
        both = config("embed_tokens", "lm_head", init_lora_weights="lora_ga")
        base = logits(tied)
        quiet(tied, both, gradients=found)
        assert (logits(tied) - base).abs().max() <= TIGHT

    def test_rewriting_needs_a_weight_of_its_own(self):
        assert quiet(llama(), config(init_lora_weights="loftq")).adapted[0].residual == "absorb"
        with pytest.raises(ValueError, match=f"{EMBED}: the start of LoftQ"):
            quiet(llama(tied=True), config(init_lora_weights="loftq"))

    def test_hotswapping(self, tmp_path):
        one, two = double(), double()
        for model, seed in ((one, 1), (two, 5)):
            quiet(model, config(residual="implicit"))
            train(model, seed=seed)
        save_adapter(two, tmp_path, format="native")
        hotswap_adapter(one, tmp_path)
        assert torch.equal(logits(one), logits(two))

    def test_hotswapping_refuses_another_kind_of_layer(self, tmp_path):
        for old, new in (
            (nn.Embedding(6, 4), nn.Linear(6, 4)),
            (nn.Linear(6, 4), nn.Embedding(6, 4)),
        ):
            saved, model = nn.ModuleDict({"layer": old}), nn.ModuleDict({"layer": new})
            for each in (saved, model):
                quiet(each, config("layer", r=2, residual="implicit"))
            save_adapter(saved, tmp_path, format="native")
            with pytest.raises(ValueError, match=r"layer: its layer is (no|an) embedding"):
                hotswap_adapter(model, tmp_path)

    def test_hooks_and_checkpointing(self):
        model = double().train()
        quiet(model, config(residual="implicit"))
        model.enable_input_require_grads()  # a hook on the embedding
        plain = copy.deepcopy(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = token_ids()
        for each in (model, plain):
            each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        layers = [next(iter(adapted_layers(each).values())) for each in (model, plain)]
        assert torch.equal(layers[0].lora_A.grad, layers[1].lora_A.grad)
        merge_lora(model)
        assert model.model.embed_tokens._forward_hooks


class TestTiedEmbeddings:
    def test_one_of_those_of_bart(self, tmp_path):
        from transformers import BartConfig, BartForConditionalGeneration

        torch.manual_seed(0)
        options = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        options |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
        options |= {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
        options |= {"scale_embedding": True, "max_position_embeddings": 32, "dropout": 0.0}
        model = BartForConditionalGeneration(BartConfig(**options)).double().eval()
        ids = torch.arange(3, 13)[None]
        first = model(input_ids=ids).logits
        report = quiet(model, config("encoder.embed_tokens"))
        assert [row.residual for row in report.adapted] == ["implicit"]
        assert torch.equal(model(input_ids=ids).logits, first)
        with torch.no_grad():
            adapted_layers(model)["model.encoder.embed_tokens"].lora_B.add_(0.1)
        trained = model(input_ids=ids).logits
        merge_lora(model)
        assert not model.config.tie_word_embeddings
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        assert (again(input_ids=ids).logits - trained).abs().max() <= TIGHT


class TestResizedVocabularies:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_before_add_lora(self, form, tied, tmp_path):
        base = llama(tied)
        base.save_pretrained(tmp_path / "base")
        model = type(base).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(VOCABULARY + 5)
        quiet(model, config("embed_tokens", "q_proj"))
        train(model)
        ids = token_ids()
        ids[0, :3] = torch.tensor([VOCABULARY, VOCABULARY + 4, VOCABULARY + 1])
        trained = logits(model, ids)
        save_adapter(model, tmp_path / "adapter", format=form)
        fresh = type(base).from_pretrained(tmp_path / "base")
        size = VOCABULARY + 5
        with pytest.raises(ValueError, match=f"for {size} tokens.* has {VOCABULARY}: model.resize"):
            load_adapter(fresh, tmp_path / "adapter", progress=False)
        # With other new rows, which the adapter's file has.
        fresh.resize_token_embeddings(size, mean_resizing=False)
        load_adapter(fresh, tmp_path / "adapter", progress=False)
        assert (logits(fresh, ids) - trained).abs().max() <= 1e-6
        save_adapter(fresh, tmp_path / "again", format=form)
        merge_lora(fresh)
        assert (logits(fresh, ids) - trained).abs().max() <= 1e-6
        third = type(base).from_pretrained(tmp_path / "base")
        third.resize_token_embeddings(size, mean_resizing=False)
        load_adapter(third, tmp_path / "again", progress=False)
        assert (logits(third, ids) - trained).abs().max() <= 1e-6

    @pytest.mark.parametrize("tied", [False, True])
    def test_after_add_lora(self, tied):
        model = llama(tied)
        quiet(model, config())
        train(model)
        trained = logits(model)
        with pytest.raises(ValueError, match="cannot be resized to 101 rows: its adapter has 96"):
            model.resize_token_embeddings(101)
        assert torch.equal(logits(model), trained)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.resize_token_embeddings(VOCABULARY)  # to what it is


class TestStates:
    def test_of_other_kinds(self):
        model = llama()
        quiet(model, config("embed_tokens", "q_proj"))
        state = adapter_state(model)
        state.layers[EMBED].embedding = False
        with pytest.raises(ValueError, match="tokens is a linear layer, this model's is an embed"):
            apply_state(llama(), state)
        state.layers[EMBED].embedding = True
        state.layers["model.layers.0.self_attn.q_proj"].embedding = True
        with pytest.raises(ValueError, match=r"q_proj is an embedding, this model's is a linear"):
            apply_state(llama(), state)

    def test_with_a_bias(self):
        model = llama()
        quiet(model, config())
        state = adapter_state(model)
        state.layers[EMBED].lora_bias = torch.zeros(32)
        with pytest.raises(ValueError, match=f"the embedding {EMBED} cannot have a bias of lora_B"):
            apply_state(llama(), state)

    def test_other_widths(self):
        model = llama()
        quiet(model, config())
        with pytest.raises(ValueError, match=r"a weight \[32, 96\], this model has \[48, 96\]"):
            apply_state(llama(hidden_size=48), adapter_state(model))
