"""PEFT's `layer_replication`: adapters of a model some of whose blocks are repeated."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels import (
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.serving.convert import convert

from ...support.packages import needs_peft
from ...support.peft_folders import by_peft, in_peft, loaded, merged_files, verified, with_config
from ...support.running import close, logits, move, same_bits, token_ids, weights_of
from ...support.tiny_models import bert, gpt2, llama

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = needs_peft


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
        with pytest.raises(ValueError, match="they name other blocks"):
            load_adapter(ours, tmp_path / "other", adapter_name="c", progress=False)
        with pytest.raises(ValueError, match="they name other blocks"):
            hotswap_adapter(ours, tmp_path / "other")
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
        base = bert()
        want = logits(self.made(tmp_path, base, target_modules=["query"]))
        ours = loaded(base, tmp_path)
        assert close(logits(ours), want)
        unload_lora(ours)
        assert torch.equal(logits(ours), logits(base))
        with pytest.raises(ValueError, match="locate the layers attribute"):
            load_adapter(gpt2(), tmp_path, progress=False)
