from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import LoRAGA, LoRAM, PiSSA, get_initializer
from lora_kernels.init.loram import BASES, GAINS, STATISTICS
from lora_kernels.init.start import subtract_start_

from ..support.devices import rng_state
from ..support.oracle import ROUNDING, dst_basis, loram_beta, to_numpy
from ..support.packages import needs_real_model


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (48, 48)])
@pytest.mark.parametrize("r", [1, 2, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pure_call(shape, r, dtype, device):
    weight = torch.randn(*shape).to(device, dtype)
    before = weight.clone()
    start = LoRAM()(weight, r)
    assert torch.equal(weight, before)
    beta = loram_beta(to_numpy(weight), r)
    assert float(start.beta) == pytest.approx(beta, rel=1e-12)
    np.testing.assert_allclose(
        to_numpy(start.lora_B), beta * dst_basis(shape[0], r), atol=2**-23 * beta
    )
    np.testing.assert_allclose(
        to_numpy(start.lora_A), beta * dst_basis(shape[1], r).T, atol=2**-23 * beta
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_absorbing_is_the_pure_call_and_the_subtraction(dtype, device):
    weight = torch.randn(50, 30).to(device, dtype)
    absorbed, by_hand = weight.clone(), weight.clone()
    fused = LoRAM().absorb_(absorbed, 8, 0.5)
    start = LoRAM()(by_hand, 8)
    subtract_start_(by_hand, start, 0.5)
    assert torch.equal(fused.lora_A, start.lora_A) and torch.equal(fused.lora_B, start.lora_B)
    assert fused.beta == start.beta
    # β² is a square root there and the square of one here: the last bit of float64 may differ.
    assert (absorbed - by_hand).abs().max() <= 4 * ROUNDING[dtype] * absorbed.abs().max()


def nu(matrix: np.ndarray, statistic: str) -> float:
    """ν of a matrix that is formed; the code never forms it."""
    return float(np.mean(matrix**2) if statistic == "mean_square" else np.var(matrix, ddof=1))


def gain_of(name: str, weight: np.ndarray, r: int) -> float:
    """Q[r] as in the paper."""
    if name != "exact":
        return np.log(r / 2 if name == "log_half" else r) / np.log(min(weight.shape))
    sigma = np.linalg.svd(weight, compute_uv=False)
    rank = np.linalg.matrix_rank(weight)
    rho = np.mean(sigma[:r]) ** 2 / np.mean(sigma[:rank] ** 2)
    return float(rho * r / rank)


def low_rank(n: int, m: int) -> torch.Tensor:
    return torch.randn(n, 20) @ torch.randn(20, m) / 5


class TestOptions:
    @pytest.mark.parametrize("statistic", STATISTICS)
    @pytest.mark.parametrize("gain", GAINS)
    @pytest.mark.parametrize("basis", BASES)
    @pytest.mark.parametrize("make", [torch.randn, low_rank])
    @pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
    def test_magnitude(self, shape, make, basis, gain, statistic, device):
        """ν[B₀A₀], of the formed product, is Q[r] ν[W]: the definition of β, for any basis."""
        r, weight = 12, make(*shape)
        start = LoRAM(basis=basis, gain=gain, statistic=statistic)(weight.to(device), r, 3.0)
        W, A, B = to_numpy(weight), to_numpy(start.lora_A), to_numpy(start.lora_B)
        want = gain_of(gain, W, r) * nu(W, statistic)
        # A and B are float32; each σ may be off by 1e-3 of itself, their sum is squared.
        assert nu(B @ A, statistic) == pytest.approx(want, rel=2e-3 if gain == "exact" else 1e-5)
        assert (start.beta is not None) == (basis == "dst")

    @pytest.mark.parametrize("gain", GAINS)
    @pytest.mark.parametrize("statistic", STATISTICS)
    @pytest.mark.parametrize("r", [3, 16, 40])
    def test_dst_factors(self, r, statistic, gain, device):
        weight = torch.randn(40, 60, dtype=torch.float64)
        start = LoRAM(gain=gain, statistic=statistic)(weight.to(device), r)
        left, right, W = dst_basis(40, r), dst_basis(60, r), to_numpy(weight)
        target = gain_of(gain, W, r) * nu(W, statistic) / nu(left @ right.T, statistic)
        rel = 5e-4 if gain == "exact" else 1e-12
        assert float(start.beta) == pytest.approx(target**0.25, rel=rel)
        beta = float(start.beta)
        np.testing.assert_allclose(to_numpy(start.lora_B), beta * left, atol=1e-15 * beta)
        np.testing.assert_allclose(to_numpy(start.lora_A), beta * right.T, atol=1e-15 * beta)

    @pytest.mark.parametrize("r,excess", [(2, 0.10), (16, 0.015)])
    def test_variance_is_the_authors_code_s(self, r, excess, device):
        """β is larger by 10 % at r = 2 and by 1.5 % at r = 16: half of the first product is its
        mean.
        """
        weight = torch.randn(500, 400).to(device)
        ours, theirs = LoRAM()(weight, r), LoRAM(statistic="variance")(weight, r)
        assert float(theirs.beta / ours.beta) - 1 == pytest.approx(excess, rel=0.1)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_orthogonal(self, dtype, device):
        """Orthonormal columns times β, uniformly distributed: no sign is preferred."""
        weight = torch.randn(50, 70).to(device, dtype)
        start = LoRAM(basis="orthogonal", seed=5)(weight, 10)
        A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
        beta = loram_beta(to_numpy(weight), 10)
        eye, rounding = beta**2 * np.eye(10), 4 * ROUNDING[dtype] * beta**2
        assert np.abs(B.T @ B - eye).max() <= rounding + 1e-14 * beta**2
        assert np.abs(A @ A.T - eye).max() <= rounding + 1e-14 * beta**2
        signs = [float(LoRAM(basis="orthogonal", seed=k)(weight, 1).lora_B[0]) for k in range(64)]
        assert 12 <= sum(s > 0 for s in signs) <= 52  # 32 ± five σ

    def test_gaussian(self, device):
        start = LoRAM(basis="gaussian", seed=5)(torch.randn(300, 400).to(device), 16)
        A, B = to_numpy(start.lora_A).ravel(), to_numpy(start.lora_B).ravel()
        for factor in (A, B):  # one β for both
            assert stats.kstest(factor / np.std(A), stats.norm.cdf).pvalue > 1e-3

    @pytest.mark.parametrize("basis", ["orthogonal", "gaussian"])
    def test_seeds(self, basis, device):
        weight = torch.randn(20, 30).to(device)
        state = rng_state(device)
        first, same, other = (LoRAM(basis=basis, seed=seed)(weight, 4) for seed in (1, 1, 2))
        assert torch.equal(rng_state(device), state)
        assert torch.equal(first.lora_A, same.lora_A) and torch.equal(first.lora_B, same.lora_B)
        assert not torch.equal(first.lora_B, other.lora_B)

    @pytest.mark.parametrize("statistic", STATISTICS)
    @pytest.mark.parametrize("basis", BASES)
    def test_tracks_pissa(self, basis, statistic, device):
        """ν[B₀A₀] is that of PiSSA's B A, which is W's best approximation over s."""
        weight, r, s = torch.randn(40, 60), 8, 2.0
        track = PiSSA(method="exact")
        start = LoRAM(basis=basis, statistic=statistic, track=track)(weight.to(device), r, s)
        U, S, Vh = np.linalg.svd(to_numpy(weight), full_matrices=False)
        want = nu(U[:, :r] * S[:r] @ Vh[:r] / s, statistic)
        assert nu(to_numpy(start.lora_B) @ to_numpy(start.lora_A), statistic) == pytest.approx(
            want, rel=1e-4
        )

    @pytest.mark.parametrize("track", ["lora_ga", LoRAGA(), "LoRA_SB"])
    def test_tracks_what_is_made_from_a_gradient(self, track, device):
        weight, G = torch.randn(40, 60).to(device), torch.randn(40, 60).to(device)
        loram = LoRAM(track=track)
        assert loram.needs_gradient and not LoRAM(track="pissa").needs_gradient
        start, tracked = (i(weight, 8, 2.0, G) for i in (loram, get_initializer(track)))
        product = to_numpy(tracked.lora_B) @ to_numpy(tracked.right())
        got = to_numpy(start.lora_B) @ to_numpy(start.lora_A)
        assert nu(got, "mean_square") == pytest.approx(nu(product, "mean_square"), rel=1e-4)
        with pytest.raises(ValueError, match="give gradient=G"):
            loram(weight, 8, 2.0)
        layer = LoRALinear.from_linear(
            nn.Linear(60, 40).to(device), r=8, init_lora_weights=loram, gradient=G
        )
        assert (
            layer.lora_R is None and layer.active().get_extra_state().numel() == 2
        )  # from its recipe

    @needs_real_model
    @pytest.mark.parametrize("gain", GAINS)
    def test_real_weights(self, gain, real_linears, device):
        for linear in real_linears:
            W = to_numpy(linear.weight)
            start = LoRAM(gain=gain)(linear.weight.detach().to(device), 16)
            want = gain_of(gain, W, 16) * nu(W, "mean_square")
            got = to_numpy(start.lora_B) @ to_numpy(start.lora_A)
            rel = 2e-3 if gain == "exact" else 1e-5
            assert nu(got, "mean_square") == pytest.approx(want, rel=rel)


class TestBadOptions:
    @pytest.mark.parametrize(
        "make,error,match",
        [
            (lambda: LoRAM(basis="dct"), ValueError, "unknown basis 'dct'.*did you mean 'dst'"),
            (lambda: LoRAM(basis="ortogonal"), ValueError, "did you mean 'orthogonal'"),
            (lambda: LoRAM(gain="log2"), ValueError, "unknown gain 'log2'.*did you mean 'log'"),
            (lambda: LoRAM(statistic="var"), ValueError, "unknown statistic 'var'"),
            (lambda: LoRAM(seed=0.5), TypeError, "seed must be an integer"),
            (lambda: LoRAM(track="loram"), ValueError, "must be an initializer other"),
            (lambda: LoRAM(track=LoRAM(gain="exact")), ValueError, "must be an initializer other"),
            (lambda: LoRAM(track="pisa"), ValueError, "did you mean 'pissa'"),
            (lambda: LoRAM(track=3), TypeError, "name or an Initializer"),
            (lambda: LoRAM(track="pissa", gain="exact"), ValueError, "no effect with track"),
        ],
    )
    def test_names(self, make, error, match):
        with pytest.raises(error, match=match):
            make()

    @pytest.mark.parametrize(
        "initializer,r,make,match",
        [
            (LoRAM(gain="log_half"), 2, torch.randn, "take r > 2"),
            (LoRAM(track="lora"), 2, torch.randn, "LoRA starts at zero"),
            (LoRAM(track="init_b"), 2, torch.randn, "InitB starts at zero"),
            (LoRAM(statistic="variance"), 2, torch.ones, "weight has variance zero"),
            (LoRAM(gain="exact"), 2, torch.zeros, "weight is zero"),
            (LoRAM(basis="gaussian"), 2, lambda *s: torch.full(s, np.nan), "NaN or Inf"),
        ],
    )
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_change_nothing(self, initializer, r, make, match, residual, device):
        linear = nn.Linear(12, 8).to(device)
        with torch.no_grad():
            linear.weight.copy_(make(8, 12))
        before = linear.weight.detach().clone()
        options = {"r": r, "init_lora_weights": initializer, "residual": residual}
        with pytest.raises(ValueError, match=match):
            LoRALinear.from_linear(linear, **options)
        assert torch.equal(linear.weight.nan_to_num(9.0), before.nan_to_num(9.0))

    def test_variance_of_a_constant_basis(self, device):
        """At 2 × 2 the first product of the DST basis is one number four times."""
        weight = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=device)
        with pytest.raises(ValueError, match="product of the bases has variance zero"):
            LoRAM(statistic="variance")(weight, 1)
