"""Adapted models in use: hooks, copies, Trainer, compile, and models with unusual layers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, disable_adapters, merge_lora, save_adapter, unload_lora
from lora_kernels.init import LoRAM
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state

from ..support.exhaustive import EXHAUSTIVE
from ..support.packages import needs_transformers
from ..support.running import TIGHT, logits, quiet, token_ids, train, training_arguments
from ..support.tiny_models import bert, falcon, llama, mamba

pytestmark = needs_transformers


class TestWhatSurvives:
    def test_hooks_and_attributes(self):
        model = llama()
        linear = model.model.layers[0].self_attn.q_proj
        calls = []
        handle = linear.register_forward_hook(lambda *args: calls.append("after"))
        linear.register_forward_pre_hook(lambda *args: calls.append("before"))
        linear._hf_something = "kept"
        quiet(model, LoRAConfig(r=4))
        layer = model.model.layers[0].self_attn.q_proj
        assert layer._hf_something == "kept"
        logits(model)
        assert calls == ["before", "after"]
        handle.remove()
        logits(model)
        assert calls == ["before", "after", "before"]
        for back in (merge_lora, unload_lora):
            plain = back(copy.deepcopy(model)).model.layers[0].self_attn.q_proj
            assert type(plain) is nn.Linear and plain._hf_something == "kept"
            assert len(plain._forward_pre_hooks) == 1
            assert not hasattr(plain, "scaling") and not hasattr(plain, "adapter_name")

    def test_accelerates_hook(self):
        hooks = pytest.importorskip("accelerate.hooks")

        class Doubles(hooks.ModelHook):
            def post_forward(self, module, output):
                return output * 2

        model = llama(dtype=torch.float64)
        for layer in model.model.layers:
            hooks.add_hook_to_module(layer.self_attn.v_proj, Doubles())
        base = logits(model)
        quiet(model, LoRAConfig(r=4))
        assert (logits(model) - base).abs().max() <= TIGHT
        train(model)
        trained = logits(model)
        assert (logits(merge_lora(model)) - trained).abs().max() <= TIGHT
        assert isinstance(model.model.layers[0].self_attn.v_proj._hf_hook, Doubles)

    def test_a_replaced_forward_is_refused(self):
        model = llama()
        linear = model.model.layers[0].self_attn.q_proj
        linear.forward = lambda x: x
        with pytest.raises(TypeError, match="q_proj"):
            quiet(model, LoRAConfig(r=4, target_modules=["q_proj"]))

    def test_base_is_frozen_and_mode_kept(self):
        model = llama().train()
        quiet(model, LoRAConfig(r=4))
        training = {n for n, p in model.named_parameters() if p.requires_grad}
        assert training and all(n.endswith((".lora_A", ".lora_B")) for n in training)
        assert all(layer.training for layer in adapted_layers(model).values())

    def test_deepcopy_and_pickle(self):
        model = llama()
        quiet(model, LoRAConfig(r=4, modules_to_save=["lm_head"]))
        train(model)
        want = logits(model)
        copied = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        for other in (copied, pickled):
            with disable_adapters(other):
                assert not torch.equal(logits(other), want)
            assert torch.equal(logits(other), want)
        train(copied)
        assert torch.equal(logits(model), want)

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_state_dict(self, residual):
        model, other = llama(), llama(seed=7)
        config = LoRAConfig(r=4, residual=residual)
        quiet(model, config)
        quiet(other, config)
        train(model)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer))
        assert torch.equal(logits(other), logits(model))
        with disable_adapters(other), disable_adapters(model):
            assert torch.equal(logits(other), logits(model))
        one, two = adapter_state(model), adapter_state(other)
        for name, layer in one.layers.items():
            assert layer.beta == two.layers[name].beta is not None


@pytest.mark.parametrize("mask", [False, True])
def test_torchs_encoder_does_not_bypass_the_adapters(mask):
    """Its fast path reads the weights directly, in eval mode without gradients."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]]) if mask else None
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    report = quiet(model, LoRAConfig(r=2))
    assert report.skipped["layers.0.self_attn.out_proj"].startswith("its forward")
    with torch.no_grad():
        for adapted in adapted_layers(model).values():
            adapted.lora_B.add_(0.3)
    trained = model(x, src_key_padding_mask=padding)
    assert trained.requires_grad
    kept = ~padding if mask else torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        off_the_fast_path = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(off_the_fast_path[kept], trained[kept], rtol=0, atol=1e-6)
        assert (trained - base)[kept].abs().max() > 1e-2
        unload_lora(model)
        assert model.layers[0].activation_relu_or_gelu == 1
        restored = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(restored[kept], base[kept], rtol=0, atol=1e-5)


class TestWithTransformers:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_trainer_trains_and_resumes(self, checkpointing, tmp_path):
        pytest.importorskip("accelerate")
        from transformers import Trainer

        data = [{"input_ids": row, "labels": row} for row in token_ids(8)]
        config = LoRAConfig(r=4, lora_dropout=0.1, init_lora_weights=LoRAM())
        runs = []
        for resume in (None, str(tmp_path / "checkpoint-2")):
            model = llama()
            quiet(model, config)
            options = training_arguments(tmp_path, gradient_checkpointing=checkpointing)
            trainer = Trainer(model, options, train_dataset=data)
            trainer.train(resume_from_checkpoint=resume)
            runs.append(model)
        for one, two in zip(*(run.parameters() for run in runs), strict=True):
            assert torch.equal(one, two)

    def test_generate(self):
        model = llama()
        quiet(model, LoRAConfig(r=4))
        train(model, lr=0.1)
        options = {"max_new_tokens": 6, "do_sample": False}
        tokens = model.generate(token_ids(1, 4), **options)
        assert torch.equal(tokens, merge_lora(model).generate(token_ids(1, 4), **options))

    @pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 compiles a Llama")
    def test_compile(self):
        model = llama()
        base = logits(model)
        quiet(model, LoRAConfig(r=4))
        compiled = torch.compile(model, fullgraph=True)
        assert (logits(compiled) - base).abs().max() <= 1e-5
        with disable_adapters(compiled):
            assert (logits(compiled) - base).abs().max() <= 1e-5

    def test_reentrant_checkpointing(self):
        losses = []
        for reentrant in (None, False, True):
            model = llama().train()
            quiet(model, LoRAConfig(r=4))
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            losses.append(train(model))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert losses[0] == pytest.approx(losses[2], rel=1e-6)


class TestUnusualLayers:
    """Models of transformers whose layers differ from what their class suggests."""

    def test_falcon(self):
        """FalconLinear has its own forward, which computes what nn.Linear computes."""
        model = falcon(torch.float64)
        base = logits(model)
        assert len(quiet(model, LoRAConfig(r=4)).adapted) == 8
        assert (logits(model) - base).abs().max() <= TIGHT
        train(model)
        trained = logits(model)
        assert (logits(merge_lora(model)) - trained).abs().max() <= TIGHT
        assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"

    def test_mamba(self):
        """Its mixer reads the weights of some layers directly."""
        model = mamba(torch.float64)
        base = logits(model)
        with pytest.raises(
            ValueError, match=r"dt_proj', but its MambaMixer reads the weight directly"
        ):
            quiet(model, LoRAConfig(r=2, target_modules=["dt_proj"]))
        report = quiet(model, LoRAConfig(r=2))
        assert {row.name.rpartition(".")[2] for row in report.adapted} == {"in_proj"}
        assert "without calling the layer" in report.skipped["backbone.layers.0.mixer.out_proj"]
        assert (logits(model) - base).abs().max() <= TIGHT

    @pytest.mark.parametrize("explicit", [False, True])
    def test_the_head_of_a_task(self, explicit, tmp_path):
        """It trains in full, as in PEFT, which can load the adapter."""
        peft = pytest.importorskip("peft")
        model = bert()
        fresh = copy.deepcopy(model)
        saved = ["classifier"] if explicit else None
        report = quiet(model, LoRAConfig(r=4, task_type="SEQ_CLS", modules_to_save=saved))
        assert report.saved == ("classifier.weight", "classifier.bias")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save_adapter(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path)
        assert type(theirs).__name__ == "PeftModelForSequenceClassification"
        ids = token_ids()
        with torch.no_grad():
            ours, theirs = model(ids).logits, theirs(input_ids=ids).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
