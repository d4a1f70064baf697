"""PEFT's `trainable_token_indices`: new rows of an embedding are read, merged and saved."""

from __future__ import annotations

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
from lora_kernels._utils.peft_names import ADAPTER_FILE
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.serving.convert import convert

from ...support.packages import needs_peft
from ...support.peft_folders import by_peft, in_peft, loaded, merged_files, verified, with_config
from ...support.running import close, logits, move, same_bits, train, weights_of
from ...support.tiny_models import gpt2, llama

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = needs_peft


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

    def test_names_and_formats_that_others_need(self, tmp_path):
        base, _ = self.made("list", tmp_path / "peft")
        convert(tmp_path / "peft", tmp_path / "renamed", rename=("model", "language_model"))
        rows = read_adapter(tmp_path / "renamed").rows
        assert list(rows) == ["language_model.embed_tokens.weight"]
        pytest.importorskip("gguf")
        base.save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match=r"rows of an embedding, .* a GGUF adapter cannot"):
            convert(tmp_path / "peft", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")

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
            ([1, 1], (2, 32), "not distinct"),
            ([1, -1], (2, 32), "not distinct"),
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


def test_a_failed_load_leaves_nothing_of_its_rows(tmp_path, monkeypatch):
    """An adapter that later gets the same name is saved as what it is."""
    from lora_kernels import LoRAConfig, add_lora
    from lora_kernels.model import lora

    base = llama()
    by_peft(tmp_path / "rows", base, trainable_token_indices=[1, 5], target_modules=["q_proj"])
    model = llama()
    add_lora(model, LoRAConfig(r=2, target_modules=["v_proj"], residual="implicit"))

    def failing(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(lora, "install", failing)
        with pytest.raises(MemoryError):
            load_adapter(model, tmp_path / "rows", adapter_name="two", progress=False)
    config = LoRAConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], residual="implicit"
    )
    add_lora(model, config, adapter_name="two")
    train(model)
    save_adapter(model, tmp_path / "two")
    state = read_adapter(tmp_path / "two")
    assert not state.rows and "model.embed_tokens.weight" in state.extra
    assert close(logits(loaded(llama(), tmp_path / "two")), logits(model.eval()))
