from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora
from lora_kernels.init import (
    Activations,
    Initializer,
    LoRA,
    LoRAM,
    Start,
    StartRequest,
    base,
    get_initializer,
    initializer_names,
    register_initializer,
)
from lora_kernels.training.rescaling import ScaledStart

from ..support.oracle import ROUNDING


def test_names():
    random = {"lora", "init_b", "gaussian", "init_ab", "init_ab_plus", "orthogonal"}
    spectral = {"pissa", "milora", "olora", "lora_xs", "mica", "kasa"}
    data_driven = {"lora_ga", "lora_one", "lora_sb"}
    of_inputs = {"eva", "corda", "lora_null", "qera"}
    known = {"loram", "loftq"} | random | spectral | data_driven | of_inputs
    assert known <= set(initializer_names())
    for name in initializer_names():
        initializer = get_initializer(name)
        assert initializer.needs_gradient == (name in data_driven)
        assert initializer.needs_activations == (name in of_inputs)
        assert initializer.rewrites_base == initializer.compensates == (name in ("loftq", "qera"))
        assert initializer.trains == ("A" if name == "mica" else "AB")
        assert initializer.has_diag == (name == "kasa")
        source = f"{type(initializer).__doc__} {type(initializer).__mro__[1].__doc__}"
        assert "arXiv" in source or "PEFT" in source  # formula and source are told
    assert get_initializer("LoRAM") == LoRAM()
    assert get_initializer(LoRA(seed=1)) == LoRA(seed=1)


@dataclass(frozen=True)
class Halves(Initializer):
    changes_base = False

    def make_start(self, request):
        rows, cols = request.shape
        return Start(torch.full((request.r, cols), 0.5), torch.zeros(rows, request.r))


@dataclass(frozen=True)
class CalledHalves(Initializer):
    """Overrides `__call__`, as custom starts did before start requests existed."""

    changes_base = False

    def __call__(self, weight, r, scaling=1.0, gradient=None):
        rows, cols = weight.shape
        return Start(torch.full((r, cols), 0.5), torch.zeros(rows, r))


@pytest.mark.parametrize("kind", [Halves, CalledHalves])
class TestOwnStart:
    """A start written by a user, with either method."""

    @pytest.fixture(autouse=True)
    def registered(self, kind, monkeypatch):
        monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
        register_initializer("Halves", kind)

    @pytest.mark.parametrize("by_name", [False, True])
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_layer(self, kind, residual, by_name, device):
        start = "halves" if by_name else kind()
        options = {"r": 2, "init_lora_weights": start, "residual": residual, "device": device}
        assert (LoRALinear(6, 4, **options).lora_A == 0.5).all()

    @pytest.mark.parametrize("by_name", [False, True])
    def test_model(self, kind, by_name, device):
        """Two layers of the same shape, initialized together."""
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)).to(device)
        config = LoRAConfig(r=2, init_lora_weights="halves" if by_name else kind())
        add_lora(model, config)
        assert all((layer.lora_A == 0.5).all() for layer in model)

    def test_called(self, kind):
        """Alone, several at once, absorbed, scaled and tracked."""
        weights = [torch.randn(6, 4) for _ in range(2)]
        starts = [kind()(weights[0], 2), *kind().starts(weights, 2, 3.0)]
        starts += kind().make_starts([StartRequest(weights[1], 2)])
        starts.append(kind().absorb_(weights[0].clone(), 2, 1.0))
        assert all((start.lora_A == 0.5).all() for start in starts)
        assert (ScaledStart(kind(), 4.0, 1.0)(weights[0], 2).lora_A == 2).all()
        with pytest.raises(ValueError, match="starts at zero"):
            LoRAM(track=kind())(weights[0], 2)

    def test_name_is_taken(self, kind):
        with pytest.raises(ValueError, match="taken"):
            register_initializer("halves", kind)


def test_a_start_that_defines_nothing():
    class Nothing(Initializer):
        changes_base = False

    with pytest.raises(NotImplementedError, match=r"Nothing must define make_start\(self, request"):
        Nothing()(torch.ones(4, 4), 2)


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "loram"])
def test_a_batch_of_unlike_requests(name):
    weight = torch.randn(8, 8)
    for other in (StartRequest(weight, 3), StartRequest(weight, 2, 2.0)):
        with pytest.raises(ValueError, match="need the same r and the same scaling"):
            get_initializer(name).make_starts([StartRequest(weight, 2), other])
    with pytest.raises(ValueError, match="no weight"):
        get_initializer(name).make_starts([])


def test_request():
    request = StartRequest(torch.ones(4, 6, dtype=torch.bfloat16), 2)
    assert request.shape == (4, 6) and request.scaling == 1.0 and request.gradient is None
    assert request.empty(2, 6).dtype == request.factor_dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
def test_a_start_without_a_recipe(dtype, residual, device):
    """Any factors can be absorbed or subtracted in the forward; the layer then stores them."""

    @dataclass(frozen=True)
    class Random(Initializer):
        changes_base = True

        def make_start(self, request):
            (rows, cols), r, dtype = request.shape, request.r, request.factor_dtype
            return Start(torch.randn(r, cols, dtype=dtype), torch.randn(rows, r, dtype=dtype))

    linear = nn.Linear(40, 600, dtype=dtype).to(device)
    original = copy.deepcopy(linear).double().requires_grad_(False)
    layer = LoRALinear.from_linear(linear, r=4, init_lora_weights=Random(), residual=residual)
    A, B = (p.detach().double().clone() for p in (layer.lora_A, layer.lora_B))
    lacking = layer.scaling * (B @ A) if residual == "absorb" else 0.0
    eps = ROUNDING[dtype] + 6 * ROUNDING[layer.lora_A.dtype]
    bound = eps * (layer.weight.double().abs() + layer.scaling * B.abs() @ A.abs())
    assert ((layer.weight.double() + lacking - original.weight).abs() <= bound).all()

    with torch.no_grad():
        layer.lora_B.mul_(0.5)  # as if trained: the stored factors must not change with it
    options = {"dtype": dtype, "device": device}
    loaded = LoRALinear(40, 600, r=4, init_lora_weights=Random(), residual=residual, **options)
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(3, 40, dtype=dtype).to(device)
    base = original(x.double())
    trained = base - 0.5 * layer.scaling * x.double() @ A.T @ B.T
    noise = 32 * ROUNDING[dtype] * (base.norm() + trained.norm())
    for one in (layer, loaded):
        assert ((one.base_linear().weight.double() - original.weight).abs() <= 2 * bound).all()
        assert (one(x).double() - trained).norm() <= noise
        assert (one.to_linear()(x).double() - trained).norm() <= noise
        one.adapter_enabled = False
        assert (one(x).double() - base).norm() <= noise


@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize(
    "change,match",
    [
        (lambda A, B: (A, B[:300]), r"lora_B of shape \[300, 4\]"),
        (lambda A, B: (A[:, :3], B), r"lora_A of shape \[4, 3\]"),
        (lambda A, B: (A, B * float("nan")), "lora_B that holds NaN"),
    ],
)
def test_a_start_that_does_not_fit(change, match, residual, device):
    @dataclass(frozen=True)
    class Broken(Initializer):
        changes_base = True

        def make_start(self, request):
            (rows, cols), r = request.shape, request.r
            return Start(*change(torch.ones(r, cols), torch.ones(rows, r)))

    linear = nn.Linear(40, 600).to(device)
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        LoRALinear.from_linear(linear, r=4, init_lora_weights=Broken(), residual=residual)
    assert torch.equal(linear.weight, before)


def test_factors_are_float32_and_their_own(device):
    @dataclass(frozen=True)
    class View(Initializer):
        changes_base = False

        def make_start(self, request):
            weight, r = request.weight, request.r
            return Start(weight[:r], weight.new_zeros(weight.shape[0], r))

    options = {"r": 2, "init_lora_weights": View(), "device": device}
    layer = LoRALinear(8, 8, dtype=torch.float32, **options)
    assert layer.lora_A.data_ptr() != layer.weight.data_ptr()
    layer = LoRALinear(8, 8, dtype=torch.bfloat16, **options)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_factors_are_not_shared(device):
    """Factors that the initializer expands or keeps for all layers: training must not write into
    them.
    """
    kept = torch.randn(2, 8).to(device)

    @dataclass(frozen=True)
    class Kept(Initializer):
        changes_base = False

        def make_start(self, request):
            ones = torch.ones(1, 1, device=device)
            return Start(kept, ones.expand(request.shape[0], request.r))

    before = kept.clone()
    for residual in ("absorb", "implicit"):
        options = {"r": 2, "init_lora_weights": Kept(), "residual": residual, "device": device}
        layer = LoRALinear(8, 6, **options)
        with torch.no_grad():
            layer.lora_A.add_(1.0)
            layer.lora_B.add_(1.0)
        assert torch.equal(kept, before) and (layer.lora_B == 2).all()
        assert layer.lora_A.is_contiguous() and layer.lora_B.is_contiguous()


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: register_initializer("mine", LoRA()), "'mine' needs a class .* object of LoRA"),
        (lambda: register_initializer("mine", "lora"), "'mine' needs a class .* object of str"),
        (lambda: register_initializer(3, LoRA), "must be a string, got int"),
        (lambda: get_initializer(LoRA), r"the class LoRA: make an object of it, LoRA\(\)"),
    ],
)
def test_classes_and_objects(call, match):
    with pytest.raises(TypeError, match=match):
        call()
    assert "mine" not in initializer_names()


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        LoRA(seed=1).seed = 2


def test_typo():
    with pytest.raises(ValueError, match="did you mean 'loram'"):
        get_initializer("loran-m")


@pytest.mark.parametrize("name", initializer_names())
def test_starts_together_are_starts_alone(name, device):
    """Bit for bit on a CPU; a GPU may sum a batch in a different order."""
    initializer = get_initializer(name)
    torch.manual_seed(0)
    weights = [torch.randn(40, 24).to(device) for _ in range(3)]
    gradients = [torch.randn(40, 24).to(device) for _ in range(3)]
    given = gradients if initializer.needs_gradient else None
    inputs = [None] * 3
    if initializer.needs_activations:
        inputs = [Activations.of(torch.randn(100, 24).to(device)) for _ in range(3)]
    torch.manual_seed(1)
    together = initializer.starts(weights, 4, 2.0, given, activations=inputs)
    torch.manual_seed(1)
    for k, (weight, start) in enumerate(zip(weights, together, strict=True)):
        alone = initializer(weight, 4, 2.0, given and given[k], inputs[k])
        for factor in ("lora_A", "lora_B", "lora_R", "lora_diag"):
            one, many = getattr(alone, factor), getattr(start, factor)
            assert (one is None) == (many is None)
            if one is not None:
                tolerance = 0 if device == "cpu" else 1e-5
                torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)
