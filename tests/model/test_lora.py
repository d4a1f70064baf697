"""Whole models: add, train, switch, merge and unload adapters."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    disable_adapters,
    enable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import get_initializer, initializer_names
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state

from ..support.exhaustive import EXHAUSTIVE
from ..support.packages import needs_transformers
from ..support.running import TIGHT, logits, quiet, snapshot, start_data, train
from ..support.tiny_models import gpt2, llama

pytestmark = needs_transformers

# LoftQ and QERA change the base on purpose: test_quantized.py has them.
NAMES = [n for n in initializer_names() if not get_initializer(n).rewrites_base]
# These change the model's outputs on purpose.
CHANGING = ("init_ab_plus", "kasa", "lora_one", "lora_sb", "lora_xs")
MAKES, RESIDUALS = (llama, gpt2), ("auto", "implicit")


def lives():
    """Every start with every residual that makes a difference, over one of the two models each; or
    all combinations.
    """
    if EXHAUSTIVE:
        return [*itertools.product(MAKES, RESIDUALS, NAMES)]
    found = []
    for k, name in enumerate(NAMES):
        residuals = RESIDUALS if get_initializer(name).changes_base else RESIDUALS[:1]
        found += [(MAKES[(k + j) % 2], residual, name) for j, residual in enumerate(residuals)]
    return found


@pytest.mark.parametrize(("make", "residual", "name"), lives())
def test_life_of_a_model(make, residual, name, tmp_path, device):
    """Initialize, train, disable, enable, save, load, merge and unload, compared with the base and
    with each other.
    """
    model = make(dtype=torch.float64).to(device)
    base = logits(model)
    config = LoRAConfig(r=4, lora_alpha=6, init_lora_weights=name, residual=residual)
    quiet(model, config, **start_data(model, config))
    start = logits(model)
    if name not in CHANGING:
        assert (start - base).abs().max() <= TIGHT
    assert train(model)[-1] > 0
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-6
    with disable_adapters(model):
        off = logits(model)
    assert (off - base).abs().max() <= TIGHT
    if residual == "implicit" or not config.initializer.changes_base:
        assert torch.equal(off, base)
    assert torch.equal(logits(model), trained)

    fresh = make(dtype=torch.float64).to(device)
    save_adapter(model, tmp_path / "native", format="native")
    load_adapter(fresh, tmp_path / "native", progress=False)
    assert torch.equal(logits(fresh), trained)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )

    merged = merge_lora(copy.deepcopy(model))
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in make().named_modules()
    }
    assert (logits(merged) - trained).abs().max() <= TIGHT
    assert unload_lora(model) is model
    assert (logits(model) - base).abs().max() <= TIGHT
    assert not adapted_layers(model)
    assert list(model.state_dict()) == list(make().state_dict())


class TestSeveralAdapters:
    def test_each_is_what_it_is_alone(self):
        base = logits(llama(dtype=torch.float64))
        configs = {
            "first": LoRAConfig(r=4, init_lora_weights="loram", residual="implicit"),
            "second": LoRAConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]),
            "third": LoRAConfig(r=3, init_lora_weights="lora", lora_alpha=16, bias="all"),
        }
        alone = {}
        for name, config in configs.items():
            model = llama(dtype=torch.float64)
            torch.manual_seed(5)
            quiet(model, LoRAConfig(**{**vars(config), "residual": "implicit"}))
            train(model)
            alone[name] = logits(model)
        together = llama(dtype=torch.float64)
        for name, config in configs.items():
            torch.manual_seed(5)
            quiet(together, config, adapter_name=name)
            assert (logits(together) - base).abs().max() <= TIGHT
            train(together)
        assert adapter_names(together) == list(configs)
        for name in ("second", "first", "third"):
            set_adapter(together, name)
            assert (logits(together) - alone[name]).abs().max() <= TIGHT
            training = {n for n, p in together.named_parameters() if p.requires_grad}
            expected = len(adapter_state(together).layers) * 2
            assert len(training) == expected
            with disable_adapters(together):
                assert torch.equal(logits(together), base)
        set_adapter(together, "second")
        assert (logits(merge_lora(together)) - alone["second"]).abs().max() <= TIGHT

    def test_a_residual_takes_no_implicit_adapter(self):
        model = llama()
        quiet(model, LoRAConfig(r=4))
        check_unchanged = snapshot(model)
        with pytest.raises(
            ValueError,
            match=r"'default' of .*q_proj was added with residual='absorb'.*implicit",
        ):
            quiet(model, LoRAConfig(r=4, residual="implicit"), adapter_name="b")
        check_unchanged()

    def test_names(self):
        model = llama()
        quiet(model, LoRAConfig(r=2, residual="implicit"))
        with pytest.raises(ValueError, match="has an adapter 'default' already"):
            quiet(model, LoRAConfig(r=2, residual="implicit"))
        for name in ("", "a.b", "forward", "keys"):
            with pytest.raises(ValueError, match="adapter_name cannot be"):
                quiet(model, LoRAConfig(r=2, residual="implicit"), adapter_name=name)
        with pytest.raises(ValueError, match=r"unknown adapter 'defualt'.*did you mean 'default'"):
            set_adapter(model, "defualt")


def test_disable_is_a_switch_and_a_block():
    model = llama(dtype=torch.float64)
    base = logits(model)
    quiet(model, LoRAConfig(r=4))
    train(model)
    trained = logits(model)
    disable_adapters(model)
    assert (logits(model) - base).abs().max() <= TIGHT
    with disable_adapters(model):
        pass
    assert (logits(model) - base).abs().max() <= TIGHT
    enable_adapters(model)
    assert torch.equal(logits(model), trained)


def test_report():
    model = llama()
    report = quiet(
        model, LoRAConfig(r=4, target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.1\..*")
    )
    text = str(report)
    assert "2 layers" in text and "model.layers.*.mlp.up_proj [48, 32]: r=4, s=2, absorb" in text
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{100 * report.trainable_share:.2f} %" in text
    assert report.skipped["lm_head"] == "not among target_modules"
    assert report.skipped["model.layers.1.mlp.up_proj"] == "in exclude_modules"


def test_loading_onto_a_residual_warns(tmp_path):
    """Loading an adapter onto the residual of another one, which PEFT does silently."""
    model = llama()
    quiet(model, LoRAConfig(r=8, init_lora_weights="pissa"))
    save_adapter(model, tmp_path)
    residual = llama()
    for name, layer in adapted_layers(model).items():
        residual.get_submodule(name).weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.warns(UserWarning, match="another base, or one from which a start was subtracted"):
        load_adapter(residual, tmp_path, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(), tmp_path, progress=False)


def test_starts_of_a_model_are_those_of_its_layers():
    model, alone = llama(), llama()
    quiet(model, LoRAConfig(r=4, lora_alpha=12))
    for name, layer in adapted_layers(model).items():
        one = LoRALinear.from_linear(alone.get_submodule(name), r=4, lora_alpha=12)
        assert torch.equal(layer.lora_A, one.lora_A) and torch.equal(layer.lora_B, one.lora_B)
        torch.testing.assert_close(layer.weight, one.weight, rtol=0, atol=1e-7)


def test_every_name_is_an_initializer_of_the_config():
    for name in initializer_names():
        assert LoRAConfig(init_lora_weights=name).initializer == get_initializer(name)
    assert LoRAConfig(init_lora_weights=True).initializer == get_initializer("lora")
