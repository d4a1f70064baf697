"""Questions that once had several answers have one: what is a linear layer, which layers are
"all-linear", which adapter `layer.lora_A` belongs to, how many weights are started at once.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, capture_gradients, set_adapter
from lora_kernels.init import LoRAM
from lora_kernels.magnitude import inspect_model, measure
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.selection import find_targets, select_layers
from lora_kernels.model.starts import make

from ..support.packages import needs_peft, needs_transformers
from ..support.quantized import OnlyForward
from ..support.running import token_ids
from ..support.tiny_models import gpt2, llama


class Mixed(nn.Module):
    """Layers that can be adapted, and some that look like it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.plain = nn.Linear(8, 8)
        self.codes = OnlyForward(torch.randn(8, 8), None, torch.float32)
        self.twice = self.plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0]
        return self.codes(self.plain(self.computed(x)))


def falcon_layer(bias: bool = True) -> nn.Linear:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(48, 32, bias=bias)


@needs_transformers
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
def test_falcons_layers_in_from_linear(residual, bias):
    """`add_lora` takes them: so does `from_linear`."""
    linear = falcon_layer(bias)
    x = torch.randn(5, 48)
    want = linear(x).detach()
    weight = linear.weight.detach().clone()
    layer = LoRALinear.from_linear(linear, r=4, residual=residual)
    error = (layer(x) - want).abs().max()
    assert error <= 1e-5 * want.abs().max()
    with torch.no_grad():
        layer.lora_B.add_(0.1)
    delta = layer.scaling * (
        layer.lora_B @ layer.lora_A - torch.matmul(*layer.start_factors()[::-1])
    )
    merged = layer.to_linear().weight
    assert (merged - weight - delta).abs().max() <= 1e-5 * merged.abs().max()


@needs_transformers
def test_all_linear_is_one_set():
    """For `add_lora`, `inspect_model` and `capture_gradients`, before and after adapting."""
    for model in (llama(), gpt2()):
        ids = token_ids()
        names = list(select_layers(model, LoRAConfig()).layers)
        assert list(find_targets(model)) == names and len(names) in (14, 8)
        assert [row.name for row in inspect_model(model, 4, progress=False)] == names
        batches = [{"input_ids": ids, "labels": ids}]
        assert list(capture_gradients(model, batches, progress=False)) == names
        report = add_lora(model, LoRAConfig(r=4), progress=False)
        assert [row.name for row in report.adapted] == names
        assert [row.name for row in inspect_model(model, progress=False)] == names
        assert list(capture_gradients(model, batches, progress=False)) == names


def test_what_is_no_linear_layer_of_its_own_is_left_out_by_all():
    model = Mixed()
    names = ["plain", "codes", "twice"]
    assert list(find_targets(model)) == names
    assert [row.name for row in inspect_model(model, 4, progress=False)] == names
    report = add_lora(copy.deepcopy(model), LoRAConfig(r=4), progress=False)
    assert [row.name for row in report.adapted] == ["plain", "codes"]
    assert {"attention.out_proj", "computed"} <= report.skipped.keys()
    refused = {
        "attention.out_proj": "which nn.MultiheadAttention does not call: name 'attention'",
        "computed": "a target must be a linear layer that computes",
    }
    for name, text in refused.items():
        for targets in ([name], {name: model.get_submodule(name)}, [model.get_submodule(name)]):
            with pytest.raises(TypeError, match=text):
                find_targets(model, targets)
    with pytest.raises(TypeError, match=r"weight of 'codes' is quantized \(forward\)"):
        capture_gradients(model, [torch.randn(2, 3, 8)], loss=lambda m, x: m(x).square().mean())


@needs_transformers
def test_adapted_gpt2_is_measured():
    """Its Conv1D are as visible as an nn.Linear of the same W, before and after training."""
    model = gpt2()
    plain = {
        name: base.weight().clone() for name, base in find_targets(model).items()
    }  # W [out, in]
    add_lora(model, LoRAConfig(r=4, lora_alpha=8), progress=False)
    for layer in adapted_layers(model).values():
        with torch.no_grad():
            layer.lora_B.mul_(1.5)
    rows = inspect_model(model, progress=False)
    assert [row.name for row in rows] == list(plain)
    for row in rows:
        want = measure(plain[row.name], 4, 2.0)
        assert (row.out_features, row.in_features) == tuple(plain[row.name].shape)
        assert row.nu_weight == pytest.approx(want.nu_weight, rel=1e-6)
        assert row.start_ratio == pytest.approx(want.start_ratio, rel=1e-5)
        layer = model.get_submodule(row.name)
        A0, B0 = (factor.double() for factor in layer.start_factors())
        update = 2.0 * (layer.lora_B.detach().double() @ layer.lora_A.double() - B0 @ A0).detach()
        assert row.nu_update == pytest.approx(float(update.square().mean()), rel=1e-6)


def test_quantized_layers_are_measured():
    model = nn.ModuleDict({"q": OnlyForward(torch.randn(12, 20), None, torch.float32)})
    W = model["q"](torch.eye(20)).detach().T  # [out, in]
    (row,) = inspect_model(model, 4, progress=False)
    assert row.nu_weight == pytest.approx(float(W.double().square().mean()), rel=1e-6)
    add_lora(model, LoRAConfig(r=4), progress=False)
    (again,) = inspect_model(model, progress=False)
    assert again.nu_weight == row.nu_weight and again.nu_update == 0.0


def sizes_of_calls(monkeypatch) -> list[int]:
    """How many weights each call of LoRAM's starts was given."""
    calls: list[int] = []
    make_starts = LoRAM.make_starts

    def recorded(self, requests):
        calls.append(len(requests))
        return make_starts(self, requests)

    monkeypatch.setattr(LoRAM, "make_starts", recorded)
    return calls


@needs_peft
@pytest.mark.parametrize(("bytes_at_once", "largest"), [(2**31, 32), (5 * 16 * 16 * 4, 5)])
def test_peft_starts_no_more_weights_at_once_than_add_lora(bytes_at_once, largest, monkeypatch):
    """Of 70 layers of one shape: batches hold at most 32 layers, and at most 2 GiB."""
    from peft import LoraConfig, get_peft_model

    from lora_kernels.peft import initialize

    monkeypatch.setattr(make, "_BATCH_BYTES", bytes_at_once)
    calls = sizes_of_calls(monkeypatch)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(70)))
    adapted = copy.deepcopy(model)
    add_lora(adapted, LoRAConfig(r=4, lora_alpha=8), progress=False)
    ours, calls[:] = list(calls), []
    names = [str(k) for k in range(70)]
    bridged = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    initialize(bridged, progress=False)
    assert calls == ours and max(calls) == largest and sum(calls) == 70
    for name in names:
        layer = bridged.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, adapted.get_submodule(name).lora_A)


class TestAdaptersAreAlike:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
        for name, r in (("one", 2), ("two", 3)):
            config = LoRAConfig(r=r, lora_dropout=r / 10, residual="implicit")
            add_lora(model, config, adapter_name=name, progress=False)
        return model

    def test_the_layers_attributes_are_the_active_adapters(self):
        model = self.model()
        layer = model[0]
        for name, r in (("one", 2), ("two", 3)):
            set_adapter(model, name)
            assert layer.lora_A is layer.adapter(name).lora_A and layer.lora_A.shape == (r, 12)
            assert layer.r == r and layer.scaling == 8 / r and layer.lora_dropout == r / 10
            assert f"r={r}" in repr(layer)
        layer.scaling, layer.lora_dropout = 3.0, 0.0
        assert layer.adapter("two").scaling == 3.0 and layer.adapter("one").scaling == 4.0
        layer.lora_B = nn.Parameter(torch.ones(10, 3))
        assert torch.equal(layer.adapter("two").lora_B, torch.ones(10, 3))
        assert sum(name.endswith("lora_B") for name, _ in layer.named_parameters()) == 2

    @pytest.mark.parametrize("init", ["loram", "pissa", "lora_xs"])
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_state_dicts_of_before(self, residual, init):
        """The first adapter's tensors were the layer's own: "lora_A", not "adapters.default..."."""

        def make(seed: int) -> LoRALinear:
            torch.manual_seed(seed)
            linear = nn.Linear(12, 10)
            return LoRALinear.from_linear(linear, r=4, init_lora_weights=init, residual=residual)

        layer, other = make(0), make(1)
        old = {k.replace("adapters.default.", ""): v for k, v in layer.state_dict().items()}
        assert {"weight", "bias", "lora_A", "lora_B", "_extra_state"} <= old.keys()
        other.load_state_dict(old)
        assert old.keys() == {
            k.replace("adapters.default.", "") for k in layer.state_dict()
        }  # which was not changed
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), other.state_dict()[key].nan_to_num())
        x = torch.randn(3, 12)
        assert torch.equal(layer(x), other(x))

    def test_a_models_state_dict_of_before(self):
        model, other = self.model(), self.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        old = {k.replace("adapters.one.", ""): v for k, v in model.state_dict().items()}
        assert "0.lora_A" in old and "0.adapters.two.lora_A" in old
        other.load_state_dict(old)
        model.eval(), other.eval()  # no dropout
        x = torch.randn(3, 12)
        for name in ("one", "two"):
            set_adapter(model, name), set_adapter(other, name)
            assert np.array_equal(model(x).detach(), other(x).detach())
