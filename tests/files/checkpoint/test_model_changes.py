"""Adapters that give a merged model tensors which its base lacks: heads, resized embeddings, heads
that are no longer tied. The merged files against the adapted model in memory.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_kernels import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.checkpoint.verify import verify

from ...support import tiny_models
from .folders import fingerprint
from .test_resume import stop_after

transformers = pytest.importorskip("transformers")
IDS = torch.arange(14).view(1, 14) * 5 + 3


@torch.no_grad()
def trained(model):
    """The model with everything moved that can be trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def resized(cls, base, seed):
    """The model in `base` with 100 tokens; the new ones depend on the seed."""
    torch.manual_seed(seed)
    model = cls.from_pretrained(base).eval()
    model.resize_token_embeddings(100, mean_resizing=False)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids)[0]


def assert_same(one, other):
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def assert_verified(adapter, base):
    checks = list(verify(adapter, base))
    assert all(check.passed for check in checks), checks


@pytest.fixture(params=["one file", "four files"])
def base(request, tmp_path) -> Path:
    size = "50GB" if request.param == "one file" else "30KB"
    tiny_models.llama().save_pretrained(tmp_path / "base", max_shard_size=size)
    assert (tmp_path / "base/model.safetensors").is_file() == (request.param == "one file")
    return tmp_path / "base"


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("maker", ["lora_kernels", "peft"])
def test_a_head_that_the_base_lacks(task, maker, base, tmp_path):
    cls = getattr(transformers, f"LlamaFor{task}")
    model = cls.from_pretrained(base, num_labels=3, pad_token_id=0)
    kind = "SEQ_CLS" if task == "SequenceClassification" else "TOKEN_CLS"
    if maker == "peft":
        peft = pytest.importorskip("peft")
        options = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type=kind)
        model = peft.get_peft_model(model, options)
        trained(model).save_pretrained(tmp_path / "adapter")
    else:
        add_lora(model, LoRAConfig(r=4, task_type=kind), progress=False)
        save_adapter(trained(model), tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] - {"lm_head.weight"}
    assert merged.config.architectures == [cls.__name__] and merged.config.num_labels == 3
    assert_same(logits(merged.eval()), logits(model))
    assert_verified(tmp_path / "adapter", base)


def test_a_head_on_files_without_the_first_part_of_the_names(tmp_path):
    """A bare BERT, whose modules have the prefix "bert." in a classifier."""
    tiny_models.bert().bert.save_pretrained(tmp_path / "base")
    cls = transformers.BertForTokenClassification
    model = cls.from_pretrained(tmp_path / "base", num_labels=5)
    add_lora(model, LoRAConfig(r=4, task_type="TOKEN_CLS"), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert_same(logits(cls.from_pretrained(tmp_path / "merged").eval()), logits(model))
    assert_verified(tmp_path / "adapter", tmp_path / "base")


def test_cast_and_resumed(base, tmp_path, monkeypatch):
    model = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=2)
    add_lora(model, LoRAConfig(r=4, task_type="SEQ_CLS"), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    whole = tmp_path / "whole"
    merge(base, tmp_path / "adapter", whole, dtype=torch.bfloat16)
    merged = transformers.LlamaForSequenceClassification.from_pretrained(whole)
    assert merged.score.weight.dtype == torch.bfloat16
    assert torch.equal(merged.score.weight, model.score.weight.bfloat16())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(len(list(base.glob("*.safetensors"))) - 1, patch)
        merge(base, tmp_path / "adapter", tmp_path / "again", dtype=torch.bfloat16)
    merge(base, tmp_path / "adapter", tmp_path / "again", dtype=torch.bfloat16)
    assert fingerprint(tmp_path / "again") == fingerprint(whole)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("resized_base", [False, True])
def test_a_resized_vocabulary(tied, resized_base, tmp_path):
    """The adapter brings embeddings of 100 tokens; the base has 96, or was resized too."""
    base, cls = tmp_path / "base", transformers.LlamaForCausalLM
    tiny_models.llama(tied=tied).save_pretrained(base)

    model = resized(cls, base, 1)
    add_lora(model, LoRAConfig(r=4), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    ids = torch.arange(90, 100)[None]
    again = resized(cls, base, 2)
    report = load_adapter(again, tmp_path / "adapter", progress=False)
    assert_same(logits(again, ids), logits(model, ids))
    assert not [n for n, p in again.named_parameters() if p.requires_grad and "lora_" not in n]
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    peft = pytest.importorskip("peft")
    plain = peft.PeftModel.from_pretrained(resized(cls, base, 2), tmp_path / "adapter").eval()
    assert_same(logits(plain, ids), logits(model, ids))
    if resized_base:
        model_base = resized(cls, base, 1)
        model_base.save_pretrained(tmp_path / "resized")
        base = tmp_path / "resized"
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = cls.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == 100 and merged.config.tie_word_embeddings == tied
    assert_same(logits(merged, ids), logits(model, ids))
    if not resized_base:
        assert_verified(tmp_path / "adapter", base)
        with pytest.raises(ValueError, match=r"resize_token_embeddings\(100\)"):
            load_adapter(cls.from_pretrained(base), tmp_path / "adapter", progress=False)


def small(family: str):
    """A model whose vocabulary more tensors than the embedding depend on."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32}
    if family == "bart":  # one embedding in three modules, and a buffer
        ends = ("layers", "attention_heads", "ffn_dim")
        options = {f"{part}_{end}": 2 for part in ("encoder", "decoder") for end in ends}
        config = transformers.BartConfig(**sizes, **options, max_position_embeddings=64)
        return transformers.BartForConditionalGeneration(config)
    if family == "t5":
        config = transformers.T5Config(**sizes, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
        config.decoder_start_token_id = 0
        return transformers.T5ForConditionalGeneration(config)
    if family == "bert":  # two biases of the head
        model = tiny_models.bert()
        return transformers.BertForMaskedLM(model.config)
    return tiny_models.gpt2()


@torch.no_grad()
def decoded(model, ids):
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder).logits


@pytest.mark.parametrize("family", ["bart", "t5", "bert", "gpt2"])
def test_a_resized_vocabulary_of_other_families(family, tmp_path):
    base, ids = tmp_path / "base", torch.arange(90, 100)[None]
    cls = type(small(family))
    small(family).save_pretrained(base)

    model = resized(cls, base, 1)
    add_lora(model, LoRAConfig(r=2), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    again = resized(cls, base, 2)
    load_adapter(again, tmp_path / "adapter", progress=False)
    assert_same(decoded(again, ids), decoded(model, ids))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert_same(decoded(cls.from_pretrained(tmp_path / "merged").eval(), ids), decoded(model, ids))
    merge_lora(again).save_pretrained(tmp_path / "memory")
    in_memory = cls.from_pretrained(tmp_path / "memory").eval()
    assert_same(decoded(in_memory, ids), decoded(model, ids))
    assert in_memory.config.tie_word_embeddings
    assert_verified(tmp_path / "adapter", base)


def test_a_trained_head_beside_three_tied_embeddings(tmp_path):
    """BART without `tie_word_embeddings` ties none of them: the files have all."""
    base, ids = tmp_path / "base", torch.arange(10)[None] + 3
    small("bart").save_pretrained(base)
    cls = transformers.BartForConditionalGeneration
    model = cls.from_pretrained(base)
    add_lora(model, LoRAConfig(r=2, modules_to_save=["lm_head"]), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    want = decoded(model, ids)
    assert_same(decoded(cls.from_pretrained(tmp_path / "merged").eval(), ids), want)
    merge_lora(model).save_pretrained(tmp_path / "memory")
    assert_same(decoded(cls.from_pretrained(tmp_path / "memory").eval(), ids), want)


def test_a_resized_vocabulary_of_a_model_with_its_own_code(tmp_path):
    """Its configuration is read without running the code."""
    base = tmp_path / "base"
    tiny_models.llama().save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "configuration_mine.py").write_text("raise SystemExit('ran')")
    for size, saved in ((96, set()), (100, {"model.embed_tokens.weight", "lm_head.weight"})):
        model.resize_token_embeddings(size)
        add_lora(model, LoRAConfig(r=2), progress=False)
        save_adapter(model, tmp_path / "adapter")
        assert read_adapter(tmp_path / "adapter").extra.keys() == saved
        merge_lora(model)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_tied_head_that_was_trained(saved, tmp_path):
    """Only one of the two was trained: the merged model has both."""
    base, cls = tmp_path / "base", transformers.LlamaForCausalLM
    tiny_models.llama(tied=True).save_pretrained(base)
    model = cls.from_pretrained(base)
    add_lora(model, LoRAConfig(r=4, modules_to_save=[saved]), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = cls.from_pretrained(tmp_path / "merged").eval()
    assert not merged.config.tie_word_embeddings
    assert_same(logits(merged), logits(model))
    merge_lora(model).save_pretrained(tmp_path / "memory")
    in_memory = cls.from_pretrained(tmp_path / "memory").eval()
    assert_same(logits(in_memory), logits(merged))
    assert_verified(tmp_path / "adapter", base)


def test_a_tied_head_with_an_adapter(tmp_path):
    base, cls = tmp_path / "base", transformers.LlamaForCausalLM
    tiny_models.llama(tied=True).save_pretrained(base)
    model = cls.from_pretrained(base)
    add_lora(model, LoRAConfig(r=4, target_modules=["lm_head", "q_proj"]), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert_same(logits(cls.from_pretrained(tmp_path / "merged").eval()), logits(model))


def test_layers_that_loading_computes(tmp_path):
    """GTE's files have gate and up in one matrix: merging in memory is the way."""
    base = tmp_path / "base"
    config = transformers.GteConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    transformers.GteModel(config).save_pretrained(base)
    model = transformers.GteModel.from_pretrained(base)
    report = add_lora(model, LoRAConfig(r=4), progress=False)
    assert any(row.name.endswith("gate_proj") for row in report.adapted)
    save_adapter(trained(model), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is computed from other tensors of .* by loading"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert_verified(tmp_path / "adapter", base)


def test_another_shape_is_an_error(tmp_path):
    """Of a tensor that is no embedding."""
    tiny_models.llama().save_pretrained(tmp_path / "base")
    tiny_models.llama(hidden_size=64).save_pretrained(tmp_path / "other")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "other")
    add_lora(model, LoRAConfig(r=4, modules_to_save=["norm"]), progress=False)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"of the adapter is \[64, 64\], of .* \[32, 32\]"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_a_configuration_that_transformers_does_not_know(tmp_path):
    """What is assumed is said."""
    base = tmp_path / "base"
    tiny_models.llama().save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    add_lora(model, LoRAConfig(r=4), progress=False)
    save_adapter(trained(model), tmp_path / "adapter")
    known = merge(base, tmp_path / "adapter", tmp_path / "known")
    assert known.assumption == ""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "llama7"}))
    done = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert "transformers cannot build it" in done.assumption and "assumed" in done.assumption
    shutil.copy(tmp_path / "known/config.json", tmp_path / "merged/config.json")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(logits(merged), logits(model))
    (skipped,) = [check for check in verify(tmp_path / "adapter", base) if check.passed is None]
    assert "cannot build it" in skipped.detail
