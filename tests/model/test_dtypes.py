"""Weights that hooks store in fewer bits, and float16 bases whose trained copies are float32."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    disable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import Activations, get_initializer, initializer_names
from lora_kernels.layers.wrapper import LoRAWrapper
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state

from ..support.exhaustive import paired
from ..support.packages import needs_transformers
from ..support.running import logits, move, quiet, token_ids
from ..support.tiny_models import gpt2, llama

pytestmark = needs_transformers

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
# LoftQ and QERA need the weight before quantization.
NAMES = [n for n in initializer_names() if not get_initializer(n).rewrites_base]
# These change the model's outputs on purpose, or (orthogonal) by the rounding of A and B.
CHANGING = ("init_ab_plus", "kasa", "lora_one", "lora_sb", "lora_xs", "orthogonal")
# Two layers of 16 columns, on outputs of size 1.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), Conv1D(8, 16)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def with_hooks(module: nn.Module, stored: torch.dtype, compute: torch.dtype) -> None:
    module.to(stored)
    module.register_forward_pre_hook(lambda m, args: (m.to(compute), None)[1])
    module.register_forward_hook(lambda m, args, y: (m.to(stored), None)[1])


def with_accelerate(module: nn.Module, stored: torch.dtype, compute: torch.dtype) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.LayerwiseCastingHook(stored, compute, False))


def as_diffusers_does(module: nn.Module, stored: torch.dtype, compute: torch.dtype) -> None:
    """Its HookRegistry replaces the forward."""
    module.to(stored)
    forward = module.forward

    def hooked(self, x):
        self.to(compute)
        y = forward(x)
        self.to(stored)
        return y

    module._diffusers_hook = object()
    module.forward = functools.partial(hooked, module)


def stored_net(how, stored: torch.dtype, compute: torch.dtype = torch.float32) -> Net:
    model = Net()
    if how == "block":
        with_hooks(model, stored, compute)
    elif how is as_diffusers_does:
        how(model.a, stored, compute)
        with_hooks(model.b, stored, compute)
    else:
        for layer in (model.a, model.b):
            how(layer, stored, compute)
    return model


def without_hooks(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        if hasattr(module, "_hf_hook"):
            pytest.importorskip("accelerate.hooks").remove_hook_from_module(module)
    return model.double()


@pytest.mark.parametrize("how", [with_hooks, with_accelerate, "block"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
def test_factors_are_not_cast_by_hooks(how, stored, residual):
    model = stored_net(how, stored)
    quiet(model, LoRAConfig(r=4, residual=residual))
    move(model, 0.1)
    factors = {n: t.clone() for n, t in model.named_parameters() if "lora_" in n}
    x = X.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    for name, factor in model.named_parameters():
        if "lora_" in name:
            assert factor.dtype == torch.float32 and torch.equal(factor, factors[name])
        else:
            assert factor.dtype == stored
    oracle, x64 = without_hooks(model), X.double().requires_grad_()
    oracle.zero_grad()
    y64 = oracle(x64)
    y64.square().sum().backward()
    pairs = [(y, y64), (x.grad, x64.grad)]
    pairs += [
        (p.grad, oracle.get_parameter(n).grad)
        for n, p in model.named_parameters()
        if p.grad is not None
    ]
    assert len(pairs) == 6
    for got, want in pairs:
        assert (got - want).abs().max() <= CLOSE[torch.float32] * want.abs().max()
    model.to(torch.bfloat16)  # outside of a forward, the user's own
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_hooks_that_move_a_layer_move_its_factors():
    model = Net()
    model.a.register_forward_pre_hook(lambda m, args: (m.to("meta", torch.bfloat16), None)[1])
    quiet(model, LoRAConfig(r=4))
    with torch.no_grad():
        model.a(X.to("meta", torch.bfloat16))
    assert model.a.lora_A.is_meta and model.a.lora_A.dtype == torch.float32


class TestFloat8:
    @pytest.mark.parametrize(("name", "stored"), paired(NAMES, FLOAT8))
    def test_starts(self, name, stored):
        self.check(stored_net(with_hooks, stored), torch.float32, name)

    @pytest.mark.parametrize("how", [with_hooks, with_accelerate, as_diffusers_does, "block"])
    @pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
    def test_life(self, how, compute, tmp_path):
        model = stored_net(how, FLOAT8[0], compute)
        y = self.check(model, compute, "loram")
        for format in ("peft", "native"):
            save_adapter(model, tmp_path, format=format)
            fresh = stored_net(how, FLOAT8[0], compute)
            base = fresh(X.to(compute))
            load_adapter(fresh, tmp_path, progress=False)
            assert (fresh(X.to(compute)) - y).abs().max() <= CLOSE[compute]
            assert torch.equal(unload_lora(fresh)(X.to(compute)), base)
        merge_lora(model, dequantize=True)
        assert [type(layer) for layer in (model.a, model.b)] == [nn.Linear] * 2
        if how != "block":  # its hook would round the merged weights
            assert (model(X) - y).abs().max() <= CLOSE[compute]

    def check(self, model, compute, name):
        """Adapts and moves the model, and compares it with the dequantized weights in float64."""
        x = X.to(compute)
        base = model(x)
        weights = {n: p.detach().double() for n, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        gradients = {
            n: torch.randn(rows, 16, generator=generator) for n, rows in (("a", 16), ("b", 8))
        }
        config = LoRAConfig(r=4, init_lora_weights=name)
        data = {"gradients": gradients} if config.initializer.needs_gradient else {}
        if config.initializer.needs_activations:
            inputs = torch.randn(64, 16, generator=generator)
            data = {"activations": {n: Activations.of(inputs) for n in ("a", "b")}}
        quiet(model, config, **data)
        assert all(isinstance(layer, LoRAWrapper) for layer in adapted_layers(model).values())
        if name not in CHANGING:
            assert torch.equal(model(x), base)
        move(model, 0.1)
        x = x.clone().requires_grad_()
        y = model(x)
        y.float().square().sum().backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == parameter.dtype == torch.float32

        def layer(name, x):
            state = adapter_state(model).layers[name]
            right, left = (factor.double() for factor in state.update_factors())
            W = weights[f"{name}.weight"] if name == "a" else weights[f"{name}.weight"].T
            return x @ (W + state.scaling * left @ right).T + weights[f"{name}.bias"]

        x64 = X.double().requires_grad_()
        want = layer("b", torch.tanh(layer("a", x64)))
        want.square().sum().backward()
        assert (y - want).abs().max() <= CLOSE[compute]
        assert (x.grad - x64.grad).abs().max() <= CLOSE[compute] * x64.grad.abs().max().clamp_min(1)
        stored = {n.replace("base_layer.", ""): p for n, p in model.named_parameters()}
        assert all(torch.equal(stored[n].double(), weights[n]) for n in weights)
        with disable_adapters(model):
            assert torch.equal(model(X.to(compute)), base)
        return y.detach()

    @pytest.mark.parametrize(
        "hook", [None, lambda *args: None, lambda m, args: (m.double(), None)[1]]
    )
    def test_nothing_casts(self, hook):
        model = Net()
        model.b.to(FLOAT8[0])
        if hook is not None:
            model.b.register_forward_pre_hook(hook)
        with pytest.raises(ValueError, match=r"b: the weight is stored in .*cast the layer to bf"):
            quiet(model, LoRAConfig(r=4))
        assert type(model.a) is nn.Linear and model.b.weight.dtype == FLOAT8[0]
        assert all(p.requires_grad for p in model.parameters())

    def test_other_functions(self):
        model = stored_net(with_hooks, FLOAT8[0])
        model.b.register_forward_hook(lambda m, args, y: y.abs())
        with pytest.raises(ValueError, match=r"b: Conv1D computes no linear function"):
            quiet(model, LoRAConfig(r=4))

    @pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["norm"]}])
    def test_trained_in_full(self, options):
        model = stored_net(with_hooks, FLOAT8[0])
        model.norm = nn.LayerNorm(8).to(FLOAT8[0])
        with pytest.raises(ValueError, match=r"is stored in .* it cannot be trained in full"):
            quiet(model, LoRAConfig(r=4, **options))


def train_scaled(model, autocast: bool) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for seed in range(3):
        ids = token_ids(seed=seed)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == 256.0  # no step was skipped


class TestFloat16:
    """`GradScaler` takes no float16 gradients: the copies are float32, and cast for the forward."""

    CASES = [  # noqa: RUF012
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "bias": "all"}),
        (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    ]
    # Logits of size 1; s·B₀A₀ is subtracted from float16 weights, and merged ones are rounded.
    ROUNDING = 1e-3

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize(("make", "options"), CASES)
    def test_life(self, make, options, autocast, tmp_path):
        model = make(dtype=torch.float16)
        base = logits(model)
        quiet(model, LoRAConfig(r=2, residual="implicit", **options))
        assert (logits(model) - base).abs().max() <= self.ROUNDING
        train_scaled(model, autocast)
        trained = logits(model)
        assert trained.dtype == torch.float16 and (trained - base).abs().max() > 1e-2
        extra = adapter_state(model).extra
        assert extra and {tensor.dtype for tensor in extra.values()} == {torch.float32}
        assert any(not torch.equal(t, t.half().float()) for t in extra.values())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with disable_adapters(other):
                assert torch.equal(logits(other), base)
            assert torch.equal(logits(other), trained)
        save_adapter(model, tmp_path)
        loaded = make(dtype=torch.float16)
        load_adapter(loaded, tmp_path, progress=False)
        assert torch.equal(logits(loaded), trained)
        for name, tensor in adapter_state(loaded).extra.items():
            assert torch.equal(tensor, extra[name])
        merged = merge_lora(copy.deepcopy(model))
        assert (logits(merged) - trained).abs().max() <= self.ROUNDING
        assert torch.equal(logits(unload_lora(model)), base)
        for plain in (merged, model):
            assert {p.dtype for p in plain.parameters()} == {torch.float16}
            assert [n for n, _ in plain.named_buffers()] == [n for n, _ in make().named_buffers()]
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("place", [0, 1])
    def test_the_model_is_cast(self, dtype, place):
        model = llama(dtype=torch.float16)
        quiet(model, LoRAConfig(r=2, **self.CASES[place][1]))
        model.to(dtype)
        assert logits(model).dtype == dtype
        with disable_adapters(model):
            assert logits(model).dtype == dtype
        assert {p.dtype for p in unload_lora(model).parameters()} == {dtype}

    def test_buffers(self):
        """They do not train, so that they stay as they are."""
        model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).half()
        quiet(model, LoRAConfig(r=4, modules_to_save=["1"]))
        model(X.half()).sum().backward()
        extra = adapter_state(model).extra
        assert extra["1.weight"].dtype == model[1].weight.grad.dtype == torch.float32
        assert (
            extra["1.running_mean"].dtype == torch.float16 and extra["1.num_batches_tracked"] == 1
        )
        unload_lora(model)
        assert {t.dtype for t in model.state_dict().values()} == {torch.float16, torch.int64}

    def test_several(self):
        model = gpt2(dtype=torch.float16)
        base, outputs = logits(model), {}
        for name, bias in (("one", "all"), ("two", "lora_only"), ("three", "none")):
            config = LoRAConfig(r=2, target_modules=["c_attn"], residual="implicit", bias=bias)
            quiet(model, config, adapter_name=name)
            assert (logits(model) - base).abs().max() <= self.ROUNDING
            move(model)
            outputs[name] = logits(model)
        for name, output in outputs.items():
            set_adapter(model, name)
            assert torch.equal(logits(model), output)
        assert torch.equal(logits(unload_lora(model)), base)

    def test_an_error_within_the_forward(self):
        """The cast that the forward would have read must not be taken for the tensor."""
        model = llama(dtype=torch.float16)
        quiet(model, LoRAConfig(r=2, **self.CASES[0][1]))
        with pytest.raises(RuntimeError):
            model.lm_head(torch.zeros(1, 7, dtype=torch.float16))
        assert adapter_state(model).extra["lm_head.weight"].dtype == torch.float32
        train_scaled(model, autocast=False)

    def test_compiled(self):
        model = llama(dtype=torch.float16)
        quiet(model, LoRAConfig(r=2, **self.CASES[0][1]))
        want = logits(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert (logits(compiled) - want).abs().max() <= self.ROUNDING
        train_scaled(compiled, autocast=False)
