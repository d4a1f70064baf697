"""Magnitudes against float64 NumPy, written from the paper's formulas."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, magnitude
from lora_kernels.init import get_initializer
from lora_kernels.training.magnitude import (
    growth,
    inspect_model,
    mean_square,
    measure,
    measure_adapter,
    measure_layer,
    product_mean_square,
    update_mean_square,
)

from ..support.oracle import dst_basis, loram_beta, to_numpy
from ..support.packages import needs_real_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(60, 90), (90, 60), (64, 64)]
STARTS = ["lora", "loram", "pissa", "milora", "olora"]
# Singular values come in float32 (float64 for float64 weights), off by some eps of the largest.
PRECISION = {dtype: 1e-12 if dtype == torch.float64 else 1e-5 for dtype in DTYPES}


def nu(array: np.ndarray) -> float:
    return float(np.mean(array**2))


class TestMeasure:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("r", [1, 8, 60])
    def test_formulas(self, r, shape, dtype, device):
        n, m = shape
        weight = torch.randn(n, m).to(device, dtype)
        before = weight.clone()
        row = measure(weight, r, 2.0, name="layer")
        assert torch.equal(weight, before)
        W = to_numpy(weight)
        sigma = np.linalg.svd(W, compute_uv=False)
        rank = np.linalg.matrix_rank(W)
        rho = sigma[:r].mean() ** 2 / (sigma[:rank] ** 2).mean()
        gain = rho * r / rank
        close = {"rel": PRECISION[dtype]}
        assert (row.name, row.out_features, row.in_features, row.r) == ("layer", n, m, r)
        assert row.rank == rank and row.scaling == 2.0 and row.nu_update is None
        assert row.nu_weight == pytest.approx(nu(W), rel=1e-12)
        assert row.rho == pytest.approx(rho, **close)
        assert row.gain == pytest.approx(gain, **close)
        log = math.log(max(r, 2)) / math.log(min(n, m))
        assert row.log_gain == pytest.approx(log, rel=1e-14)
        assert row.beta == pytest.approx(loram_beta(W, r), rel=1e-10)
        product = loram_beta(W, r) ** 2 * dst_basis(n, r) @ dst_basis(m, r).T
        ratio = 2.0 * np.linalg.norm(product) / np.linalg.norm(W)
        assert row.start_ratio == pytest.approx(ratio, rel=1e-10)
        assert row.k1_loram == pytest.approx(log * (m + n) * nu(W), rel=1e-10)
        assert row.k1_pissa == pytest.approx(gain * (m + n) * nu(W) / 4, **close)
        assert row.k1_lora == pytest.approx(r / (9 * m), rel=1e-14)
        assert [k for k, _ in row.gains] == [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= min(n, m)]
        for k, value in row.gains:
            assert value == pytest.approx(sigma[:k].sum() ** 2 / k / (sigma**2).sum(), **close)

    @pytest.mark.parametrize("name", ["pissa", "loram", "lora"])
    @pytest.mark.parametrize("scaling", [1.0, 0.25])
    def test_growth_is_that_of_the_starts(self, name, scaling, device):
        """k₁ = r(m σ_A⁴ + n σ_B⁴) of the initializers' factors."""
        n, m, r = 60, 2000, 8
        weight = torch.randn(n, m).to(device)
        start = get_initializer(name)(weight, r, scaling)
        A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
        want = r * (m * nu(A) ** 2 + n * nu(B) ** 2)
        assert growth(nu(A), nu(B), n, m, r) == pytest.approx(want)
        got = getattr(measure(weight, r, scaling), f"k1_{name}")
        # 16 000 random entries give their variance to about a per cent; PiSSA's randomized σ are
        # those of a spectrum without gaps.
        assert got == pytest.approx(want, rel=0.05 if name == "lora" else 1e-3)

    def test_randomized(self, device):
        """Only the r largest; the rank is assumed to be full."""
        weight = torch.randn(200, 150).to(device)
        exact = measure(weight, 8)
        got = measure(weight, 8, method="randomized", seed=3)
        assert got == measure(weight, 8, method="randomized", seed=3)
        # Ritz values are never too large. Each may be 2 % too small on a spectrum without gaps.
        assert 0.98 * exact.gain <= got.gain <= (1 + 1e-5) * exact.gain
        assert got.rho == pytest.approx(got.gain * 150 / 8)
        assert got.rank == 150 and [k for k, _ in got.gains] == [1, 2, 4, 8]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_low_rank(self, dtype, device):
        weight = (torch.randn(40, 5, dtype=dtype) @ torch.randn(5, 30, dtype=dtype)).to(device)
        row = measure(weight, 5)
        sigma = np.linalg.svd(to_numpy(weight), compute_uv=False)[:5]
        assert row.rank == 5
        assert row.rho == pytest.approx(sigma.mean() ** 2 / (sigma**2).mean(), rel=1e-5)
        assert row.gain == pytest.approx(row.rho, rel=1e-12)

    @pytest.mark.parametrize("method", ["exact", "randomized"])
    @pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
    def test_weights_without_magnitude(self, bad, method, device):
        weight = torch.zeros(12, 10).to(device)
        weight[3, 4] = bad
        row = measure(weight, 4, method=method)
        assert row.rank is None and row.gains == ()
        for name in ("rho", "gain", "beta", "start_ratio", "k1_pissa", "k1_loram"):
            assert math.isnan(getattr(row, name)), name
        assert row.k1_lora == 4 / 90 and not row.log_gain > 1

    @pytest.mark.parametrize("method", ["exact", "randomized"])
    def test_rank_beyond_the_weight(self, method, device):
        """A small layer among large ones still gets its own spectrum."""
        row = measure(torch.randn(3, 10).to(device), 16, method=method)
        assert row.nu_weight > 0 and [k for k, _ in row.gains] == ([1, 2] * (method == "exact"))
        for name in ("rho", "gain", "log_gain", "beta", "start_ratio", "k1_lora", "k1_loram"):
            assert math.isnan(getattr(row, name)), name

    @pytest.mark.parametrize(
        "kwargs,error,match",
        [
            ({"method": "exakt"}, ValueError, "did you mean 'exact'"),
            ({"r": 0}, ValueError, "r must be at least 1"),
            ({"r": 2.5}, TypeError, "r must be an integer"),
            ({"seed": 0.5}, TypeError, "seed must be an integer"),
            ({"scaling": 0.0}, ValueError, "scaling must be positive"),
            ({"scaling": math.nan}, ValueError, "scaling must be positive and finite, got nan"),
            ({"weight": torch.zeros(3)}, ValueError, "must be 2-D"),
            ({"weight": torch.zeros(0, 3)}, ValueError, "weight is empty"),
            ({"weight": torch.zeros(0, 3), "name": "a.b"}, ValueError, "a.b is empty"),
            ({"weight": torch.zeros(3, 3, dtype=torch.int8)}, TypeError, "dequantize"),
        ],
    )
    def test_bad(self, kwargs, error, match):
        with pytest.raises(error, match=match):
            measure(**({"weight": torch.randn(6, 5)} | kwargs))


class TestUpdate:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("start", STARTS)
    def test_against_the_product(self, start, residual, dtype, device):
        """‖s(BA − B₀A₀)‖ formed by NumPy, after a change as small as float32 allows."""
        linear = nn.Linear(48, 40, dtype=dtype).to(device)
        layer = LoRALinear.from_linear(
            linear, r=8, lora_alpha=4, init_lora_weights=start, residual=residual
        )
        assert update_mean_square(layer) == 0.0
        A0, B0 = (to_numpy(p).copy() for p in (layer.lora_A, layer.lora_B))
        factors = layer.start_factors()
        if start == "lora":
            assert factors is None
        else:
            assert np.array_equal(to_numpy(factors[0]), A0)
            assert np.array_equal(to_numpy(factors[1]), B0)
        for step in (1e-5, 0.3):
            with torch.no_grad():
                layer.lora_A.add_(step * torch.randn_like(layer.lora_A))
                layer.lora_B.add_(step * torch.randn_like(layer.lora_B))
            A, B = to_numpy(layer.lora_A), to_numpy(layer.lora_B)
            want = nu(0.5 * (B @ A - B0 @ A0))
            # The oracle's difference of products keeps 1e-16 of them, of an update of 1e-5 or so.
            assert update_mean_square(layer) == pytest.approx(want, rel=1e-6, abs=0)

    def test_nothing_of_the_size_of_W_is_formed(self):
        """The product of these two would take 320 GB."""
        A, B = torch.full((2, 200_000), 0.5), torch.full((200_000, 2), 0.25)
        assert product_mean_square(A, B) == 0.25**2

    def test_a_trained_R_between_the_two(self, device):
        layer = LoRALinear(10, 12, r=3, lora_alpha=6, init_lora_weights="lora").to(device)
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(12, 3))
        layer.lora_R = nn.Parameter(torch.randn(3, 3).to(device))
        A, B, R = (to_numpy(p) for p in (layer.lora_A, layer.lora_B, layer.lora_R))
        assert update_mean_square(layer) == pytest.approx(nu(2 * B @ R @ A), rel=1e-12)

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("start", STARTS)
    def test_row_of_a_layer(self, start, residual, device):
        """W is the base's, not the residual's; rank, s and start are the layer's own."""
        linear = nn.Linear(48, 40).to(device)
        original = copy.deepcopy(linear)
        layer = LoRALinear.from_linear(
            linear, r=8, lora_alpha=4, init_lora_weights=start, residual=residual
        )
        A0, B0 = (to_numpy(p).copy() for p in (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            layer.lora_B.add_(0.1)
        row = measure_layer(layer, name="x")
        want = measure(original.weight, 8, 0.5)
        assert (row.name, row.r, row.scaling) == ("x", 8, 0.5)
        assert row.nu_weight == pytest.approx(want.nu_weight, rel=1e-6)
        assert row.gain == pytest.approx(want.gain, rel=1e-5)
        start_size = 0.5 * np.linalg.norm(B0 @ A0) / np.linalg.norm(to_numpy(original.weight))
        assert row.start_ratio == pytest.approx(start_size, rel=1e-5, abs=1e-12)
        assert row.nu_update == update_mean_square(layer) > 0


class TestInspectModel:
    def test_rows(self, device):
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20)).to(device)
        model.add_module("adapted", LoRALinear(20, 10, r=4, lora_alpha=8, device=device))
        rows = inspect_model(model, 8, 2.0)
        assert [row.name for row in rows] == ["0", "2", "adapted"]
        assert [(row.r, row.scaling) for row in rows] == [(8, 2.0), (8, 2.0), (4, 2.0)]
        assert [row.nu_update for row in rows] == [None, None, 0.0]
        assert rows[1] == measure(model[2].weight, 8, 2.0, name="2")
        assert inspect_model(model, 8, 2.0, targets=["2"], progress=False) == [rows[1]]
        randomized = inspect_model(model, 2, method="randomized")
        assert randomized[0].gain == pytest.approx(measure(model[0].weight, 2).gain, rel=1e-2)

    def test_conv1d_and_shared_weights(self, device):
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        model = nn.ModuleDict({"a": conv1d(30, 20), "b": nn.Linear(20, 30)}).to(device)
        model["c"] = nn.Linear(20, 30).to(device)
        model["c"].weight = model["b"].weight
        rows = inspect_model(model, 4)
        assert [(row.out_features, row.in_features) for row in rows] == [(30, 20)] * 3
        assert rows[0].nu_weight == pytest.approx(nu(to_numpy(model["a"].weight)))
        assert rows[2].gain == rows[1].gain

    @pytest.mark.parametrize(
        "kwargs,match",
        [
            ({"targets": ["q_prok"]}, "no module is called 'q_prok'"),
            ({"targets": []}, "targets is empty"),
            ({"r": 0}, "r must be at least 1"),
            ({"method": "randomised"}, "did you mean 'randomized'"),
            ({"scaling": -1.0}, "scaling must be positive"),
        ],
    )
    def test_bad(self, kwargs, match, monkeypatch):
        """Errors are raised before anything is measured."""
        monkeypatch.setattr(magnitude, "measure", None)
        with pytest.raises(ValueError, match=match):
            inspect_model(nn.Sequential(nn.Linear(4, 4)), **kwargs)
        with pytest.raises(ValueError, match="Tanh has no linear layer"):
            inspect_model(nn.Tanh())


class TestAdapter:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_formulas(self, dtype, device):
        lora_A, lora_B = (torch.randn(*s).to(device, dtype) for s in ((4, 30), (20, 4)))
        row = measure_adapter("x", lora_A, lora_B, 0.5)
        A, B = to_numpy(lora_A), to_numpy(lora_B)
        assert (row.out_features, row.in_features, row.r) == (20, 30, 4)
        assert row.nu_A == pytest.approx(nu(A)) and row.nu_B == pytest.approx(nu(B))
        assert row.nu_update == pytest.approx(nu(0.5 * B @ A), rel=1e-12)
        assert row.norm_update == pytest.approx(np.linalg.norm(0.5 * B @ A), rel=1e-12)
        assert measure_adapter("x", lora_A, torch.zeros_like(lora_B), 0.5).norm_update == 0

    @pytest.mark.parametrize(
        "shapes,scaling,match",
        [
            (((4, 30), (20, 5)), 1.0, r"x: lora_A \[4, 30\] and lora_B \[20, 5\] do not make"),
            (((0, 30), (20, 0)), 1.0, "do not make"),
            (((4, 30, 1), (20, 4)), 1.0, "x.lora_A must be 2-D"),
            (((4, 30), (20, 4)), math.inf, "scaling must be finite"),
        ],
    )
    def test_bad(self, shapes, scaling, match):
        with pytest.raises(ValueError, match=match):
            measure_adapter("x", *(torch.zeros(*shape) for shape in shapes), scaling)


@needs_real_model
def test_real_weights(real_model, device):
    block = real_model.model.layers[12]
    for linear in (block.self_attn.k_proj, block.mlp.down_proj):
        W = to_numpy(linear.weight)
        sigma = np.linalg.svd(W, compute_uv=False)
        row = measure(linear.weight.to(device), 16)
        assert row.gain == pytest.approx(sigma[:16].sum() ** 2 / 16 / (sigma**2).sum(), rel=1e-5)
        assert mean_square(linear.weight) == pytest.approx(nu(W), rel=1e-12)
        rough = measure(linear.weight.to(device), 16, method="randomized")
        # Ritz values are never too large. Each may be 2 % too small where the spectrum is flat.
        assert 0.98 * row.gain <= rough.gain <= (1 + 1e-5) * row.gain
