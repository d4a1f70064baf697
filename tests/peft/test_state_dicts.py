"""A₀ and B₀ when A and B come from a state_dict, without PEFT's folders."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ..support.packages import needs_peft
from ..support.peft_models import accelerate, adapted, initialize, linear_layers
from ..support.running import close, logits, move, same_bits, weights_of
from ..support.tiny_models import llama

pytestmark = needs_peft

WITHOUT = "were loaded without the initial factors"


def moved(method: str | None = None, seed: int = 0, **options) -> nn.Module:
    model = adapted(llama(), **options)
    if method is not None:
        initialize(model, method)
    move(model, seed=seed)
    return model


def set_by_peft(model: nn.Module, other: nn.Module):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    return set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def set_whole(model: nn.Module, other: nn.Module):
    return model.load_state_dict(other.state_dict())


def set_trained(model: nn.Module, other: nn.Module):
    trained = {n: p.detach() for n, p in other.named_parameters() if p.requires_grad}
    return model.load_state_dict(trained, strict=False)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("set_state", [set_by_peft, set_whole, set_trained])
def test_a_plain_adapter_leaves_nothing_to_subtract(set_state, assign, monkeypatch):
    """With a warning, because its own start may be missing."""
    model, other = moved("loram"), moved(seed=1)
    accelerate(model)
    if assign:
        load = nn.Module.load_state_dict
        monkeypatch.setattr(
            nn.Module,
            "load_state_dict",
            lambda *args, **options: load(*args, **options, assign=True),
        )
    with pytest.warns(UserWarning, match=WITHOUT):
        result = set_state(model, other)
    assert not [key for key in result.missing_keys if "lora_" in key]
    assert not any("lora_start" in key for key in model.state_dict())
    assert close(logits(model), logits(other))
    for name, layer in linear_layers(model).items():
        want = linear_layers(other)[name].get_delta_weight("default")
        assert torch.equal(layer.get_delta_weight("default"), want)


@pytest.mark.parametrize("set_state", [set_by_peft, set_whole])
@pytest.mark.parametrize("method", ["loram", "pissa", "lora"])
def test_a_start_comes_with_its_factors(method, set_state):
    """Into a model that subtracts another start, none, or no longer one."""
    other = moved("loram", seed=1)
    model = moved(method)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            result = set_state(model, other)
        assert not [key for key in result.missing_keys if "lora_" in key]
        assert not result.unexpected_keys
        assert same_bits(weights_of(model), weights_of(other))
        assert torch.equal(logits(model), logits(other))
        with pytest.warns(UserWarning, match=WITHOUT):
            set_by_peft(model, moved())


def test_other_parts_of_a_state_leave_the_start():
    """The base alone, A alone, or factors that do not fit."""
    model = moved("loram")
    before, want = weights_of(model), logits(model)
    base = {key: value for key, value in before.items() if "lora_" not in key}
    only_A = {key: value for key, value in before.items() if ".lora_A." in key}
    for part in (base, only_A):
        result = model.load_state_dict(part, strict=False)
        assert sum("lora_start" in key for key in result.missing_keys) == 28
        assert torch.equal(logits(model), want)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(moved(r=2).state_dict(), strict=False)
    assert same_bits(weights_of(model), before)


def test_only_the_adapter_that_is_loaded():
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    model = moved("loram")
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    initialize(model, "pissa", adapter_name="second")
    want = logits(model)
    other = moved(seed=1)
    with pytest.warns(UserWarning, match=WITHOUT):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other), "second")
    assert torch.equal(logits(model), want)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(other))


def test_folders_load_without_the_warning(tmp_path):
    for name, source in (("plain", None), ("started", "pissa")):
        other = moved(source, seed=1)
        other.save_pretrained(tmp_path / name)
        model = moved("loram")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.load_adapter(tmp_path / name, "default")
        assert torch.equal(logits(model), logits(other))


def test_undo_after_a_plain_adapter():
    """The start comes back; afterwards the layers are PEFT's again."""
    model = adapted(llama())
    before, forms = weights_of(model), [set(vars(m)) for m in model.modules()]
    first = initialize(model, "loram")
    second = initialize(model, "pissa")
    with pytest.warns(UserWarning, match=WITHOUT):
        set_by_peft(model, moved(seed=1))
    second.undo()
    assert torch.equal(logits(model), logits(llama()))
    assert any("lora_start" in key for key in model.state_dict())
    first.undo()
    assert same_bits(weights_of(model), before)
    assert [set(vars(m)) for m in model.modules()] == forms


@pytest.mark.parametrize("name", ["default", "again"])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_a_folder_with_the_tensors_of_a_state_dict(tmp_path, method, name):
    """As FSDP's checkpoints of adapters have them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    other = moved("loram", seed=1)
    other.peft_config["default"].save_pretrained(tmp_path)
    state = get_peft_model_state_dict(other)
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()},
        tmp_path / "adapter_model.safetensors",
    )
    model = moved(method)
    result = model.load_adapter(tmp_path, name)
    assert not result.missing_keys and not result.unexpected_keys
    model.set_adapter(name)
    assert torch.equal(logits(model), logits(other))


def test_a_folder_without_some_layers(tmp_path):
    """In those, PEFT leaves A and B, which need their start."""
    moved(target_modules=["q_proj"], seed=1).save_pretrained(tmp_path)
    model = moved("loram", target_modules=["q_proj", "up_proj"])
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(5, layer.in_features)
    want = layer(x)
    result = model.load_adapter(tmp_path, "default")
    assert len(result.missing_keys) == 8  # A, B, A₀ and B₀ of two layers
    assert torch.equal(layer(x), want)
    names = {key.split(".")[-3] for key in model.state_dict() if "lora_start_A" in key}
    assert names == {"up_proj"}
