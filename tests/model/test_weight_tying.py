"""`ensure_weight_tying`: one adapter, or one saved module, for an embedding and the tied head."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_kernels import (
    LoRAConfig,
    adapters_per_row,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.layers.linear.tied import TiedAdapter
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state
from tests.support.packages import needs_peft, needs_transformers
from tests.support.running import close, logits, move, quiet, snapshot, token_ids, train

pytestmark = needs_transformers
EMBED, HEAD = "model.embed_tokens", "lm_head"


def llama(**options):
    from tests.support.tiny_models import llama as tiny

    return tiny(tied=True, **options)


def adapted(targets=("embed_tokens", "q_proj"), model=None, name="default", **options):
    options = {"r": 3, "init_lora_weights": "lora", "residual": "implicit"} | options
    model = llama() if model is None else model
    config = LoRAConfig(target_modules=targets, ensure_weight_tying=True, **options)
    quiet(model, config, adapter_name=name)
    return model


def updates(model, name="default"):
    """The updates of the weight [V, D] by the embedding and by the head."""
    layers = adapter_state(model, name).layers
    right, left = layers[EMBED].update_factors()
    own = layers[EMBED].scaling * (left @ right).T
    right, left = layers[HEAD].update_factors()
    return own, layers[HEAD].scaling * left @ right


@pytest.mark.parametrize(
    "targets", [("embed_tokens", "q_proj"), ("lm_head",), ".*(q_proj|embed_tokens)", "lm_head"]
)
@pytest.mark.parametrize("start", ["lora", "loram", "pissa"])
def test_both_have_one_update(targets, start):
    model = adapted(targets, init_lora_weights=start)
    base = logits(llama())
    assert close(logits(model), base)
    move(model, 0.1)
    layers = adapted_layers(model)
    assert isinstance(layers[HEAD].active(), TiedAdapter)
    assert not list(layers[HEAD].adapters.parameters())
    one, other = updates(model)
    assert bool(one.any())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    moved = logits(model)
    assert not close(moved, base)
    merged = llama()
    weight = merged.get_input_embeddings().weight
    with torch.no_grad():
        weight += one
        for path, layer in adapter_state(model).layers.items():
            if path not in (EMBED, HEAD):
                right, left = layer.update_factors()
                merged.get_submodule(path).weight += layer.scaling * left @ right
    assert close(moved, logits(merged))


def test_gradients_are_the_sums_of_both_layers():
    """Those of one weight that both multiply with, by autograd in float64."""
    model = adapted(("embed_tokens",), llama(dtype=torch.float64))
    move(model, 0.1)
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    adapter = adapted_layers(model)[EMBED].active()
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    base = llama(dtype=torch.float64)
    weight = base.get_input_embeddings().weight.detach() + adapter.scaling * (B @ A).T
    tied = {f"{EMBED}.weight": weight, f"{HEAD}.weight": weight}
    torch.func.functional_call(base, tied, (ids,), {"labels": ids}).loss.backward()
    torch.testing.assert_close(adapter.lora_A.grad, A.grad)
    torch.testing.assert_close(adapter.lora_B.grad, B.grad)


def test_training_saving_and_loading(tmp_path):
    model = adapted(init_lora_weights="loram")
    train(model, steps=2)
    one, other = updates(model)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    want = logits(model.eval())
    for folder, options in (("native", {}), ("peft", {"format": "peft"})):
        save_adapter(model, tmp_path / folder, **options)
        loaded = llama()
        load_adapter(loaded, tmp_path / folder, progress=False)
        assert close(logits(loaded.eval()), want)
        assert isinstance(adapted_layers(loaded)[HEAD].active(), TiedAdapter)
        train(loaded, steps=1)
        one, other = updates(loaded)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    other = adapted(init_lora_weights="loram")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other.eval()), want)
    clone = copy.deepcopy(model).double()
    assert clone.lm_head.active().source is clone.model.embed_tokens.active()
    assert close(logits(clone).float(), want)


def test_merging_keeps_the_tie():
    model = adapted()
    move(model, 0.1)
    want = logits(model)
    merge_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert close(logits(model), want)
    model = adapted()
    base = logits(llama())
    move(model, 0.1)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    unload_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), base)


def test_several_adapters():
    model = adapted(name="a")
    move(model, 0.1)
    want = logits(model)
    quiet(model, LoRAConfig(r=2, target_modules=["q_proj"], residual="implicit"), adapter_name="b")
    adapted(("lm_head",), model, "c")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{EMBED}.adapters.c.lora_{half}" for half in "AB"}
    set_adapter(model, "a")
    assert torch.equal(logits(model), want)
    ids = token_ids()
    with torch.no_grad(), adapters_per_row(model.eval(), ["b", "a", "c"]):
        got = model(ids, use_cache=False).logits
    assert torch.equal(got[1], logits(model, ids[1:2])[0])


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_saved_modules_stay_tied(saved, tmp_path):
    model = adapted(("q_proj",), modules_to_save=[saved])
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight is embedding.weight and head.weight.requires_grad
    train(model, steps=2)
    assert head.weight is embedding.weight
    want = logits(model.eval())
    save_adapter(model, tmp_path)
    loaded = llama()
    load_adapter(loaded, tmp_path, progress=False)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.requires_grad
    assert close(logits(loaded.eval()), want)


@needs_peft
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ".*(q_proj|embed_tokens)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_files_of_peft_and_for_peft(options, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=2, ensure_weight_tying=True, init_lora_weights=False, **options)
    theirs = get_peft_model(llama(), config)
    if "modules_to_save" in options:
        with torch.no_grad():
            theirs.base_model.model.model.embed_tokens.modules_to_save["default"].weight += 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    load_adapter(ours, tmp_path / "theirs", progress=False)
    assert close(logits(ours.eval()), logits(theirs.eval()))
    if "modules_to_save" in options:
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
    else:
        assert isinstance(ours.lm_head.active(), TiedAdapter)
    train(ours.train(), steps=2)
    want = logits(ours.eval())
    save_adapter(ours, tmp_path / "ours", format="peft")
    back = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert back.peft_config["default"].ensure_weight_tying
    assert close(logits(back), want)


def test_what_cannot_be_tied(tmp_path):
    model = llama()
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="cannot tie adapters with use_dora=True"):
        adapted(model=model, use_dora=True)
    with pytest.raises(ValueError, match="exclude_modules leaves out lm_head"):
        adapted(model=model, exclude_modules=["lm_head"])
    with pytest.raises(TypeError, match="ensure_weight_tying must be True or False"):
        LoRAConfig(ensure_weight_tying="yes")
    unchanged()
    with pytest.warns(UserWarning, match="neither target_modules nor modules_to_save names"):
        adapted(("q_proj",))
    with pytest.warns(UserWarning, match="no module that is tied"):
        from tests.support.tiny_models import llama as tiny

        adapted(("embed_tokens",), tiny())
    model = adapted(name="a")
    save_adapter(model, tmp_path, adapter_name="a")
    with pytest.raises(ValueError, match="tied to the embedding's"):
        hotswap_adapter(model, tmp_path, "a")


def test_loaded_adapters_that_differ_stay_apart(tmp_path):
    """As PEFT writes them after `.to(dtype)`, which parts the tensors that it ties."""
    model = adapted()
    move(model, 0.1)
    state = adapter_state(model)
    state.layers[HEAD].lora_A += 1
    from lora_kernels.model.lora import apply_state

    loaded = llama()
    with pytest.warns(UserWarning, match="differ, and stay apart"):
        apply_state(loaded, state, progress=False)
    assert not isinstance(adapted_layers(loaded)[HEAD].active(), TiedAdapter)
