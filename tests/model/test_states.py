"""Models in various states: several adapters, errors halfway, other dtypes and parameters."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    add_lora,
    disable_adapters,
    merge_lora,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import PiSSA
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state, apply_state

# Three layers of 16 columns in float64, on outputs of size 1.
TIGHT = 1e-13
IMPLICIT = {"r": 2, "residual": "implicit"}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.fixture()
def model():
    torch.manual_seed(0)
    return MLP().double()


X = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def quiet(model, adapter_name="default", **options):
    return add_lora(model, LoRAConfig(**options), adapter_name=adapter_name, progress=False)


def move(model) -> torch.Tensor:
    """Change all trainable parameters, in place of training, and return the new output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model(X).detach()


def off_by(model, want) -> float:
    return float((model(X) - want).detach().abs().max())


class TestSeveralAdapters:
    def test_biases_of_one_and_layers_of_another(self, model):
        """The second adapter starts from the base, not from the biases of the first."""
        base = model(X).detach()
        quiet(model, "one", target_modules=["a"], bias="all", **IMPLICIT)
        one = move(model)
        quiet(model, "two", target_modules=["b"], bias="lora_only", **IMPLICIT)
        assert off_by(model, base) <= TIGHT
        two = move(model)
        for name, want in (("one", one), ("two", two)):
            set_adapter(model, name)
            assert off_by(model, want) <= TIGHT
            loaded = MLP().double()
            loaded.load_state_dict(unload_lora(copy.deepcopy(model)).state_dict())
            apply_state(loaded, adapter_state(model), progress=False)
            assert off_by(loaded, want) <= TIGHT
        with disable_adapters(model):
            assert off_by(model, base) <= TIGHT
        unload_lora(model)
        assert off_by(model, base) <= TIGHT

    def test_a_layer_is_adapted_or_trained_in_full(self, model):
        quiet(model, "one", target_modules=["a"], modules_to_save=["head"], **IMPLICIT)
        want = move(model)
        with pytest.raises(ValueError, match=r"head is trained in full by adapter 'one'"):
            quiet(model, "two", target_modules=["b", "head"], **IMPLICIT)
        with pytest.raises(ValueError, match=r"modules_to_save: a has adapter 'one'"):
            quiet(model, "two", target_modules=["b"], modules_to_save=["a"], **IMPLICIT)
        other = MLP().double()
        quiet(other, target_modules=["b"], modules_to_save=["a"], **IMPLICIT)
        with pytest.raises(ValueError, match=r"trains a\.weight in full, but adapter 'one' has"):
            apply_state(model, adapter_state(other), adapter_name="two", progress=False)
        assert adapter_names(model) == ["one"] and off_by(model, want) == 0

    def test_parts_of_an_adapted_model(self, model):
        whole = nn.Sequential(model, nn.Linear(8, 8).double())
        quiet(model, **IMPLICIT)
        with pytest.raises(ValueError, match=r"0\.a is adapted already, .*than this Sequential"):
            quiet(whole, **IMPLICIT)
        unload_lora(model)
        quiet(whole, **IMPLICIT)
        with pytest.raises(ValueError, match="a is adapted already"):
            quiet(model, **IMPLICIT)
        assert model.a.adapter_names == ["default"]

    def test_two_parameters_over_the_same_memory(self, model):
        model.b.weight = nn.Parameter(model.a.weight.data)
        base = model(X).detach()
        report = quiet(model, r=2)
        assert [row.residual for row in report.adapted] == ["implicit", "implicit", "absorb"]
        assert off_by(model, base) <= TIGHT

    def test_a_weight_that_cannot_be_written(self, model):
        model.b.weight = nn.Parameter(model.b.weight.data[:1].expand(16, 16))
        base = model(X).detach()
        report = quiet(model, r=2)
        assert "overlapping view" in report.adapted[1].note
        assert off_by(model, base) <= TIGHT


class TestErrorsHalfWay:
    """Errors that cannot be foreseen: out of memory, or Ctrl-C."""

    @pytest.mark.parametrize("init", ["loram", "pissa"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
    def test_a_first_adapter(self, model, init, error, monkeypatch):
        base, before = model(X).detach(), dict(model.named_modules())
        over = LoRALinear.over

        def stops(linear):
            if linear is before["head"]:
                raise error
            return over(linear)

        monkeypatch.setattr(LoRALinear, "over", stops)
        with pytest.raises(error):
            quiet(model, r=2, init_lora_weights=init, bias="all")
        assert dict(model.named_modules()) == before and adapter_names(model) == []
        assert all(p.requires_grad for p in model.parameters())
        assert off_by(model, base) <= TIGHT
        monkeypatch.undo()
        quiet(model, r=2)  # as if nothing had been
        assert off_by(model, base) <= TIGHT

    def test_a_second_adapter(self, model, monkeypatch):
        quiet(model, "one", bias="all", target_modules=["a", "b"], **IMPLICIT)
        want = move(model)
        attach = type(model.b).attach

        def stops(layer, *args):
            if layer is model.b:
                raise KeyboardInterrupt
            return attach(layer, *args)

        monkeypatch.setattr(type(model.b), "attach", stops)
        with pytest.raises(KeyboardInterrupt):
            quiet(model, "two", **IMPLICIT)
        assert adapter_names(model) == model.a.adapter_names == ["one"]
        assert off_by(model, want) == 0
        monkeypatch.undo()
        quiet(model, "two", **IMPLICIT)
        set_adapter(model, "one")
        assert off_by(model, want) == 0

    def test_starts(self, model, monkeypatch):
        quiet(model, "one", target_modules=["a"], bias="all", **IMPLICIT)
        want = move(model)

        def stops(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(PiSSA, "starts", stops)
        with pytest.raises(KeyboardInterrupt):
            quiet(model, "two", init_lora_weights="pissa", **IMPLICIT)
        assert off_by(model, want) == 0 and model.a.bias.requires_grad

    def test_lazy_layers(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
        with pytest.raises(ValueError, match="lazy layers without a shape: call it once"):
            quiet(model, r=2)
        assert type(model[0]) is nn.Linear


class TestTensorsThatAreReplaced:
    """The copies of `modules_to_save` follow the tensors in the modules, whoever replaced them."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype):
        model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
        for name in ("one", "two"):
            quiet(model, name, target_modules=["0"], modules_to_save=["1"], **IMPLICIT)
        model.to(dtype)
        for name in ("one", "two"):
            set_adapter(model, name)
            model(X.to(dtype))
            assert torch.equal(adapter_state(model).extra["1.running_mean"], model[1].running_mean)
        with disable_adapters(model):
            assert model(X.to(dtype)).dtype == dtype
        assert {t.dtype for t in unload_lora(model).state_dict().values()} == {dtype, torch.int64}

    def test_what_trains_in_float32(self, model):
        """As trainers do with a 16-bit model: the base keeps its dtype."""
        model.bfloat16()
        quiet(model, target_modules=["a", "b"], modules_to_save=["head"], r=2)
        model.head.float()
        unload_lora(model)
        assert model.head.weight.dtype == torch.bfloat16

    def test_assigned(self, model):
        quiet(model, target_modules=["a"], modules_to_save=["head"], r=2)
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        model.load_state_dict({**model.state_dict(), "head.bias": state["head.bias"]}, assign=True)
        assert torch.equal(adapter_state(model).extra["head.bias"], state["head.bias"])

    def test_integers(self, model):
        model.head.numbers = nn.Parameter(torch.arange(3), requires_grad=False)
        quiet(model, target_modules=["a"], modules_to_save=["head"], r=2)
        assert adapter_state(model).extra["head.numbers"].tolist() == [0, 1, 2]


class TestLayers:
    def test_computed_biases(self, model):
        parametrize.register_parametrization(model.a, "bias", nn.Tanh())
        prune.l1_unstructured(model.b, "bias", 0.5)
        assert set(quiet(model, r=2).skipped) == {"a", "b"}
        with pytest.raises(TypeError, match="'a', a ParametrizedLinear"):
            quiet(model, "two", r=2, target_modules=["a"])

    def test_a_compiled_layer(self, model):
        model.a.compile(backend="eager")
        base = model(X).detach()
        quiet(model, r=2, target_modules=["a"])
        assert off_by(model, base) <= TIGHT
        move(model)
        assert off_by(model, base) > 1e-2

    def test_subclasses_come_back(self, model):
        class Named(nn.Linear):
            pass

        model.a = Named(16, 16).double()
        for back in (merge_lora, unload_lora):
            quiet(model, r=2)
            assert type(back(model).a) is Named

    def test_a_base_into_an_absorbed_layer(self, model):
        """No key of it that matters is missing, so it would be taken for a residual."""
        base = copy.deepcopy(model.state_dict())
        quiet(model, r=2)
        with pytest.raises(RuntimeError, match=r"a\.weight is an original weight, .*adapt it then"):
            model.load_state_dict(base, strict=False)
        unload_lora(model)
        quiet(model, **IMPLICIT)
        model.load_state_dict(base, strict=False)

    def test_experts_are_told_of(self):
        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Parameter(torch.randn(4, 16, 16))

        model = nn.ModuleDict({"gate": nn.Linear(16, 4), "experts": Experts()})
        assert quiet(model, r=2).skipped == {
            "experts": "its experts are 3-D parameters, not linear layers"
        }


def test_merging_frees_each_weight_once_it_is_replaced(model, monkeypatch):
    quiet(model, r=2)
    seen: list[weakref.ref] = []
    to_linear = LoRALinear.to_linear

    def watched(layer):
        assert [ref for ref in seen if ref() is not None] == []
        seen.append(weakref.ref(layer.weight))
        return to_linear(layer)

    monkeypatch.setattr(LoRALinear, "to_linear", watched)
    merge_lora(model)
    assert len(seen) == 3


@pytest.mark.parametrize("back", [merge_lora, unload_lora])
def test_back_within_a_block(model, back):
    base = model(X).detach()
    quiet(model, r=2)
    with disable_adapters(model):
        back(model)
    assert off_by(model, base) <= TIGHT


def test_names_inside_wrappers(model):
    quiet(model, r=2)
    assert list(adapted_layers(torch.compile(model))) == ["a", "b", "head"]


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"use_rslora": "no"}, TypeError, "use_rslora must be True or False, got 'no'"),
        (
            {"layers_to_transform": 0, "layers_pattern": "h("},
            ValueError,
            r"layers_pattern has 'h\(', not a regular expression",
        ),
    ],
)
def test_configurations(options, error, message):
    with pytest.raises(error, match=message):
        LoRAConfig(**options)
