"""`LoRAConv`: convolutions with W + s·(BA − B₀A₀) and their gradients, on one layer."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    LoRAConfig,
    add_lora,
    capture_gradients,
    disable_adapters,
    merge_lora,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import InitAB, LoRAXS, get_initializer
from lora_kernels.layers.base import base_of
from lora_kernels.layers.kinds import kind_of, why_not_convolution
from lora_kernels.layers.linear import LoRAConv

from ..support.exhaustive import EXHAUSTIVE, thinned
from ..support.oracle import ROUNDING, to_numpy
from ..support.running import quiet, trained

# (class, channels in and out, kernel, options, size of the input)
CASES = {
    "2d": (nn.Conv2d, 4, 6, 3, {"padding": 1}, (5, 6)),
    "1x1": (nn.Conv2d, 4, 6, 1, {"bias": False}, (3, 4)),
    "stride": (nn.Conv2d, 4, 6, (3, 2), {"stride": (2, 1), "padding": (1, 0)}, (6, 5)),
    "dilation": (nn.Conv2d, 4, 6, 3, {"padding": 2, "dilation": 2}, (5, 6)),
    "reflect": (nn.Conv2d, 4, 6, 3, {"padding": 2, "padding_mode": "reflect"}, (5, 6)),
    "circular": (nn.Conv2d, 4, 6, 3, {"padding": (1, 2), "padding_mode": "circular"}, (5, 6)),
    "groups": (nn.Conv2d, 4, 6, 3, {"padding": 1, "groups": 2}, (5, 6)),
    "depthwise": (nn.Conv2d, 4, 8, 3, {"groups": 4}, (5, 6)),
    "1d same": (nn.Conv1d, 4, 6, 4, {"padding": "same", "dilation": 2}, (9,)),
    "1d replicate": (nn.Conv1d, 4, 6, 3, {"padding": 1, "padding_mode": "replicate"}, (7,)),
    "3d": (nn.Conv3d, 4, 6, (1, 2, 3), {"stride": (1, 2, 1), "padding": (0, 1, 1)}, (3, 4, 5)),
}
METHODS = ["loram", "lora", "pissa", InitAB(seed=0), LoRAXS(sigma=0.3), "kasa"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class Net(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def made(case="2d", method="loram", residual="absorb", dtype=torch.float32, dropout=0.0):
    """(a model of one adapted convolution, the original one, an input)"""
    cls, channels, out, kernel, options, size = CASES[case]
    torch.manual_seed(0)
    conv = cls(channels, out, kernel, **options).to(dtype)
    model, original = Net(conv), copy.deepcopy(conv)
    config = LoRAConfig(
        r=2,
        target_modules=["conv"],
        init_lora_weights=method,
        residual=residual,
        lora_dropout=dropout,
    )
    quiet(model, config)
    return model, original, torch.randn(2, channels, *size).to(dtype)


def convolved(x: np.ndarray, W: np.ndarray, bias: np.ndarray | None, conv: nn.Module) -> np.ndarray:
    """The definition of a convolution, in loops over the output."""
    kernel, groups = W.shape[2:], conv.groups
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in conv.padding]
    x = np.pad(x, [(0, 0), (0, 0), *pads], mode=_MODES[conv.padding_mode])
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, conv.stride, conv.dilation, strict=True)
    ]
    y = np.zeros((len(x), len(W), *sizes))
    per_group = len(W) // groups
    for place in product(*map(range, sizes)):
        window = tuple(
            slice(i * s, i * s + d * (k - 1) + 1, d)
            for i, s, d, k in zip(place, conv.stride, conv.dilation, kernel, strict=True)
        )
        patch = x[(slice(None), slice(None), *window)].reshape(len(x), groups, -1)
        for group in range(groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            y[(slice(None), rows, *place)] = patch[:, group] @ W[rows].reshape(per_group, -1).T
    return y if bias is None else y + bias.reshape(1, -1, *(1 for _ in sizes))


def update(layer: LoRAConv, of=np.asarray) -> np.ndarray:
    """s·BRA or s·B diag(λ) A in float64, of these factors or their absolute values."""
    middle = layer.middle()
    R = np.eye(layer.r) if middle is None else to_numpy(middle)
    return layer.scaling * (of(to_numpy(layer.lora_B)) @ of(R) @ of(to_numpy(layer.lora_A)))


def taken(layer: LoRAConv) -> np.ndarray:
    """What is subtracted from the weight."""
    start = layer.start_factors()
    return 0.0 if start is None else layer.scaling * to_numpy(start[1]) @ to_numpy(start[0])


def changing(method) -> bool:
    return get_initializer(method).changes_base


SWEEP = [
    *product(CASES, ["loram"], ["absorb", "implicit"], [torch.float64, torch.float32]),
    *thinned(product(["2d", "groups", "1d same"], METHODS, ["absorb", "implicit"], DTYPES), 7),
]


@pytest.mark.parametrize(("case", "method", "residual", "dtype"), SWEEP, ids=str)
class TestForward:
    def test_computes_the_formula(self, case, method, residual, dtype):
        model, original, x = made(case, method, residual, dtype)
        layer, W = model.conv, to_numpy(original.weight)
        at_start = model(x)
        if changing(method) and residual == "implicit" and method != "kasa":
            assert torch.equal(at_start, original(x))
        trained(model)
        delta = (update(layer) - taken(layer)).reshape(W.shape)
        bias = None if original.bias is None else to_numpy(original.bias)
        y = convolved(to_numpy(x), W + delta, bias, original)
        found = model(x)
        assert found.dtype == dtype and found.shape == y.shape
        # W (absorbed), x's copies of A and B, z, the update and y are rounded, to x's dtype.
        sizes = np.abs(W) + (update(layer, np.abs) + np.abs(taken(layer))).reshape(W.shape)
        room = convolved(np.abs(to_numpy(x)), sizes, None, original) + np.abs(y)
        work = torch.promote_types(dtype, torch.float32)
        limit = (6 * ROUNDING[dtype] + 32 * ROUNDING[work]) * room
        assert (np.abs(to_numpy(found) - y) <= limit).all()
        effective = to_numpy(layer.effective_weight())
        assert (np.abs(effective - W - delta) <= 16 * ROUNDING[dtype] * sizes).all()
        with disable_adapters(model):
            base = model(x)
        plain = convolved(to_numpy(x), W, bias, original)
        assert (np.abs(to_numpy(base) - plain) <= limit).all()
        if residual == "implicit" or not changing(method):
            assert torch.equal(base, original(x))

    def test_merging_and_unloading(self, case, method, residual, dtype):
        model, original, x = made(case, method, residual, dtype)
        y = trained(model)(x)
        other = copy.deepcopy(model)
        merge_lora(model)
        assert type(model.conv) is type(original) and not model.conv.weight.requires_grad
        assert (model(x) - y).abs().max() <= 24 * ROUNDING[dtype] * (y.abs().max() + 1)
        unload_lora(other)
        assert type(other.conv) is type(original)
        error = (other.conv.weight - original.weight).abs().max()
        absorbed = residual == "absorb" and changing(method)
        assert error <= (8 * ROUNDING[dtype] if absorbed else 0)


class TestGradients:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("case", ["stride", "reflect", "groups", "1d same", "3d"])
    def test_are_those_of_the_merged_weight(self, case, residual):
        method = "kasa" if case == "3d" else "loram"
        model, original, x = made(case, method, residual, torch.float64)
        layer = trained(model).conv
        x.requires_grad_()
        dy = torch.randn_like(model(x))
        (dx,) = torch.autograd.grad(model(x), x, dy, retain_graph=True)
        model(x).backward(dy)
        factors = [p for p in model.parameters() if p.requires_grad]
        found = [p.grad.clone() for p in factors]
        weight = layer.effective_weight()
        y = original._conv_forward(x, weight, original.bias)
        expected = torch.autograd.grad(y, [x, *factors], dy)
        for got, want in zip([dx, *found], expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-11, atol=1e-11)
        assert layer.weight.grad is None

    def test_of_the_weight_are_captured_flattened(self):
        cls, channels, out, kernel, options, size = CASES["groups"]
        model = Net(cls(channels, out, kernel, **options).double())
        x = torch.randn(2, channels, *size, dtype=torch.float64)
        found = capture_gradients(
            model, [x], ["conv"], loss=lambda m, b: m(b).square().sum(), progress=False
        )
        model(x).square().sum().backward()
        assert torch.allclose(found["conv"], model.conv.weight.grad.flatten(1))
        start = LoRAConfig(r=2, target_modules=["conv"], init_lora_weights="lora_ga")
        quiet(model, start, gradients=found)

    def test_checkpointing(self):
        model, _, x = made(residual="implicit")
        plain = copy.deepcopy(trained(model))
        plain(x).square().sum().backward()
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        assert torch.equal(model.conv.lora_A.grad, plain.conv.lora_A.grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_factors_stay_float32(self, dtype):
        model, _, x = made(dtype=dtype)
        trained(model)(x).float().square().sum().backward()
        assert model.conv.lora_A.dtype == model.conv.lora_A.grad.dtype == torch.float32


class TestDropout:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_drops_the_input_of_the_update_alone(self, residual):
        model, original, x = made(residual=residual, dtype=torch.float64, dropout=0.5)
        layer = trained(model).conv
        torch.manual_seed(3)
        y = model(x)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, 0.5)
        start = torch.from_numpy(taken(layer)).view_as(original.weight)
        full = torch.from_numpy(update(layer)).view_as(original.weight)
        expected = original(x) + original._conv_forward(dropped, full, None)
        expected = expected - original._conv_forward(x, start, None)
        assert torch.allclose(y, expected, rtol=1e-11, atol=1e-11)
        model.eval()
        assert torch.allclose(
            model(x), original._conv_forward(x, original.weight + full - start, original.bias)
        )


class TestMemory:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_channels_last(self, residual, dtype):
        """The start is the one of a contiguous weight, and the memory format stays."""
        _, original, x = made(dtype=dtype)
        twin, _, _ = made(residual=residual, dtype=dtype)
        model = Net(copy.deepcopy(original).to(memory_format=torch.channels_last))
        stored = model.conv.weight
        quiet(model, LoRAConfig(r=2, target_modules=["conv"], residual=residual))
        assert model.conv._parameters["weight"] is stored
        assert stored.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(stored, twin.conv._parameters["weight"])
        assert torch.equal(model.conv.lora_A, twin.conv.lora_A)
        x = x.contiguous(memory_format=torch.channels_last)
        assert (model(x) - original(x)).abs().max() <= 32 * ROUNDING[dtype]
        y = trained(model)(x)
        merged = merge_lora(copy.deepcopy(model))
        assert merged.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert (merged(x) - y).abs().max() <= 32 * ROUNDING[dtype] * y.abs().max()
        unload_lora(model)
        assert model.conv.weight is stored
        error = (stored - original.weight).abs().max()
        assert error <= (4 * ROUNDING[dtype] if residual == "absorb" else 0)

    def test_a_contiguous_weight_is_not_copied(self):
        model, _, _ = made()
        assert model.conv.matrix().data_ptr() == model.conv._parameters["weight"].data_ptr()
        base = base_of(nn.Conv1d(4, 6, 3))
        assert base.weight().data_ptr() == base.stored_weight.data_ptr()

    def test_an_expanded_weight_is_not_written(self):
        models = []
        for _ in range(2):
            conv = nn.Conv2d(4, 6, 3)
            conv.weight = nn.Parameter(torch.randn(6, 4, 1, 3).expand(6, 4, 3, 3))
            models.append(Net(conv))
        report = quiet(models[0], LoRAConfig(r=2, target_modules=["conv"]))
        assert "overlapping" in str(report) and models[0].conv.residual == "implicit"
        with pytest.raises(ValueError, match=r"conv cannot absorb its start.*overlapping"):
            quiet(models[1], LoRAConfig(r=2, target_modules=["conv"], residual="absorb"))


class TestLayer:
    def test_takes_one_image(self):
        for case in ("2d", "groups", "1d same", "3d"):
            model, _, x = made(case, residual="implicit")
            trained(model)
            assert torch.allclose(model(x[0]), model(x)[0], atol=1e-5)

    def test_autocast(self):
        model, original, x = made(residual="implicit")
        trained(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            assert y.dtype == original(x).dtype == torch.bfloat16
        assert (y - model(x)).abs().max() <= 0.05 * y.abs().max()

    def test_autocast_does_not_round_what_is_subtracted_from(self):
        model, _, x = made(method="kasa", residual="implicit")
        twin = copy.deepcopy(model)
        adapter = twin.conv.active()
        with torch.no_grad():
            adapter.lora_A.mul_(adapter.lora_diag[:, None])  # λ A in float32
        adapter.lora_diag = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(x), twin(x))

    def test_further_adapters(self):
        model, original, x = made(residual="implicit")
        first = trained(model)(x)
        config = LoRAConfig(r=1, target_modules=["conv"], residual="implicit")
        quiet(model, config, adapter_name="second")
        assert torch.equal(model(x), original(x))
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
        assert "conv.weight" in model.state_dict()

    @pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 compiles a convolution")
    def test_compiled(self):
        model, original, x = made("groups", residual="implicit")
        trained(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
        with disable_adapters(model):
            assert torch.allclose(compiled(x), original(x), atol=1e-6)

    def test_code_that_reads_the_weight(self):
        class Reading(Net):
            def forward(self, x):
                conv = getattr(self, "co" + "nv")
                weight = conv.weight
                return nn.functional.conv2d(x, weight, conv.bias, padding=1)

        model, _, x = made()
        reading = Reading(model.conv)
        trained(model)
        assert torch.allclose(reading(x), model(x), atol=1e-5)

    def test_ranks(self):
        rows, cols = base_of(CASES["depthwise"][0](4, 8, 3, groups=4)).shape
        assert (rows, cols) == (8, 9)
        with pytest.raises(ValueError, match=r"min\(out, in\) = 8 of conv"):
            quiet(Net(nn.Conv2d(4, 8, 3, groups=4)), LoRAConfig(r=9, target_modules=["conv"]))

    def test_says_what_it_is(self):
        model, _, _ = made("groups")
        assert "4, 6, kernel_size=(3, 3), stride=(1, 1), groups=2" in repr(model.conv)
        assert math.prod(model.conv.kernel_size) * 2 == model.conv.in_features


class Standardized(nn.Conv2d):
    """As timm's."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class OtherProduct(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class WithScale(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 2)
        self.scale = nn.Parameter(torch.ones(()))


class TestReasons:
    @pytest.mark.parametrize(
        ("conv", "reason"),
        [
            (Standardized(3, 4, 2), "Standardized does not compute as nn.Conv2d does"),
            (OtherProduct(3, 4, 2), "OtherProduct does not compute as nn.Conv2d does"),
            (WithScale(), "WithScale has other parts than a weight and a bias"),
            (nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 2)), "its weight is computed"),
            (nn.Conv2d(3, 4, 2).to(torch.float8_e4m3fn), "not of a floating-point type"),
            (nn.ConvTranspose2d(3, 4, 2), "it is a transposed convolution"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_are_named(self, conv, reason):
        assert kind_of(conv) is None
        with pytest.raises(TypeError, match=f"target_modules names 'conv', .*{reason}"):
            add_lora(Net(conv), LoRAConfig(r=1, target_modules=["conv"]))

    def test_of_one_without_a_shape(self):
        assert "run the model once" in why_not_convolution(nn.LazyConv1d(3, 2))

    def test_of_one_whose_forward_is_replaced(self):
        conv = nn.Conv1d(3, 4, 2)
        conv.forward = lambda x: x
        assert "its forward is replaced" in why_not_convolution(conv)

    def test_all_linear_leaves_them_out(self):
        model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(8, 4))
        report = quiet(model, LoRAConfig(r=1))
        assert type(model[0]) is nn.Conv1d and "0" not in report.skipped
