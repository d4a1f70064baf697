"""Adapters that PEFT wrote with options that `add_lora` does not have: read, merged and saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels import (
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.checkpoint.verify import verify
from lora_kernels.files.serving.convert import convert
from lora_kernels.layers.state import LayerState
from lora_kernels.model.config import AdapterState, LoRAConfig
from lora_kernels.model.lora import apply_state

from ...support.packages import needs_bitsandbytes, needs_peft
from ...support.peft_models import MODELS, adapted, initialize
from ...support.quantized import linear_4bit
from ...support.running import close, logits, move, same_bits, token_ids, train, weights_of
from ...support.tiny_models import gpt2, llama

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = needs_peft


def by_peft(folder: Path, base: nn.Module, **options) -> nn.Module:
    """A PEFT model with a random adapter, saved in the folder."""
    model = adapted(base, **options)
    move(model, 0.05)
    model.save_pretrained(folder)
    return model


def with_config(folder: Path, **values) -> None:
    """Changes fields of the configuration in place."""
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def loaded(base: nn.Module, folder: Path, **options) -> nn.Module:
    """A copy of the base with the adapter of the folder."""
    model = copy.deepcopy(base)
    load_adapter(model, folder, progress=False, **options)
    return model.eval()


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """A copy of the base with the adapter of the folder, in PEFT."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def merged_files(base: nn.Module, folder: Path, scratch: Path) -> nn.Module:
    """The model that `lora-kernels merge` writes."""
    base.save_pretrained(scratch / "base")
    merge(scratch / "base", folder, scratch / "merged")
    return type(base).from_pretrained(scratch / "merged").eval()


def verified(folder: Path, base: Path) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verify(folder, base)}


class TestRanksAboveTheSize:
    """r > min(n, m), which adds nothing to a layer but is allowed in PEFT."""

    R = 40

    @pytest.mark.parametrize("kind", MODELS)
    def test_everything(self, kind, tmp_path):
        base = MODELS[kind]()
        model = by_peft(tmp_path / "peft", base, r=self.R)
        want = logits(model)
        assert close(logits(merged_files(base, tmp_path / "peft", tmp_path)), want)
        assert all(verified(tmp_path / "peft", tmp_path / "base").values())
        ours = loaded(base, tmp_path / "peft")
        assert close(logits(ours), want)
        for form in ("peft", "native"):
            save_adapter(ours, tmp_path / form, format=form)
            again = loaded(base, tmp_path / form)
            assert torch.equal(logits(again), logits(ours))
        assert close(logits(in_peft(base, tmp_path / "peft")), want)
        hotswap_adapter(again, tmp_path / "peft")
        assert torch.equal(logits(again), logits(ours))
        convert(tmp_path / "peft", tmp_path / "small", compress_to=32)
        assert close(logits(loaded(base, tmp_path / "small")), want)  # the rank of the update
        before = weights_of(base)
        unload_lora(again)
        assert same_bits(weights_of(again), before)
        assert close(logits(merge_lora(ours)), want)

    def test_trains_as_in_peft(self, tmp_path):
        model = by_peft(tmp_path / "peft", llama(), r=self.R)
        ours = loaded(llama(), tmp_path / "peft")
        assert train(ours) == pytest.approx(train(model), rel=1e-5)

    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_starts_for_which_peft_takes_a_smaller_rank_in_silence(self, init, rslora, tmp_path):
        """k_proj has 16 rows: A [16, in], while the configuration says r = 20, as does s."""
        options = {"r": 20, "init_lora_weights": init, "use_rslora": rslora}
        model = by_peft(tmp_path / "peft", llama(), **options)
        state = read_adapter(tmp_path / "peft", residual_base=True)
        assert {layer.r for layer in state.layers.values()} == {16, 20}
        s = 8 / (20**0.5 if rslora else 20)
        for name, layer in state.layers.items():
            assert layer.scaling == pytest.approx(s)
            assert state.config.layer_rank(name) == layer.r
            assert state.config.layer_scaling(name) == pytest.approx(s)
        want = logits(model)
        ours = loaded(model.unload(), tmp_path / "peft", residual_base=True)
        assert close(logits(ours), want)

    def test_another_rank_than_that_is_another_adapter(self, tmp_path):
        by_peft(tmp_path, llama(), r=20, init_lora_weights="pissa")
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        layer = "base_model.model.model.layers.0.self_attn.k_proj"
        tensors[f"{layer}.lora_A.weight"] = tensors[f"{layer}.lora_A.weight"][:8].clone()
        tensors[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B.weight"][:, :8].clone()
        safetensors.save_file(tensors, tmp_path / ADAPTER_FILE)
        with pytest.raises(ValueError, match="rank 8, the configuration says 20"):
            read_adapter(tmp_path, residual_base=True)


# Name: (model, trainable_token_indices, target_modules)
TOKENS = {
    "list": (llama, [7, 1, 30], ("q_proj", "v_proj")),
    "tied": (lambda: llama(tied=True), [7, 1, 30], ("q_proj", "v_proj")),
    "dict": (llama, {"embed_tokens": [3, 4], "lm_head": [5]}, ("q_proj",)),
    "dict of tied": (
        lambda: llama(tied=True),
        {"embed_tokens": [3, 4], "lm_head": [3, 4]},
        ("q_proj",),
    ),
    "two of tied": (
        lambda: llama(tied=True),
        {"embed_tokens": [3, 4], "lm_head": [5]},
        ("q_proj",),
    ),
    "gpt2": (gpt2, [11], ("c_attn",)),
}


class TestTrainedTokens:
    """`trainable_token_indices`: PEFT stores new rows of an embedding."""

    def made(self, kind: str, folder: Path) -> tuple[nn.Module, nn.Module]:
        make, tokens, targets = TOKENS[kind]
        base = make()
        return base, by_peft(
            folder, base, trainable_token_indices=tokens, target_modules=list(targets)
        )

    @pytest.mark.parametrize("kind", TOKENS)
    def test_computes_what_peft_computes(self, kind, tmp_path):
        base, model = self.made(kind, tmp_path / "peft")
        ids = torch.arange(96).view(4, 24)  # all tokens
        want = logits(model, ids)
        plain = logits(base, ids)
        assert not close(want, plain, 1e4)
        before = weights_of(base)
        with pytest.warns(UserWarning, match="are used as they are"):
            ours = loaded(base, tmp_path / "peft")
        assert close(logits(ours, ids), want)
        with disable_adapters(ours):
            assert torch.equal(logits(ours, ids), plain)
        assert close(logits(ours, ids), want)
        for form in ("peft", "native"):
            save_adapter(ours, tmp_path / form, format=form)
            again = loaded(base, tmp_path / form, is_trainable=False)
            assert torch.equal(logits(again, ids), logits(ours, ids))
        saved, first = read_adapter(tmp_path / "peft"), read_adapter(tmp_path / "native")
        assert saved.rows.keys() == first.rows.keys() and not saved.extra
        assert close(logits(in_peft(base, tmp_path / "peft"), ids), want)
        unload_lora(again)
        assert same_bits(weights_of(again), before)
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (
            base.get_output_embeddings().weight is base.get_input_embeddings().weight
        )
        assert close(logits(merge_lora(ours), ids), want)

    @pytest.mark.parametrize("kind", TOKENS)
    def test_the_commands(self, kind, tmp_path):
        base, model = self.made(kind, tmp_path / "peft")
        ids = torch.arange(96).view(4, 24)
        merged = merged_files(base, tmp_path / "peft", tmp_path)
        assert close(logits(merged, ids), logits(model, ids))
        assert all(verified(tmp_path / "peft", tmp_path / "base").values())
        convert(tmp_path / "peft", tmp_path / "small", compress_to=2)
        assert read_adapter(tmp_path / "small").rows.keys() == (
            read_adapter(tmp_path / "peft").rows.keys()
        )

    def test_several_adapters(self, tmp_path):
        base, first = self.made("tied", tmp_path / "first")
        second = by_peft(
            tmp_path / "second", base, trainable_token_indices=[2], target_modules=["q_proj"]
        )
        move(second, 0.1, seed=4)
        second.save_pretrained(tmp_path / "second")
        ours = loaded(base, tmp_path / "first", is_trainable=False)
        load_adapter(
            ours, tmp_path / "second", adapter_name="b", is_trainable=False, progress=False
        )
        assert close(logits(ours), logits(second))
        set_adapter(ours, "default")
        assert close(logits(ours), logits(first))

    def test_training_leaves_the_rows_as_they_are(self, tmp_path):
        base, _ = self.made("tied", tmp_path / "peft")
        ours = loaded(base, tmp_path / "peft")
        rows = ours.model.embed_tokens.weight.detach().clone()
        losses = train(ours)
        assert torch.equal(ours.model.embed_tokens.weight, rows) and losses[-1] != losses[0]
        assert ours.lm_head.weight is ours.model.embed_tokens.weight

    def test_hotswapping(self, tmp_path):
        """Also other tokens of the same embedding; what had been replaced is the base's again."""
        base, _ = self.made("tied", tmp_path / "first")
        other = by_peft(
            tmp_path / "other",
            base,
            trainable_token_indices=[2, 3],
            target_modules=["q_proj", "v_proj"],
        )
        ours = loaded(base, tmp_path / "first", is_trainable=False)
        hotswap_adapter(ours, tmp_path / "other")
        assert close(logits(ours), logits(other))
        save_adapter(ours, tmp_path / "again")
        again = loaded(base, tmp_path / "again", is_trainable=False)
        assert torch.equal(logits(again), logits(ours))

    @pytest.mark.parametrize(
        "tokens,shape,match",
        [
            ([1, 2], (3, 32), r"are \[3, 32\] of torch.float32, for 2 tokens"),
            ([1, 1], (2, 32), "no different tokens"),
            ([1, -1], (2, 32), "no different tokens"),
            ([1, 96], (2, 32), "for token 96, the model's vocabulary has 96"),
            ([1, 2], (2, 31), "rows of 31 numbers"),
            ({"wte": [1, 2]}, (2, 32), "no tokens of 'model.embed_tokens'"),
            (
                {"embed_tokens": [1, 2], "lm_head": [3]},
                (2, 32),
                "names lm_head, whose rows are missing",
            ),
            (None, (2, 32), "rows of an embedding that are trained"),
        ],
    )
    def test_damaged(self, tokens, shape, match, tmp_path):
        self.made("list", tmp_path)
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        key = next(key for key in tensors if "trainable_tokens_delta" in key)
        tensors[key] = torch.ones(shape)
        safetensors.save_file(tensors, tmp_path / ADAPTER_FILE)
        with_config(tmp_path, trainable_token_indices=tokens)
        model = llama()
        before = weights_of(model)
        with pytest.raises(ValueError, match=match):
            load_adapter(model, tmp_path, is_trainable=False, progress=False)
        assert same_bits(weights_of(model), before)

    def test_rows_that_are_missing(self, tmp_path):
        by_peft(tmp_path, llama())
        with_config(tmp_path, trainable_token_indices=[1])
        with pytest.raises(ValueError, match="but it has no rows of an embedding"):
            read_adapter(tmp_path)


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
        with pytest.warns(UserWarning, match="14 layers have got a bias"):
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


class TestReplicatedLayers:
    """`layer_replication`: the adapter is for a model some of whose blocks are repeated."""

    MAP = ((0, 2), (1, 2), (0, 1))

    def made(self, folder: Path, base: nn.Module, **options) -> nn.Module:
        return by_peft(folder, base, layer_replication=[list(pair) for pair in self.MAP], **options)

    @pytest.mark.parametrize("options", [{}, {"modules_to_save": ["input_layernorm"]}], ids=str)
    def test_computes_what_peft_computes(self, options, tmp_path):
        base = llama()
        model = self.made(tmp_path / "peft", base, **options)
        want, plain = logits(model), logits(base)
        before = weights_of(base)
        ours = loaded(base, tmp_path / "peft")
        assert len(ours.model.layers) == ours.config.num_hidden_layers == 4
        assert close(logits(ours), want)
        assert read_adapter(tmp_path / "peft").replication == self.MAP
        for form in ("peft", "native"):
            save_adapter(ours, tmp_path / form, format=form)
            again = loaded(base, tmp_path / form)
            assert torch.equal(logits(again), logits(ours))
            assert read_adapter(tmp_path / form).replication == self.MAP
        assert close(logits(in_peft(base, tmp_path / "peft")), want)
        generated = ours.generate(token_ids(), max_new_tokens=4, do_sample=False)
        assert torch.equal(
            generated, model.generate(token_ids(), max_new_tokens=4, do_sample=False)
        )
        unload_lora(again)
        assert len(again.model.layers) == again.config.num_hidden_layers == 2
        assert same_bits(weights_of(again), before) and torch.equal(logits(again), plain)
        save_adapter(ours, tmp_path / "small", compress_to=2)
        assert read_adapter(tmp_path / "small").replication == self.MAP

    def test_merging_gives_a_larger_model(self, tmp_path):
        base = llama()
        want = logits(self.made(tmp_path / "peft", base, target_modules=["q_proj"]))
        ours = merge_lora(loaded(base, tmp_path / "peft"))
        assert close(logits(ours), want)
        ours.save_pretrained(tmp_path / "larger")
        again = type(ours).from_pretrained(tmp_path / "larger").eval()
        assert torch.equal(logits(again), logits(ours)) and len(again.model.layers) == 4

    def test_the_commands(self, tmp_path):
        base = llama()
        self.made(tmp_path / "peft", base)
        with pytest.raises(ValueError, match=r"(?s)repeats blocks.*merge_lora and save_pretrained"):
            merged_files(base, tmp_path / "peft", tmp_path)
        assert not (tmp_path / "merged").exists()
        assert all(verified(tmp_path / "peft", tmp_path / "base").values())
        with_config(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "base"))
        convert(tmp_path / "peft", tmp_path / "small", compress_to=2)
        assert close(
            logits(in_peft(base, tmp_path / "small")), logits(loaded(base, tmp_path / "small"))
        )

    def test_a_model_that_is_expanded_already(self, tmp_path):
        from peft.tuners.tuners_utils import replicate_layers

        base = llama()
        want = logits(self.made(tmp_path, base))
        ours = copy.deepcopy(base)
        replicate_layers(ours, [list(pair) for pair in self.MAP])
        expanded = logits(ours)
        load_adapter(ours, tmp_path, progress=False)
        assert len(ours.model.layers) == 4 and close(logits(ours), want)
        unload_lora(ours)
        assert len(ours.model.layers) == 4 and torch.equal(logits(ours), expanded)

    def test_changes_of_the_model_in_between_stay(self, tmp_path):
        base = llama()
        self.made(tmp_path, base)
        ours = loaded(base, tmp_path).to(torch.bfloat16)
        unload_lora(ours)
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        assert not ours.model.layers[0].training
        assert ours.model.layers[1].self_attn.layer_idx == 1

    def test_several_adapters_need_the_same_blocks(self, tmp_path):
        base = llama()
        first = self.made(tmp_path / "first", base)
        move(first, 0.05, seed=7)
        first.save_pretrained(tmp_path / "second")
        by_peft(tmp_path / "other", base)
        ours = loaded(base, tmp_path / "first")
        load_adapter(ours, tmp_path / "second", adapter_name="b", progress=False)
        assert close(logits(ours), logits(first))
        for name in ("other",):
            with pytest.raises(ValueError, match="they name other blocks"):
                load_adapter(ours, tmp_path / name, adapter_name="c", progress=False)
            with pytest.raises(ValueError, match="they name other blocks"):
                hotswap_adapter(ours, tmp_path / name)
        plain = loaded(base, tmp_path / "other")
        with pytest.raises(ValueError, match="they name other blocks"):
            load_adapter(plain, tmp_path / "first", adapter_name="b", progress=False)

    @pytest.mark.parametrize(
        "value,match",
        [
            ([[0, 2], [1, 3]], "repeats blocks .* does not have them"),
            ([[0, 9]], "does not have them"),
            ([[2, 1]], "no list of"),
            ([0, 2], "no list of"),
            ("all", "no list of"),
            ([[0, 1]], "no linear layer of this"),
        ],
    )
    def test_damaged(self, value, match, tmp_path):
        self.made(tmp_path, llama())
        with_config(tmp_path, layer_replication=value)
        model = llama()
        before = weights_of(model)
        with pytest.raises(ValueError, match=match):
            load_adapter(model, tmp_path, progress=False)
        assert same_bits(weights_of(model), before) and model.config.num_hidden_layers == 2

    def test_other_architectures(self, tmp_path):
        base = gpt2()
        want = logits(self.made(tmp_path, base))
        assert close(logits(loaded(base, tmp_path)), want)
        layers = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
        with pytest.raises(ValueError, match="locate the layers attribute"):
            load_adapter(layers, tmp_path, progress=False)
