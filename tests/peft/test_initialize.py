"""`lora_kernels.peft.initialize` in PEFT's own layers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, capture_gradients
from lora_kernels.init import EVA, CorDA, LoRAM, LoRANull, Orthogonal, PiSSA
from lora_kernels.init.base import get_initializer, initializer_names

from ..support import ROOT
from ..support.exhaustive import paired
from ..support.packages import needs_peft
from ..support.peft_models import (
    MODELS,
    accelerate,
    adapted,
    base_weight,
    float64,
    initialize,
    linear_layers,
    update_of,
)
from ..support.running import close, logits, move, same_bits, start_data, token_ids, weights_of
from ..support.tiny_models import llama

pytestmark = needs_peft

# Those of layers that PEFT does not have: with R or λ, or a frozen B; or of another base.
REFUSED = ("lora_sb", "lora_xs", "kasa", "mica", "loftq", "qera")
METHODS = [n for n in initializer_names() if n not in REFUSED]


@pytest.mark.parametrize(("method", "kind"), paired(METHODS, [*MODELS]))
def test_every_method_starts_as_it_says(kind, method):
    """A and B are the initializer's for W and s; a subtracted start cancels to the last bit. Ranks
    stay as they are.
    """
    base = MODELS[kind]()
    initializer = get_initializer(method)
    data = start_data(base, LoRAConfig(init_lora_weights=method))
    model = adapted(base)
    torch.manual_seed(0)
    report = initialize(model, method, **data)
    assert report.layers == list(linear_layers(model)) and not report.left
    assert report.subtracted == initializer.changes_base
    if initializer.changes_base or method in ("lora", "gaussian", "init_b", "eva"):
        assert torch.equal(logits(model), logits(base))
    elif method == "orthogonal":  # BA is zero up to rounding
        assert close(logits(model), logits(base))
    else:
        assert not close(logits(model), logits(base))
    if getattr(initializer, "seed", 0) is None:
        return  # random
    for name, layer in linear_layers(model).items():
        weight = torch.tensor(base_weight(layer), dtype=torch.float32)
        given = {what.replace("gradients", "gradient"): own[name] for what, own in data.items()}
        start = initializer(weight, 4, 2.0, **given)
        assert close(layer.lora_A["default"].weight, start.lora_A, 1e4)
        assert close(layer.lora_B["default"].weight, start.lora_B, 1e4)


@pytest.mark.parametrize(
    "start", [EVA(rho=1.0), CorDA("kpm"), LoRANull(), Orthogonal(seed=1)], ids=lambda s: type(s)
)
def test_starts_are_those_of_add_lora(start):
    """With ρ = 1, EVA leaves the ranks there too."""
    base, model = llama(), adapted(llama())
    config = LoRAConfig(r=4, lora_alpha=8, init_lora_weights=start, residual="implicit")
    data = start_data(base, config)
    inside = {what: {f"base_model.model.{n}": x for n, x in d.items()} for what, d in data.items()}
    initialize(model, start, **inside)
    add_lora(base, config, progress=False, **data)
    for name, layer in linear_layers(model).items():
        own = base.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, own.lora_A)
        assert torch.equal(layer.lora_B["default"].weight, own.lora_B)


def test_loram_start_is_the_papers():
    """β² = ‖W‖_F √(Q/r), Q = ln r / ln min(n, m), by SciPy's sine transform."""
    from scipy.fft import dst

    model = adapted(llama())
    initialize(model)
    layer = linear_layers(model)["model.layers.1.mlp.up_proj"]
    W = base_weight(layer)
    beta = np.sqrt(np.linalg.norm(W) * np.sqrt(np.log(4) / np.log(min(W.shape)) / 4))
    for factor, size in (
        (layer.lora_A["default"].weight.T, W.shape[1]),
        (layer.lora_B["default"].weight, W.shape[0]),
    ):
        want = beta * dst(np.eye(size), type=1, norm="ortho")[:, :4]
        # β comes from a float32 sum, the factor is rounded once.
        np.testing.assert_allclose(float64(factor), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_forward_against_float64(kind):
    model = adapted(MODELS[kind]())
    initialize(model, "loram")
    move(model)
    for layer in linear_layers(model).values():
        x = torch.randn(5, layer.in_features)
        want = float64(x) @ (base_weight(layer) + update_of(layer)).T
        bias = layer.get_base_layer().bias
        want = want if bias is None else want + float64(bias)
        assert close(layer(x), torch.tensor(want))


def test_dropout_meets_the_adapter_only():
    """The subtracted start belongs to the base: dropout does not affect it."""
    model = adapted(llama(), lora_dropout=0.5)
    initialize(model, "loram")
    move(model)
    layer = linear_layers(model)["model.layers.0.mlp.gate_proj"].train()
    x = torch.randn(7, layer.in_features)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = float64(nn.functional.dropout(x, 0.5))
    A, B = (float64(getattr(layer, f"lora_{part}")["default"].weight) for part in "AB")
    A0, B0 = (float64(getattr(layer, f"lora_start_{part}")["default"]) for part in "AB")
    want = float64(x) @ base_weight(layer).T + 2 * (dropped @ A.T @ B.T - float64(x) @ A0.T @ B0.T)
    assert close(got, torch.tensor(want))


@pytest.mark.parametrize("kind", MODELS)
def test_disabled_is_the_base(kind):
    """With PEFT's own PiSSA it is 40 % off."""
    base = MODELS[kind]()
    want = logits(base)
    model = adapted(base)
    initialize(model, "pissa")
    move(model)
    assert not close(logits(model), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
    assert not close(logits(model), want)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), want)
    assert same_bits(weights_of(unloaded), weights_of(base))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_merge(kind, safe):
    model = adapted(MODELS[kind]())
    initialize(model, "loram")
    move(model)
    layers = linear_layers(model)
    before = {name: base_weight(layer) for name, layer in layers.items()}
    unmerged = logits(model)
    model.merge_adapter(safe_merge=safe)
    for name, layer in layers.items():
        want = before[name] + update_of(layer)
        # One rounding of the weight, and those of the update's products.
        np.testing.assert_allclose(base_weight(layer), want, atol=1e-6 * np.abs(want).max())
    assert close(logits(model), unmerged)
    with model.disable_adapter():  # unmerges
        assert close(logits(model), logits(MODELS[kind]()))
    assert close(logits(model), unmerged)
    assert close(logits(model.merge_and_unload(safe_merge=safe)), unmerged)


def test_merged_bfloat16_is_rounded_once():
    model = adapted(llama(dtype=torch.bfloat16))
    initialize(model, "loram")
    move(model)
    layer = linear_layers(model)["model.layers.0.mlp.down_proj"]
    want = torch.tensor(base_weight(layer) + update_of(layer))
    layer.merge()
    error = (layer.get_base_layer().weight.double() - want).abs()
    # Half an ulp of bfloat16, plus a little for the float32 update before it.
    assert bool((error <= 2**-8 * want.abs() * 1.001 + 1e-7).all())


def test_two_adapters_share_one_base():
    """Each is its own start and update on the same W; together they add up."""
    from peft import LoraConfig

    base = llama()
    model = adapted(base)
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    model.add_adapter("second", config)
    initialize(model, "loram")
    initialize(model, "pissa", adapter_name="second")
    assert torch.equal(logits(model), logits(base))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(base))
    move(model, seed=1)
    second = logits(model)
    model.set_adapter("default")
    move(model, seed=2)
    first = logits(model)
    mixed = logits(model, adapter_names=["default", "second", "__base__"])
    assert close(mixed[0], first[0]) and close(mixed[1], second[1])
    assert close(mixed[2], logits(base)[2])

    model.base_model.set_adapter(["default", "second"])
    layer = linear_layers(model)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(5, layer.in_features)
    total = base_weight(layer) + update_of(layer) + update_of(layer, "second")
    assert close(layer(x), torch.tensor(float64(x) @ total.T))

    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert all("default" not in key for key in model.state_dict())
    model.delete_adapter("second")  # the PeftModel itself does not work without any
    assert torch.equal(logits(model.base_model.model), logits(base))


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_with_the_same_configuration(kind):
    """TRL's reference model is a new adapter, into which A and B are copied by name."""
    model = adapted(MODELS[kind]())
    report = initialize(model, "pissa")
    base = logits(MODELS[kind]())
    move(model)
    want = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(logits(model), base)  # as a new adapter of PEFT
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert torch.equal(logits(model), want)
    report.undo()
    assert torch.equal(logits(model), want) and "add_adapter" in vars(model)
    model.delete_adapter("ref")
    model.add_adapter("plain", copy.copy(model.peft_config["default"]))
    assert not any("lora_start" in key for key in model.state_dict())


def test_copies_and_pickles():
    model = adapted(llama())
    initialize(model, "loram")
    accelerate(model)
    move(model)
    want = logits(model)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        assert other.save_pretrained.owner is other
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = linear_layers(other)["model.layers.0.mlp.up_proj"]
        assert layer.get_delta_weight.owner is layer and layer.forward.owner is layer
        assert close(logits(other.merge_and_unload()), want)
    assert torch.equal(logits(model), want)


def test_a_shallow_copy_of_a_layer():
    """It shares the parameters, and has its own state."""
    model = adapted(llama())
    initialize(model, "loram")
    accelerate(model)
    move(model)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    copied = copy.copy(layer)
    x = torch.randn(5, layer.in_features)
    want, base = layer(x), layer.get_base_layer()(x)
    assert torch.equal(copied(x), want)
    copied._disable_adapters = True
    assert torch.equal(copied(x), base) and torch.equal(layer(x), want)
    copied.scaling = {"default": 0.0}
    assert not copied.get_delta_weight("default").any()
    assert layer.get_delta_weight("default").any()


def replica_of(module: nn.Module) -> nn.Module:
    """What `nn.parallel.replicate` makes for another device; there the weights are doubled."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replica_of(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, 2 * parameter)
    for name, buffer in module.named_buffers(recurse=False):
        replica._buffers[name] = 2 * buffer if buffer.is_floating_point() else buffer
    return replica


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("method", ["loram", "lora"])
def test_data_parallel(method, accelerated):
    """A replica computes with its own weights in every method, and its gradients reach the
    original's parameters.
    """
    model = adapted(llama())
    initialize(model, method)
    if accelerated:
        accelerate(model)
    move(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *(b for b in twin.buffers() if b.is_floating_point())):
            tensor.mul_(2)
    name = "model.layers.1.mlp.down_proj"
    layer, other = linear_layers(model)[name], linear_layers(twin)[name]
    replica, x = replica_of(layer), torch.randn(5, layer.in_features)
    assert torch.equal(replica(x), other(x))
    for again in (replica, copy.copy(replica), copy.deepcopy(layer)):
        methods = {n: m.owner for n, m in vars(again).items() if hasattr(m, "owner")}
        assert all(owner is again for owner in methods.values())
    assert torch.equal(replica.get_delta_weight("default"), other.get_delta_weight("default"))
    replica(x).sum().backward()
    other(x).sum().backward()
    got, want = layer.lora_B["default"].weight.grad, other.lora_B["default"].weight.grad
    assert close(got, 2 * want)
    whole = replica_of(model)
    assert whole.save_pretrained.owner is whole
    assert close(whole(token_ids()).logits, twin(token_ids()).logits)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, wide):
    """Start and adapter have the same dtype, whichever it is, and cancel."""
    base = llama(dtype=dtype)
    model = adapted(base, autocast_adapter_dtype=wide)
    initialize(model, "loram")
    assert torch.equal(logits(model), logits(base))
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    A = layer.lora_A["default"].weight
    assert A.dtype == (torch.float32 if wide and dtype != torch.float64 else dtype)
    assert torch.equal(layer.lora_start_A["default"], A)


def test_moves_with_the_model():
    base = llama()
    model = adapted(base)
    initialize(model, "loram")
    model.to(torch.bfloat16)
    assert torch.equal(logits(model), logits(base.to(torch.bfloat16)))
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.lora_start_A["default"].dtype == torch.bfloat16
    model.to("meta")
    assert layer.lora_start_B["default"].is_meta


def test_state_dict_is_complete():
    """A checkpoint of the whole model, as accelerate makes it, restores the start too."""
    model = adapted(llama())
    initialize(model, "loram")
    move(model)
    other = adapted(llama())
    initialize(other, "pissa")
    assert list(other.load_state_dict(model.state_dict(), strict=True)) == [[], []]
    assert torch.equal(logits(other), logits(model))


def loss_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return loss.detach(), gradients


def test_gradient_checkpointing_and_autocast():
    model = adapted(llama())
    initialize(model, "loram")
    move(model)
    model.train()
    want = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = loss_and_gradients(model)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))
    model.gradient_checkpointing_disable()

    base = llama()
    model = adapted(base)
    initialize(model, "loram")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(base))


def test_compiles_in_one_graph():
    model = adapted(llama())
    initialize(model, "loram")
    move(model)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(5, layer.in_features)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert close(compiled(x), layer(x))


def test_scale_scales_the_start_too():
    """With PEFT's adapter_scale at 0, the layer is the base, whatever it subtracts."""
    base = llama()
    model = adapted(base)
    initialize(model, "loram")
    move(model)
    for layer in linear_layers(model).values():
        layer.set_scale("default", 0)
    assert torch.equal(logits(model), logits(base))


def test_undo_gives_the_bits_back():
    model = adapted(llama())
    before = weights_of(model)
    forms = {name: dict(vars(m)) for name, m in model.named_modules()}
    report = initialize(model, "loram")
    again = initialize(model, "lora")  # no start: nothing is subtracted
    assert not any("lora_start" in key for key in model.state_dict())
    move(model)
    with pytest.raises(RuntimeError, match="initialized again since"):
        report.undo()
    again.undo()
    assert any("lora_start" in key for key in model.state_dict())
    assert torch.equal(logits(model), logits(llama()))
    again.undo()
    report.undo()
    report.undo()
    assert same_bits(weights_of(model), before)
    for name, module in model.named_modules():
        assert vars(module).keys() == forms[name].keys()  # PEFT's own methods too


def test_undo_after_the_adapter_went():
    from peft import LoraConfig

    model = adapted(llama())
    report = initialize(model)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(llama()))
    with pytest.raises(RuntimeError, match="not the one that was initialized"):
        report.undo()


def test_report():
    base = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.Embedding(8, 4))
    base.append(nn.Embedding(8, 4, max_norm=1.0))
    model = adapted(base, target_modules=["0", "1", "2", "3"], r=2)
    report = initialize(model, PiSSA())
    assert report.layers == ["1", "2"] and list(report.left) == ["0", "3"]
    text = str(report)
    assert "PiSSA start of adapter 'default': 2 layers, s·B₀A₀ subtracted" in text
    assert "skipped 1: PEFT's Conv1d is no linear layer" in text
    assert "skipped 1: its base: max_norm rewrites its weight in every forward (3)" in text


def test_names_of_gradients():
    """As named by `capture_gradients`, for the base model and for the PEFT model."""
    base = llama()
    gradients = capture_gradients(base, [token_ids()], ["q_proj"], progress=False)
    inside = {f"base_model.model.{n}.base_layer": g for n, g in gradients.items()}
    for given in (gradients, inside, gradients | {"model.of.another": torch.ones(2, 2)}):
        model = adapted(base, target_modules=["q_proj"])
        initialize(model, "lora_ga", gradients=given)
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"init_lora_weights": "loramm"}, ValueError, "did you mean 'loram'"),
        ({"init_lora_weights": LoRAM}, TypeError, r"make an object of it, LoRAM\(\)"),
        ({"init_lora_weights": "lora_xs"}, ValueError, "an R between a frozen A and B"),
        ({"init_lora_weights": "loftq"}, ValueError, "LoftQ goes with a base that it rewrites"),
        ({"init_lora_weights": "qera"}, ValueError, "QERA goes with a base that it rewrites"),
        ({"init_lora_weights": "kasa"}, ValueError, "KaSA trains a λ .* use lora_kernels.add_lora"),
        ({"init_lora_weights": "mica"}, ValueError, "MiCA trains only A.* PEFT's own layers"),
        ({"init_lora_weights": "eva"}, ValueError, "pass activations=capture_activations"),
        ({"init_lora_weights": "eva", "activations": {}}, ValueError, "activations has none for"),
        ({"init_lora_weights": "loram", "activations": {}}, ValueError, "does not use activations"),
        ({"init_lora_weights": "lora_ga"}, ValueError, "pass gradients=capture_gradients"),
        ({"init_lora_weights": "loram", "gradients": {}}, ValueError, "does not use gradients"),
        ({"init_lora_weights": "lora_ga", "gradients": {}}, ValueError, "gradients has none for"),
        ({"adapter_name": "defualt"}, ValueError, "did you mean 'default'"),
    ],
)
def test_bad_arguments(arguments, error, match):
    model = adapted(llama())
    before = weights_of(model)
    with pytest.raises(error, match=match):
        initialize(model, **arguments)
    assert same_bits(weights_of(model), before)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize(
    "value, method, match",
    [(0.0, "loram", "zero"), (float("nan"), "loram", "NaN"), (0.0, "pissa", "zero")],
)
def test_a_bad_weight_is_named_and_nothing_changes(value, method, match):
    """Among other weights of its shape, which are initialized together with it."""
    base = llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.fill_(value)
    model = adapted(base)
    before = weights_of(model)
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.mlp\.up_proj: .*{match}"):
        initialize(model, method)
    after = weights_of(model)
    assert all(torch.equal(after[k].nan_to_num(), before[k].nan_to_num()) for k in before)
    assert not hasattr(model, "_lora_kernels_depth")


def test_a_rank_that_does_not_fit():
    """PEFT accepts any rank."""
    model = adapted(llama(), r=20, target_modules=["q_proj", "k_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj: rank 20 is larger than"):
        initialize(model)


def test_not_a_peft_model():
    with pytest.raises(TypeError, match=r"must be a peft\.PeftModel, got LlamaForCausalLM"):
        initialize(llama())
    with pytest.raises(TypeError, match="it is wrapped: pass the PeftModel inside"):
        initialize(torch.compile(adapted(llama())))
    from peft import LoHaConfig, get_peft_model

    with pytest.raises(TypeError, match="adapters of type LOHA"):
        initialize(get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"])))


def test_peft_is_imported_at_first_use():
    """If it is missing, the message says what to install."""
    code = (
        "import sys, lora_kernels; assert 'peft' not in sys.modules; sys.modules['peft'] = None;"
        "lora_kernels.peft"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "lora_kernels.peft needs the package peft: pip install" in last


class _Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class _Custom(nn.Module):
    """Not an `nn.Linear`; PEFT is told which LoRA layer to use."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class _Plain(nn.Linear):
    """Computes as nn.Linear does."""


def _renamed(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = _Plain
    return linear


def _wrapped(linear: nn.Linear) -> nn.Linear:
    inner = linear.forward
    linear.forward = lambda x: inner(x)
    return linear


def _subclass(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = _Odd
    return linear


def _old_weight_norm(linear: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(linear)


ODD = {
    "subclass": (_subclass, "_Odd does not compute as nn.Linear does"),
    "wrapped": (_wrapped, "the forward of this nn.Linear is replaced"),
    "weight_norm": (nn.utils.parametrizations.weight_norm, "the weight is computed"),
    "old_weight_norm": (_old_weight_norm, "the weight is computed"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "the weight is computed"),
    "custom": (_Custom, "_Custom, is no linear layer"),
    "own_lora": (_renamed, "PEFT's Own is no linear layer"),
}


def with_odd_layer(kind: str, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    class Own(Linear):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) * 2

    base = llama()
    mlp = base.model.layers[1].mlp
    mlp.up_proj = ODD[kind][0](mlp.up_proj)
    config = LoraConfig(r=4, target_modules=targets)
    if kind == "custom":
        config._register_custom_module({_Custom: type("Mine", (Linear,), {})})
    if kind == "own_lora":
        config._register_custom_module({_Plain: Own})
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_layer_is_left(kind):
    """It stays as it is, the others are initialized; alone it is an error."""
    reason = ODD[kind][1]
    with pytest.raises(ValueError, match=f"no linear layer to initialize: .*{reason}"):
        initialize(with_odd_layer(kind, ["layers.1.mlp.up_proj"]))
    model = with_odd_layer(kind, ["up_proj", "q_proj"])
    want = logits(model)
    report = initialize(model)
    assert list(report.left) == ["model.layers.1.mlp.up_proj"]
    assert reason in report.left["model.layers.1.mlp.up_proj"] and len(report.layers) == 3
    assert close(logits(model), want)
    report.undo()
    assert torch.equal(logits(model), want)


class _Reader(nn.Module):
    """Calls one layer, and multiplies with the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def test_a_layer_that_is_not_called_is_left():
    """PEFT adapts it, but its adapter has no effect."""
    from peft import LoraConfig, get_peft_model

    reason = "its _Reader reads the weight directly"
    model = get_peft_model(_Reader(), LoraConfig(r=2, target_modules=["called", "read"]))
    report = initialize(model)
    assert report.layers == ["called"] and report.left.keys() == {"read"}
    assert reason in report.left["read"]
    model = get_peft_model(nn.Sequential(_Reader()), LoraConfig(r=2, target_modules=["0.read"]))
    with pytest.raises(ValueError, match=f"no linear layer to initialize: .*{reason}"):
        initialize(model)


def test_what_cannot_be_initialized():
    model = adapted(llama(), alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    with pytest.raises(
        ValueError, match="no linear layer to initialize: skipped 14: it is PEFT's ALora"
    ):
        initialize(model)
    model = adapted(llama(), init_lora_weights="olora")
    with pytest.raises(ValueError, match="PEFT has rewritten the base's weights"):
        initialize(model)
    model = adapted(llama())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) first"):
        initialize(model)
    model.unmerge_adapter()
    report = initialize(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) first"):
        report.undo()
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="0 adapters are active"):
        initialize(model)
