"""Layers whose weight other code reads directly are left out, with the reason."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lora_kernels import LoRAConfig, add_lora, disable_adapters, merge_lora
from lora_kernels.model.selection import bypassed_layers


def multiply(x, layer):
    return linear(x, layer.weight)


def through(x, *, layer):
    return multiply(x, layer)


class Block(nn.Module):
    """Reads `a`; calls `b` as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.many = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.inner = nn.ModuleDict({"c": nn.Linear(8, 8)})

    def forward(self, x):
        return self.b(self.read(x))


class Direct(Block):
    def read(self, x):
        return linear(x, self.a.weight, self.a.bias)


class Fused(Block):
    @property
    def stacked(self):
        return torch.cat([self.a.weight, self.inner["c"].weight])

    def read(self, x):
        return linear(x, self.stacked)[..., :8]


class Alias(Block):
    def read(self, x):
        layer, scale = self.a, 2.0
        return scale * (x @ layer.weight.T)


class Loop(Block):
    def read(self, x):
        for _, layer in enumerate(self.many[1:]):
            x = x @ layer.weight.t()
        return x


class Comprehension(Block):
    def read(self, x):
        return sum(x @ w for w in [layer.weight for layer in self.many])


class Helper(Block):
    def read(self, x):
        return multiply(x, self.a)


class HelperOfHelper(Block):
    def read(self, x):
        return through(x, layer=self.inner.c)


class Method(Block):
    def read(self, x):
        return self.multiply(x, self.a)

    def multiply(self, x, layer):
        return linear(x, getattr(layer, "weight"), None)  # noqa: B009


class ByName(Block):
    def read(self, x):
        return linear(x, self._modules["a"]._parameters["weight"]) + linear(
            x,
            getattr(self, "a").weight,  # noqa: B009
        )


class Metadata(Block):
    """Asks for nothing but the dtype, the shape and the device."""

    def read(self, x):
        if isinstance(self.a.weight, nn.Parameter) and self.a.weight is not None:
            x = x.to(self.a.weight.dtype).to(self.b.weight).type_as(self.a.weight)
        x = x + self.b.weight.new_zeros(self.a.weight.shape[0])
        return self.a(x).view(-1, self.a.weight.size(0))


class Prepares(Block):
    """Reads values only where a model is made or saved."""

    def _init_weights(self, module):
        self.a.weight.data.normal_()

    def tie_weights(self):
        self.b.weight = self.a.weight

    def read(self, x):
        return self.a(x)


class Listed(Block):
    """Calls a layer from a list that is no ModuleList, as OneFormer's heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.a, torch.relu]

    def read(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Bound(Block):
    """Keeps a layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.a.forward

    def read(self, x):
        return self.first(x)


def test_layers_that_are_kept_elsewhere():
    for cls, attribute in ((Listed, "steps"), (Bound, "first")):
        torch.manual_seed(0)
        model, x = cls(), torch.randn(2, 8)
        before = model(x)
        report = add_lora(model, LoRAConfig(r=2), progress=False)
        assert f"keeps the layer in '{attribute}' too" in report.skipped["a"]
        assert (model(x) - before).abs().max() < 1e-6


@pytest.mark.parametrize(
    "cls,names",
    [
        (Direct, {"a"}),
        (Fused, {"a", "inner.c"}),
        (Alias, {"a"}),
        (Loop, {"many.0", "many.1", "many.2"}),
        (Comprehension, {"many.0", "many.1", "many.2"}),
        (Helper, {"a"}),
        (HelperOfHelper, {"inner.c"}),
        (Method, {"a"}),
        (ByName, {"a"}),
        (Metadata, set()),
        (Prepares, set()),
    ],
)
def test_reads_in_the_source(cls, names):
    torch.manual_seed(0)
    model, x = nn.Sequential(cls()), torch.randn(2, 8)
    before = model(x)
    assert set(bypassed_layers(model)) == {f"0.{name}" for name in names}
    report = add_lora(model, LoRAConfig(r=2), progress=False)
    left = {name for name, why in report.skipped.items() if "reads the weight directly" in why}
    assert left == {f"0.{name}" for name in names}
    assert (model(x) - before).abs().max() < 1e-6
    model(x).square().sum().backward()
    called = {"0.b"} if names else {"0.a", "0.b"}
    for row in report.adapted:
        layer = model.get_submodule(row.name)
        assert (layer.lora_A.grad is not None) == (row.name in called)


def test_a_grandparent_reads():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Prepares()

        def forward(self, x):
            return self.block(x) @ self.block.inner.c.weight

    assert set(bypassed_layers(Outer())) == {"block.inner.c"}


def test_replaced_forwards():
    """Of one module, and of a class, as Liger's patches replace them."""
    model = nn.ModuleList([Prepares(), Prepares()])
    model[1].forward = types.MethodType(lambda self, x: x @ self.b.weight, model[1])
    assert set(bypassed_layers(model)) == set()  # a lambda has no definition that can be found

    def forward(self, x):
        return x @ self.b.weight

    model[1].forward = types.MethodType(forward, model[1])
    assert set(bypassed_layers(model)) == {"1.b"}

    class Patched(Prepares):
        pass

    assert set(bypassed_layers(Patched())) == set()
    Patched.forward = forward
    assert set(bypassed_layers(Patched())) == {"b"}


def test_named_by_the_user():
    with pytest.raises(ValueError, match="names 'a', but its Direct reads the weight directly"):
        add_lora(Direct(), LoRAConfig(r=2, target_modules=["a", "b"]), progress=False)


def test_classes_of_transformers():
    """The reads that are known of these classes, found in their sources."""
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import BloomAttention
    from transformers.models.conditional_detr.modeling_conditional_detr import (
        ConditionalDetrMHAttentionMap,
    )
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mobilebert.modeling_mobilebert import MobileBertLMPredictionHead
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense
    from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    from lora_kernels.model.selection.bypassed import reads_of

    def read(cls) -> set[str]:
        return {path[0] for path in reads_of(cls) if "conv" not in path[0]}

    assert read(WavLMAttention) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert read(TDNNLayer) == {"kernel"}
    assert read(MobileBertLMPredictionHead) == {"dense", "decoder"}
    assert read(BloomAttention) == {"dense"}
    assert read(ConditionalDetrMHAttentionMap) == {"k_proj"}
    assert read(MambaMixer) == {"x_proj", "dt_proj", "out_proj"}
    assert read(LlamaAttention) == read(T5DenseGatedActDense) == set()


class Unreadable(Block):
    """Its `read` has no source."""


exec(
    "def read(self, x):\n    return linear(x, self.a.weight, self.a.bias)",
    namespace := {"linear": linear},
)
Unreadable.read = namespace["read"]


@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize("init", ["loram", "lora", "lora_xs"])
def test_a_read_that_no_source_shows(residual, init):
    """The code gets the weight with the adapter, and its gradient."""
    if init == "lora_xs" and residual == "absorb":
        residual = "auto"
    torch.manual_seed(0)
    model, x = Unreadable().double(), torch.randn(5, 8, dtype=torch.float64)
    before = model(x)
    config = LoRAConfig(r=3, init_lora_weights=init, residual=residual, target_modules=["a", "b"])
    add_lora(model, config, progress=False)
    if init != "lora_xs":  # LoRA-XS starts from a small random R
        assert (model(x) - before).abs().max() < 1e-12
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    want = model.b(model.a(x))
    got = model(x)
    assert (got - want).abs().max() < 1e-12 and (got - before).abs().max() > 1e-2
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(
        torch.autograd.grad(got.sin().sum(), trained),
        torch.autograd.grad(want.sin().sum(), trained),
        strict=True,
    ):
        assert (one - other).abs().max() < 1e-12 and one.abs().max() > 1e-6
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - want).abs().max() < 1e-12
    with disable_adapters(model):
        assert (model(x) - before).abs().max() < 1e-12
    merge_lora(model)
    assert (model(x) - want).abs().max() < 1e-12


def test_reads_of_metadata_get_the_parameter():
    """In a forward too: T5 asks for the dtype of `wo.weight` in every block."""
    seen = []

    class Asks(Block):
        def read(self, x):
            seen.append(self.a.weight.dtype)
            if isinstance(self.a.weight, nn.Parameter):
                seen.append(self.a.weight.shape)
            return self.a(x)

    model = Asks()
    add_lora(model, LoRAConfig(r=2, target_modules=["a"]), progress=False)
    stored, calls = model.a.weight, []
    assert isinstance(stored, nn.Parameter) and stored is model.a._parameters["weight"]
    model.a.effective_weight = lambda: calls.append(1)
    model(torch.randn(2, 8))
    assert seen == [torch.float32, torch.Size([8, 8])] and not calls
    assert model.get_parameter("a.weight") is stored
