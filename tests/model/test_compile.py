"""Compiled models: one graph serves all adapters of one shape, also after an exchange in place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lora_kernels import (
    LoRAConfig,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
)
from lora_kernels.model.lora import adapter_state

from ..support.packages import needs_transformers
from ..support.quantized import OnlyForward
from ..support.running import move, quiet

pytestmark = needs_transformers

# Three layers in float64, on outputs of size 1; B is multiplied by s before the product, not after.
TIGHT = 1e-13
FLOAT32 = 1e-7  # of the factors in the wrapper
NAMES = [f"a{k}" for k in range(10)]


class Net(nn.Module):
    """A Linear, a Conv1D, and a layer that gets a `LoRAWrapper`."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16).double(), Conv1D(12, 16).double()
        self.c = OnlyForward(torch.randn(8, 12), torch.randn(8), torch.float64)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


X = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ten_adapters(init: str, training: bool = False) -> nn.Module:
    """With different s, and different factors but for the first."""
    model = Net().train(training)
    for k, name in enumerate(NAMES):
        residual = "implicit" if init == "loram" else "auto"
        config = LoRAConfig(r=4, lora_alpha=3 + k, init_lora_weights=init, residual=residual)
        quiet(model, config, adapter_name=name)
        if k:
            move(model, 0.1, seed=k)
    set_adapter(model, NAMES[0])
    return model


@pytest.fixture
def compiled():
    """Compiles a model, in a fresh dynamo; `graphs` counts what was compiled since."""
    torch._dynamo.reset()
    counters.clear()
    return lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(run, model) -> list[torch.Tensor]:
    model.zero_grad()
    run(X).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


class TestSwitching:
    @pytest.mark.parametrize("init", ["lora", "loram", "lora_xs"])
    def test_inference(self, init, compiled):
        model = ten_adapters(init)
        base, run = Net()(X), compiled(model)
        with torch.no_grad():
            if init == "lora":
                assert torch.equal(run(X), base)
            for name in NAMES:
                set_adapter(model, name)
                assert (run(X) - model(X)).abs().max() <= TIGHT
            assert graphs() == 1
            for name in NAMES[:3]:
                with disable_adapters(model):
                    assert torch.equal(run(X), base)
                set_adapter(model, name)
                assert (run(X) - model(X)).abs().max() <= TIGHT
            assert graphs() == 2

    @pytest.mark.parametrize("init", ["lora", "loram", "lora_xs"])
    def test_training(self, init, compiled):
        model = ten_adapters(init, training=True)
        run = compiled(model)
        for name in NAMES:
            set_adapter(model, name)
            got, want = gradients(run, model), gradients(model, model)
            assert len(got) == len(want) == (3 if init == "lora_xs" else 6)
            for one, two in zip(got, want, strict=True):
                assert (one - two).abs().max() <= TIGHT * two.abs().max().clamp_min(1)
        assert graphs() == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_wrapper_starts_as_its_base(self, dtype, compiled):
        model = nn.Sequential(OnlyForward(torch.randn(8, 12), torch.randn(8), dtype))
        x = torch.randn(3, 12, dtype=dtype)
        base = model(x)
        quiet(model, LoRAConfig(r=4, lora_alpha=7))
        with torch.no_grad():
            assert torch.equal(compiled(model)(x), base)

    def test_other_ranks_and_later_adapters(self, compiled):
        model = ten_adapters("loram")
        run = compiled(model)
        with torch.no_grad():
            run(X)
            quiet(model, LoRAConfig(r=4, residual="implicit"), adapter_name="late")
            run(X)
            assert graphs() == 1
            quiet(model, LoRAConfig(r=2, residual="implicit"), adapter_name="other")
            assert (run(X) - model(X)).abs().max() <= TIGHT
            assert graphs() == 2

    def test_s_follows(self, compiled):
        """A compiled forward reads s from a buffer: after a change, a copy, or another dtype."""
        model = ten_adapters("loram")
        keys = set(model.state_dict())
        assert not any("scaling" in key for key in keys)
        lost = copy.deepcopy(model).to("meta").to_empty(device="cpu")
        lost.load_state_dict(model.state_dict())
        lost.c.load_state_dict(model.c.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lost, model.half()):
            other.double()
            other.a.scaling = 1 / 3
            run = compiled(other)
            with torch.no_grad():
                for name in NAMES[:2]:
                    set_adapter(other, name)
                    assert (run(X) - other(X)).abs().max() <= TIGHT

    def test_a_replica_uses_its_own_factors(self):
        """`nn.DataParallel` copies the modules one by one."""
        layer = ten_adapters("loram").a
        replica = layer._replicate_for_data_parallel()
        replica.adapters = nn.ModuleDict({n: copy.deepcopy(layer.adapter(n)) for n in NAMES})
        assert replica.active() is replica.adapter(NAMES[0]) is not layer.active()


class TestHotswap:
    ADAPTERS = {  # noqa: RUF012
        "loram": {"lora_alpha": 3},
        "implicit": {"lora_alpha": 5, "residual": "implicit"},
        "pissa": {"init_lora_weights": "pissa"},
        "lora": {"init_lora_weights": "lora", "use_rslora": True},
    }

    def saved(self, folder, format: str = "native", **options):
        """The output of an adapter that was saved."""
        model = Net()
        quiet(model, LoRAConfig(**{"r": 4, "bias": "lora_only", **options}))
        move(model, 0.1)
        save_adapter(model, folder, format=format)
        return model(X).detach()

    def test_in_place(self, tmp_path, compiled):
        want = {n: self.saved(tmp_path / n, **kw) for n, kw in self.ADAPTERS.items()}
        model = Net()
        quiet(model, LoRAConfig(r=4, bias="lora_only", residual="implicit"))
        run, kept = compiled(model), [id(p) for p in model.parameters()]
        with torch.no_grad():
            run(X)
            for name in (*want, "loram"):
                hotswap_adapter(model, tmp_path / name)
                assert (model(X) - want[name]).abs().max() <= TIGHT
                assert (run(X) - want[name]).abs().max() <= TIGHT
                loaded = Net()
                load_adapter(loaded, tmp_path / name, progress=False)
                one, two = adapter_state(model), adapter_state(loaded)
                assert one.config == two.config and one.extra.keys() == two.extra.keys()
                for path, layer in one.layers.items():
                    other = two.layers[path]
                    assert layer.changes_base == other.changes_base == (name != "lora")
                    for key in ("scaling", "lora_alpha", "beta", "weight_norm"):
                        assert getattr(layer, key) == getattr(other, key)
                save_adapter(model, tmp_path / "again", format="native")
                load_adapter(again := Net(), tmp_path / "again", progress=False)
                assert (again(X) - want[name]).abs().max() <= FLOAT32
                merged = merge_lora(copy.deepcopy(model), dequantize=True)
                assert (merged.a(X) - model.a(X)).abs().max() <= TIGHT
        assert graphs() == 1 and [id(p) for p in model.parameters()] == kept

    @pytest.mark.parametrize(
        ("mine", "other", "message"),
        [
            ({"residual": "auto"}, {}, r"a: its start was subtracted from .*residual='implicit'"),
            ({}, {"r": 2}, r"a: its rank is 4, the new one has 2: load it as a further adapter"),
            ({"init_lora_weights": "lora"}, {}, r"the new one has a start to subtract, this one"),
            ({}, {"init_lora_weights": "lora_xs"}, r"a: the new one has lora_R, this one does not"),
            ({}, {"target_modules": ["a"]}, r"this adapter has a layer 'b', the new one does not"),
            ({"target_modules": ["a"]}, {}, r"the new adapter has a layer 'b', this one does not"),
            ({}, {"bias": "none"}, r"this adapter has a tensor trained in full 'a\.bias', the new"),
        ],
    )
    def test_refused(self, mine, other, message, tmp_path):
        self.saved(tmp_path, **other)
        model = Net()
        quiet(model, LoRAConfig(**{"r": 4, "bias": "lora_only", "residual": "implicit", **mine}))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = adapter_state(model).config
        with pytest.raises(ValueError, match=message):
            hotswap_adapter(model, tmp_path)
        after = dict(model.state_dict())
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
        assert adapter_state(model).config is config

    def test_unknown_name(self, tmp_path):
        self.saved(tmp_path)
        model = Net()
        quiet(model, LoRAConfig(r=4, residual="implicit"))
        with pytest.raises(ValueError, match=r"unknown adapter 'defualt'.*mean 'default'"):
            hotswap_adapter(model, tmp_path, "defualt")
