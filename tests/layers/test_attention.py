"""`LoRAAttention`: attentions whose projections are W + s·(BA − B₀A₀), on one layer."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    capture_gradients,
    disable_adapters,
    merge_lora,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import get_initializer
from lora_kernels.layers.kinds import kind_of, why_not_attention
from lora_kernels.layers.linear import LoRAAttention, LoRAOutProjection

from ..support.exhaustive import EXHAUSTIVE
from ..support.oracle import ROUNDING, to_numpy
from ..support.running import quiet, trained

D, HEADS = 8, 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
METHODS = ["loram", "lora", "pissa", "lora_xs"]


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, HEADS, **{"batch_first": True, **options})

    def forward(self, x, **options):
        return self.attn(x, x, x, **options)[0]


def made(method="loram", residual="absorb", dtype=torch.float32, **options):
    """(a model of one adapted attention, the original model, an input)"""
    torch.manual_seed(0)
    model = Net(**options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    original = copy.deepcopy(model)
    config = LoRAConfig(
        r=2, target_modules=["attn"], init_lora_weights=method, residual=residual, lora_dropout=0.5
    )
    quiet(model, config)
    return model, original, torch.randn(3, 5, D).to(dtype)


def full(layer, W: torch.Tensor) -> np.ndarray:
    """W + s·(BRA − B₀A₀) in float64."""
    R = np.eye(layer.r) if layer.lora_R is None else to_numpy(layer.lora_R)
    start = layer.start_factors()
    taken = 0.0 if start is None else to_numpy(start[1]) @ to_numpy(start[0])
    update = to_numpy(layer.lora_B) @ R @ to_numpy(layer.lora_A) - taken
    return to_numpy(W) + layer.scaling * update


def attended(x: np.ndarray, W: np.ndarray, b: np.ndarray, Wo: np.ndarray, bo: np.ndarray):
    """softmax(q kᵀ / √d) v of each head, and its projection: "Attention is all you need", 3.2."""
    q, k, v = np.split(x @ W.T + b, 3, axis=-1)

    def heads(values):  # [batch, heads, length, d]
        return values.reshape(*values.shape[:2], HEADS, D // HEADS).transpose(0, 2, 1, 3)

    scores = heads(q) @ heads(k).transpose(0, 1, 3, 2) / math.sqrt(D // HEADS)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ heads(v)).transpose(0, 2, 1, 3).reshape(x.shape)
    return mixed @ Wo.T + bo


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize("method", METHODS, ids=str)
class TestForward:
    def test_computes_the_formula(self, method, residual, dtype):
        model, original, x = made(method, residual, dtype)
        layer, old = model.attn, original.attn
        assert isinstance(layer, LoRAAttention) and isinstance(layer.out_proj, LoRAOutProjection)
        if method == "loram":  # to rounding; of an implicit start the weights are the same bits
            assert (model(x) - original(x)).abs().max() <= 64 * ROUNDING[dtype]
        if residual == "implicit" and method != "lora_xs":
            assert torch.equal(layer.effective_weight(), old.in_proj_weight)
        trained(model)
        W, Wo = full(layer, old.in_proj_weight), full(layer.out_proj, old.out_proj.weight)
        b, bo = to_numpy(old.in_proj_bias), to_numpy(old.out_proj.bias)
        expected = attended(to_numpy(x), W, b, Wo, bo)
        y = model(x)
        assert y.dtype == dtype
        size = np.abs(expected).max() + np.abs(W).max() * np.abs(Wo).max() * D
        assert np.abs(to_numpy(y) - expected).max() <= 24 * ROUNDING[dtype] * size
        with disable_adapters(model):
            base = model(x)
        error = np.abs(to_numpy(base - original(x))).max()
        assert error <= 24 * ROUNDING[dtype] * size
        if residual == "implicit" or not get_initializer(method).changes_base:
            assert error <= 2 * ROUNDING[dtype] * size

    def test_merging_and_unloading(self, method, residual, dtype):
        model, original, x = made(method, residual, dtype)
        y = trained(model)(x)
        other = copy.deepcopy(model)
        alone = model.attn.to_linear()
        merge_lora(model)
        for attention in (model.attn, alone):
            assert type(attention) is nn.MultiheadAttention
            assert type(attention.out_proj) is type(original.attn.out_proj)
            assert (attention(x, x, x)[0] - y).abs().max() <= 16 * ROUNDING[dtype] * y.abs().max()
        base = other.attn.base_linear()
        unload_lora(other)
        assert model.state_dict().keys() == other.state_dict().keys()
        for attention in (other.attn, base):
            assert type(attention.out_proj) is type(original.attn.out_proj)
            for name, want in original.attn.state_dict().items():
                error = (attention.state_dict()[name] - want).abs().max()
                assert error <= (4 * ROUNDING[dtype] if residual == "absorb" else 0)


class TestGradients:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_are_those_of_the_weights(self, residual):
        model, original, x = made("loram", residual, torch.float64)
        layer = trained(model).attn
        y = model(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        factors = [p for p in model.parameters() if p.requires_grad]
        found = [p.grad.clone() for p in factors]
        weights = {
            "attn.in_proj_weight": layer.effective_weight(),
            "attn.out_proj.weight": layer.out_proj.effective_weight(),
        }
        again = torch.func.functional_call(original, weights, (x,))
        for got, want in zip(found, torch.autograd.grad(again, factors, dy), strict=True):
            assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
        assert len(found) == 4 and layer.in_proj_weight.grad is None

    def test_of_the_weights_are_captured(self):
        model = Net()
        x = torch.randn(2, 3, D)
        found = capture_gradients(
            model, [x], ["attn"], loss=lambda m, b: m(b).square().sum(), progress=False
        )
        assert {name: list(g.shape) for name, g in found.items()} == {
            "attn": [3 * D, D],
            "attn.out_proj": [D, D],
        }
        config = LoRAConfig(r=2, target_modules=["attn"], init_lora_weights="lora_ga")
        quiet(model, config, gradients=found)


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [{"batch_first": False}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
        ids=str,
    )
    def test_of_the_attention_stay(self, options):
        model, _, x = made(residual="implicit", **options)
        trained(model)
        merged = merge_lora(copy.deepcopy(model))
        for y, want in zip(model.attn(x, x, x), merged.attn(x, x, x), strict=True):
            assert torch.allclose(y, want, atol=1e-5)
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        if options != {"batch_first": False}:
            assert torch.allclose(model(x, attn_mask=mask), merged(x, attn_mask=mask), atol=1e-5)
        key = torch.randn_like(x)
        got, want = (m.attn(x, key, key + 1, need_weights=False)[0] for m in (model, merged))
        assert torch.allclose(got, want, atol=1e-5)

    def test_ranks_are_those_of_the_attention(self):
        model = Net()
        config = LoRAConfig(r=2, target_modules=["attn"], rank_pattern={"attn": 3})
        quiet(model, config)
        assert (model.attn.r, model.attn.out_proj.r) == (3, 3)
        with pytest.raises(ValueError, match="'out_proj', which matches no adapted layer"):
            quiet(Net(), LoRAConfig(target_modules=["attn"], r=2, rank_pattern={"out_proj": 1}))

    def test_out_proj_may_be_left_out(self):
        model, x = Net(), torch.randn(2, 3, D)
        original = copy.deepcopy(model)
        config = LoRAConfig(r=2, target_modules=["attn"], exclude_modules=["attn.out_proj"])
        quiet(model, config)
        assert type(model.attn.out_proj) is type(original.attn.out_proj)
        assert torch.allclose(model(x), original(x), atol=1e-5)

    def test_biases(self):
        model = Net()
        quiet(model, LoRAConfig(r=2, target_modules=["attn"], bias="lora_only"))
        names = {n for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
        assert names == {"attn.in_proj_bias", "attn.out_proj.bias"}


class TestFastPath:
    def test_of_the_attention(self):
        model, original, x = made(residual="implicit")
        model.eval(), original.eval()
        with torch.no_grad():
            assert torch.equal(model(x), original(x))
        y = trained(model)(x)
        with torch.no_grad():
            assert torch.allclose(model(x), y, atol=1e-6)

    def test_of_encoders(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(D, HEADS, 16, batch_first=True)
        model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, D)
        original = copy.deepcopy(model)
        quiet(model, LoRAConfig(r=2, target_modules=["self_attn"], residual="implicit"))
        y = trained(model)(x)
        with torch.no_grad():
            assert torch.allclose(model(x), y, atol=1e-5)
            assert not torch.allclose(y, original(x), atol=1e-2)
            assert torch.allclose(merge_lora(copy.deepcopy(model))(x), y, atol=1e-5)
            assert torch.equal(unload_lora(model)(x), original(x))

    def test_code_that_reads_the_weight(self):
        class Reading(Net):
            def forward(self, x):
                q, _, _ = (x @ self.attn.in_proj_weight.T).chunk(3, -1)
                return q

        model, _, x = made()
        reading = Reading()
        reading.attn = trained(model).attn
        expected = (x @ model.attn.effective_weight().T)[..., :D]
        assert torch.allclose(reading(x), expected)
        assert model.attn.in_proj_weight is model.attn._parameters["in_proj_weight"]


class TestLayer:
    def test_autocast(self):
        model, original, x = made(residual="implicit")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, want = model(x), original(x)
        assert y.dtype == want.dtype and torch.allclose(y, want, atol=1e-2)

    def test_further_adapters(self):
        model, original, x = made(residual="implicit")
        first = trained(model)(x)
        config = LoRAConfig(r=1, target_modules=["attn"], residual="implicit")
        quiet(model, config, adapter_name="second")
        assert torch.allclose(model(x), original(x), atol=1e-6)
        set_adapter(model, "default")
        assert torch.equal(model(x), first)

    def test_copies(self):
        model, _, x = made(residual="implicit")
        y = trained(model)(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)
        other, _, _ = made(residual="implicit")
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), y)

    def test_an_original_weight_is_not_loaded(self):
        model, original, _ = made()
        with pytest.raises(RuntimeError, match=r"attn.in_proj_weight is an original weight"):
            model.load_state_dict(original.state_dict(), strict=False)

    @pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 compiles an attention")
    def test_compiled(self):
        model, original, x = made(residual="implicit")
        trained(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
        with disable_adapters(model):
            assert torch.allclose(compiled(x), original(x), atol=1e-6)


class Custom(nn.MultiheadAttention):
    def forward(self, *args, **options):
        return super().forward(*args, **options)


class TestReasons:
    def test_are_named(self):
        replaced = nn.MultiheadAttention(D, HEADS)
        replaced.out_proj = nn.Linear(D, D)
        computed = nn.MultiheadAttention(D, HEADS)
        nn.utils.parametrizations.spectral_norm(computed, "in_proj_weight")
        for attention, reason in (
            (nn.MultiheadAttention(D, HEADS, kdim=4), "different sizes \\(kdim, vdim\\)"),
            (Custom(D, HEADS), "Custom does not compute as nn.MultiheadAttention does"),
            (replaced, "its out_proj is replaced"),
            (computed, "its in_proj_weight is computed"),
        ):
            assert kind_of(attention) is None and why_not_attention(attention)
            model = nn.ModuleDict({"attn": attention})
            with pytest.raises(TypeError, match=f"names 'attn', .* cannot be adapted: .*{reason}"):
                add_lora(model, LoRAConfig(r=1, target_modules=["attn"]))

    def test_of_out_proj_alone(self):
        with pytest.raises(TypeError, match=r"'attn.out_proj', .*does not call: name 'attn'"):
            add_lora(Net(), LoRAConfig(r=1, target_modules=["out_proj"]))

    def test_all_linear_leaves_them_out(self):
        model = nn.TransformerEncoderLayer(D, HEADS, 16)
        report = quiet(model, LoRAConfig(r=1))
        assert type(model.self_attn) is nn.MultiheadAttention
        assert "nn.Linear's" in report.skipped["self_attn.out_proj"]
