"""Adapters of embeddings beside PEFT's: outputs, gradients, files both ways, and the commands."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, hotswap_adapter, load_adapter, merge_lora, save_adapter
from lora_kernels.cli import main
from lora_kernels.model.install import adapted_layers

from ...support.packages import needs_peft
from ...support.running import close, logits, move, quiet, token_ids
from ...support.tiny_models import VOCABULARY, gpt2, llama

pytestmark = needs_peft


def gemma3() -> nn.Module:
    """Its embedding multiplies by a scale, has a padding token, and is tied to the head."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    blocks = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **blocks, pad_token_id=0)).eval()


MODELS = {
    "llama": (llama, ["embed_tokens", "q_proj"]),
    "padded": (lambda: llama(pad_token_id=5), ["embed_tokens"]),
    "tied": (lambda: llama(tied=True), ["embed_tokens", "lm_head"]),
    "gpt2": (gpt2, ["wte", "wpe", "c_attn"]),
    "gemma3": (gemma3, ["embed_tokens"]),
}


def by_peft(base: nn.Module, targets, **options) -> nn.Module:
    """Trained by PEFT: A and B are moved."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, **options}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=targets, **options))
    move(model)
    return model.eval()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("make, targets", MODELS.values(), ids=MODELS)
class TestBesidePeft:
    def test_outputs_and_gradients(self, make, targets, tmp_path):
        theirs = by_peft(make(), targets)
        theirs.save_pretrained(tmp_path)
        ours = make()
        report = load_adapter(ours, tmp_path, progress=False)
        assert not report.saved  # PEFT has stored the base's weights, which the model has
        assert relative(logits(ours), logits(theirs)) <= 1e-6
        ids = token_ids()
        ids[0, 0] = 5
        for model in (ours, theirs):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, layer in adapted_layers(ours).items():
            other = theirs.base_model.model.get_submodule(name)
            A, B = (getattr(other, f"lora_embedding_{half}") for half in "AB")
            if "default" in A:
                pairs = ((layer.lora_A, A["default"]), (layer.lora_B, B["default"]))
            else:
                pairs = ((layer.lora_A, other.lora_A["default"].weight),)
            for one, two in pairs:
                assert relative(one.grad, two.grad) <= 1e-6, name

    @pytest.mark.parametrize("init", ["loram", "lora"])
    def test_ours_in_peft(self, make, targets, init, tmp_path):
        from peft import PeftModel

        model = make()
        quiet(model, LoRAConfig(r=4, target_modules=targets, init_lora_weights=init))
        move(model)
        trained = logits(model)
        save_adapter(model, tmp_path)
        theirs = PeftModel.from_pretrained(make(), tmp_path)
        assert close(logits(theirs), trained)
        again = make()
        load_adapter(again, tmp_path, progress=False)
        assert close(logits(again), trained)
        for name, layer in adapted_layers(again).items():
            before = adapted_layers(model)[name]
            assert torch.equal(layer.lora_A, before.lora_A)
            assert torch.equal(layer.lora_B, before.lora_B)


class TestFiles:
    @pytest.mark.parametrize("options", [{"compress_to": 2}, {"dtype": "bfloat16"}], ids=str)
    def test_smaller_ones(self, options, tmp_path):
        from peft import PeftModel

        model = llama()
        quiet(model, LoRAConfig(r=4, target_modules=["embed_tokens"]))
        move(model)
        saved = save_adapter(model, tmp_path, **options)
        assert 0 < saved.errors["model.embed_tokens"] < (1 if "compress_to" in options else 0.01)
        ours, theirs = llama(), PeftModel.from_pretrained(llama(), tmp_path)
        load_adapter(ours, tmp_path, progress=False)
        assert close(logits(ours), logits(theirs))

    def test_names_and_options(self, tmp_path):
        import json

        from safetensors.torch import load_file

        model = gpt2()
        quiet(model, LoRAConfig(r=4, target_modules=["wte", "c_attn"], residual="implicit"))
        save_adapter(model, tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        prefix = "base_model.model.transformer.wte.lora_embedding_"
        assert tensors[f"{prefix}A"].shape == (8, VOCABULARY)
        assert tensors[f"{prefix}B"].shape == (32, 8)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] and config["target_modules"] == ["c_attn", "wte"]

    def test_a_second_adapter_and_an_exchanged_one(self, tmp_path):
        base = llama(tied=True)
        folders = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            folders.append(tmp_path / str(seed))
            by_peft(base, ["embed_tokens"]).save_pretrained(folders[-1])
        alone = copy.deepcopy(base)
        load_adapter(alone, folders[1], progress=False)
        load_adapter(base, folders[0], progress=False)
        load_adapter(base, folders[1], adapter_name="second", progress=False)
        assert torch.equal(logits(base), logits(alone))
        hotswap_adapter(base, folders[0], "second")
        assert not close(logits(base), logits(alone))

    def test_a_resized_vocabulary(self, tmp_path):
        """The file has the new rows of the embedding, and the head is tied to it."""
        llama(tied=True).save_pretrained(tmp_path / "base")
        cls, size = type(llama()), VOCABULARY + 3
        resized = cls.from_pretrained(tmp_path / "base")
        resized.resize_token_embeddings(size)
        theirs = by_peft(resized, ["embed_tokens"])
        theirs.save_pretrained(tmp_path / "adapter")
        ids = token_ids() + 3
        trained = logits(theirs, ids)
        ours = cls.from_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match=rf"resize_token_embeddings\({size}\) first"):
            load_adapter(ours, tmp_path / "adapter", progress=False)
        ours.resize_token_embeddings(size, mean_resizing=False)
        report = load_adapter(ours, tmp_path / "adapter", progress=False)
        assert set(report.saved) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert close(logits(ours, ids), trained)
        merge_lora(ours)
        assert close(logits(ours, ids), trained)
        out = tmp_path / "out"
        assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(out)]) == 0
        assert close(logits(cls.from_pretrained(out), ids), trained)


class TestCommands:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("peft", [False, True])
    def test_merge_and_verify(self, peft, tied, tmp_path, capsys):
        base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
        model, targets = llama(tied), ["embed_tokens", "q_proj"]
        model.save_pretrained(base)
        if peft:
            model = by_peft(model, targets)
            model.save_pretrained(adapter)
        else:
            quiet(model, LoRAConfig(r=4, target_modules=targets))
            move(model)
            save_adapter(model, adapter)
        assert main(["merge", str(base), str(adapter), str(out)]) == 0
        merged = type(llama()).from_pretrained(out)
        assert close(logits(merged), logits(model)) and not merged.config.tie_word_embeddings
        assert main(["verify", str(adapter), str(base)]) == 0, capsys.readouterr().out

    def test_init_leaves_them_out(self, tmp_path, capsys):
        llama().save_pretrained(tmp_path / "base")
        command = ["init", str(tmp_path / "base"), str(tmp_path / "out")]
        assert main([*command, "--targets", "embed_tokens"]) == 1
        assert "but it is an embedding: adapt it with add_lora" in capsys.readouterr().err
