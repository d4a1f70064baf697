"""PEFT's `lora_bias`: a bias of B is read, merged and saved."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lora_kernels import (
    disable_adapters,
    hotswap_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.serving.convert import convert
from lora_kernels.layers.state import LayerState
from lora_kernels.model.config import AdapterState, LoRAConfig
from lora_kernels.model.lora import apply_state

from ...support.packages import needs_bitsandbytes, needs_peft
from ...support.peft_folders import by_peft, in_peft, loaded, merged_files, verified, with_config
from ...support.peft_models import adapted, initialize
from ...support.quantized import linear_4bit
from ...support.running import close, logits, move, same_bits, train, weights_of
from ...support.tiny_models import gpt2, llama

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = needs_peft


class TestBiasOfB:
    """`lora_bias`: PEFT adds s·b."""

    def test_computes_what_peft_computes(self, tmp_path):
        base = gpt2()
        model = by_peft(tmp_path / "peft", base, lora_bias=True, use_rslora=True)
        want = logits(model)
        before = weights_of(base)
        ours = loaded(base, tmp_path / "peft")
        assert close(logits(ours), want)
        with disable_adapters(ours):
            assert torch.equal(logits(ours), logits(base))
        for form in ("native", "peft"):
            save_adapter(ours, tmp_path / form, format=form)
            again = loaded(base, tmp_path / form)
            assert torch.equal(logits(again), logits(ours))
            state, first = read_adapter(tmp_path / form), read_adapter(tmp_path / "native")
            for name, layer in first.layers.items():
                assert torch.equal(layer.lora_bias, state.layers[name].lora_bias)
        assert close(logits(in_peft(base, tmp_path / "peft")), want)
        config = json.loads((tmp_path / "peft" / ADAPTER_CONFIG).read_text())
        assert config["lora_bias"] and config["use_rslora"] is False
        convert(tmp_path / "peft", tmp_path / "plain", compress_to=4)
        assert close(logits(loaded(base, tmp_path / "plain")), want)
        unload_lora(again)
        assert same_bits(weights_of(again), before)
        assert close(logits(merge_lora(ours)), want)

    def test_trains_as_in_peft(self, tmp_path):
        model = by_peft(tmp_path / "peft", gpt2(), lora_bias=True)
        ours = loaded(gpt2(), tmp_path / "peft")
        assert train(ours) == pytest.approx(train(model), rel=1e-5)
        assert close(logits(ours), logits(model), 1e3)

    def test_the_commands(self, tmp_path):
        base = gpt2()
        model = by_peft(tmp_path / "peft", base, lora_bias=True)
        assert close(logits(merged_files(base, tmp_path / "peft", tmp_path)), logits(model))
        assert all(verified(tmp_path / "peft", tmp_path / "base").values())
        pytest.importorskip("gguf")
        with pytest.raises(ValueError, match=r"biases of lora_B .* a GGUF adapter cannot"):
            convert(tmp_path / "peft", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")

    def test_biases_of_the_base_that_are_trained_too(self, tmp_path):
        base = gpt2()
        model = by_peft(tmp_path / "peft", base, lora_bias=True, bias="lora_only")
        ours = loaded(base, tmp_path / "peft")
        assert close(logits(ours), logits(model))
        assert close(logits(merge_lora(ours)), logits(model))
        assert close(logits(merged_files(base, tmp_path / "peft", tmp_path)), logits(model))

    @pytest.mark.filterwarnings("ignore:.*lora_bias=True")
    def test_a_base_without_biases(self, tmp_path):
        """They are added in memory; the files of the model have no place for them."""
        base = llama()
        model = by_peft(tmp_path / "peft", base, lora_bias=True)
        want = logits(model)
        ours = loaded(base, tmp_path / "peft")
        assert close(logits(ours), want)
        with pytest.warns(UserWarning, match="14 layers now have a bias"):
            assert close(logits(merge_lora(ours)), want)
        with pytest.raises(ValueError, match=r"a bias of lora_B, and .* has no 'model.layers.0"):
            merged_files(base, tmp_path / "peft", tmp_path)
        assert all(verified(tmp_path / "peft", tmp_path / "base").values())

    @needs_bitsandbytes
    def test_over_a_quantized_layer(self, tmp_path):
        """Where a wrapper adds them."""
        linear = nn.Linear(64, 48)
        quantized = linear_4bit(linear)
        holder = nn.Sequential(quantized)
        bias, x = torch.randn(48), torch.randn(5, 64)
        state = LayerState(torch.randn(4, 64), torch.randn(48, 4), 0.5, 2, lora_bias=bias)
        plain = quantized(x)
        apply_state(holder, AdapterState(LoRAConfig(r=4, lora_alpha=2), {"0": state}))
        update = 0.5 * (x @ state.lora_A.T @ state.lora_B.T + bias)
        assert torch.allclose(holder(x), plain + update, atol=1e-4)
        assert torch.equal(holder[0].layer_state().lora_bias, bias)
        merged = merge_lora(holder, dequantize=True)
        assert torch.allclose(merged(x), plain + update, atol=1e-3)

    def test_compiles_once_for_another_adapter(self, tmp_path):
        base = gpt2()
        by_peft(tmp_path / "first", base, lora_bias=True)
        other = adapted(base, lora_bias=True, lora_alpha=3)
        move(other, 0.05, seed=5)
        other.save_pretrained(tmp_path / "other")
        ours = loaded(base, tmp_path / "first", is_trainable=False)
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(ours, backend=counter)
        assert close(logits(compiled), logits(ours), 1e3)
        frames = counter.frame_count
        hotswap_adapter(ours, tmp_path / "other")
        assert close(logits(compiled), logits(other), 1e3)
        assert counter.frame_count == frames

    def test_hotswapping_needs_a_bias_on_both_sides(self, tmp_path):
        base = gpt2()
        by_peft(tmp_path / "with", base, lora_bias=True)
        by_peft(tmp_path / "without", base)
        for one, other in (("with", "without"), ("without", "with")):
            ours = loaded(base, tmp_path / one)
            want = logits(ours)
            with pytest.raises(ValueError, match="has lora_bias"):
                hotswap_adapter(ours, tmp_path / other)
            assert torch.equal(logits(ours), want)

    def test_from_a_model_of_lora_kernels_peft(self, tmp_path):
        base = gpt2()
        model = adapted(base, lora_bias=True)
        initialize(model, "loram")
        move(model, 0.05)
        model.save_pretrained(tmp_path)
        assert close(logits(loaded(base, tmp_path)), logits(model))

    @pytest.mark.parametrize(
        "change,match",
        [
            (lambda key, t: t.pop(key), r"lora_bias is true, but the bias .* is missing"),
            (lambda key, t: t.update({key: torch.zeros(3)}), r"\[3\] .*, expected \[96\]"),
            (
                lambda key, t: t.update({key: torch.zeros(96, dtype=torch.int32)}),
                "of torch.int32, expected",
            ),
            (
                lambda key, t: t.update({key.replace("h.0", "h.7"): t[key].clone()}),
                r"h.7.*has a bias of lora_B, but no lora_A",
            ),
        ],
    )
    def test_damaged(self, change, match, tmp_path):
        by_peft(tmp_path, gpt2(), lora_bias=True)
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        change("base_model.model.transformer.h.0.attn.c_attn.lora_B.bias", tensors)
        safetensors.save_file(tensors, tmp_path / ADAPTER_FILE)
        with pytest.raises(ValueError, match=match):
            read_adapter(tmp_path)

    def test_a_bias_that_the_configuration_does_not_name(self, tmp_path):
        by_peft(tmp_path, gpt2(), lora_bias=True)
        with_config(tmp_path, lora_bias=False)
        with pytest.raises(ValueError, match="a bias of lora_B"):
            read_adapter(tmp_path)
