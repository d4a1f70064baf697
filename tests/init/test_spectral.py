"""PiSSA, MiLoRA, OLoRA and LoRA-XS: against their papers' formulas, PEFT, and in the layer."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, svd
from lora_kernels.init import LoRAXS, MiLoRA, OLoRA, PiSSA, get_initializer

from ..ops.svd.spectra import noise_of, with_sigma
from ..support.devices import rng_state
from ..support.oracle import ROUNDING, TINY, to_numpy
from ..support.packages import needs_real_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STARTS = [
    PiSSA(),
    PiSSA(method="exact"),
    PiSSA(subspace=24),
    PiSSA(tol=1e-8),  # relative to σ; a product's error is its square root
    MiLoRA(),
    MiLoRA(method="exact"),
    OLoRA(),
]
NAMES = ["pissa", "milora", "olora"]
RESIDUALS = ["absorb", "implicit"]


def stepped(n: int, m: int, r: int) -> torch.Tensor:
    """σ with gaps after the first r and before the last r, so that the products are determined."""
    k = min(n, m) - 2 * r
    return with_sigma(
        n, m, np.concatenate([np.linspace(9, 6, r), np.ones(k), np.linspace(0.3, 0.1, r)])
    )


def product_of(initializer, weight: np.ndarray, r: int) -> np.ndarray:
    """s·BA by the paper's formula, from float64 LAPACK."""
    if isinstance(initializer, OLoRA):  # times s, because it is not divided by s
        Q, R = np.linalg.qr(weight)
        return Q[:, :r] @ R[:r]
    U, S, Vh = np.linalg.svd(weight, full_matrices=False)
    part = slice(0, r) if isinstance(initializer, PiSSA) else slice(len(S) - r, None)
    return U[:, part] * S[part] @ Vh[part]


@pytest.mark.parametrize("initializer", STARTS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
def test_formula(initializer, dtype, shape, device):
    r, s = 8, 0.25
    weight = stepped(*shape, r).to(device, dtype)
    before = weight.clone()
    start = initializer(weight, r, s)
    assert torch.equal(weight, before) and start.beta is None
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    assert start.lora_A.dtype == start.lora_B.dtype == factor
    A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
    assert A.shape == (r, shape[1]) and B.shape == (shape[0], r)
    want = product_of(initializer, to_numpy(weight), r)
    times = 1.0 if isinstance(initializer, OLoRA) else s
    # The minor part is small, and its error is rounding relative to the largest σ.
    size = np.linalg.norm(to_numpy(weight), 2)
    assert np.abs(times * B @ A - want).max() <= 10 * noise_of(weight) * size
    if not isinstance(initializer, OLoRA):  # half of S / s in each, largest first
        sigma = np.linalg.svd(to_numpy(weight), compute_uv=False)
        part = sigma[:r] if isinstance(initializer, PiSSA) else sigma[-r:]
        slack = 1e-3 * part + noise_of(weight) * size
        for gram in (A @ A.T, B.T @ B):
            assert (
                np.abs(s * gram - np.diag(part)) <= np.diag(slack) + noise_of(weight) * size
            ).all()
    else:
        assert np.abs(B.T @ B - np.eye(r)).max() <= noise_of(weight)
        assert np.abs(np.tril(A[:, :r], -1)).max() == 0 and (A.diagonal() >= 0).all()


@pytest.mark.parametrize("initializer", [PiSSA(), MiLoRA(), OLoRA()], ids=repr)
def test_seed_and_generator(initializer, device):
    weight = torch.randn(200, 150).to(device)
    state = rng_state(device)
    first, second = initializer(weight, 8), initializer(weight, 8)
    assert torch.equal(rng_state(device), state)
    assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.lora_B, second.lora_B)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("initializer", [PiSSA(), MiLoRA()], ids=repr)
def test_bad_scaling(initializer, scaling, device):
    with pytest.raises(ValueError, match="scaling must be"):
        initializer(torch.randn(8, 9).to(device), 2, scaling)


class TestOptions:
    def test_names(self):
        assert get_initializer("PiSSA") == PiSSA() and get_initializer("olora") == OLoRA()
        assert get_initializer("milora") == MiLoRA() != MiLoRA(seed=1)
        with pytest.raises(ValueError, match="did you mean 'pissa'"):
            get_initializer("pisa")

    @pytest.mark.parametrize(
        "make,error,match",
        [
            (lambda: PiSSA(method="exakt"), ValueError, "did you mean 'exact'"),
            (lambda: MiLoRA(method="randomised"), ValueError, "did you mean 'randomized'"),
            (lambda: PiSSA(seed=0.5), TypeError, "seed must be an integer"),
            (lambda: MiLoRA(seed="a"), TypeError, "seed must be an integer"),
            (lambda: PiSSA(tol=-1.0), ValueError, "tol must not be negative"),
            (lambda: PiSSA(tol=math.nan), ValueError, "tol must be finite"),
            (lambda: PiSSA(subspace=2.5), TypeError, "subspace must be an integer"),
            (lambda: PiSSA(method="exact", tol=0.1), ValueError, "tol is an option of"),
            (lambda: PiSSA(method="exact", subspace=9), ValueError, "subspace is an option of"),
        ],
    )
    def test_bad(self, make, error, match):
        with pytest.raises(error, match=match):
            make()

    def test_subspace_that_does_not_fit_changes_nothing(self, device):
        linear = nn.Linear(48, 40).to(device)
        before = linear.weight.detach().clone()
        for subspace in (3, 41):
            with pytest.raises(ValueError, match="subspace must be in"):
                LoRALinear.from_linear(linear, r=4, init_lora_weights=PiSSA(subspace=subspace))
        assert torch.equal(linear.weight, before)


class TestDegenerateWeights:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_zero(self, name, residual, device):
        linear = nn.Linear(48, 40).to(device)
        nn.init.zeros_(linear.weight)
        options = {"r": 4, "init_lora_weights": name, "residual": residual}
        if name != "olora":
            with pytest.raises(ValueError, match="weight is zero"):
                LoRALinear.from_linear(linear, **options)
            assert (linear.weight == 0).all()
            return
        layer = LoRALinear.from_linear(linear, **options)  # B is orthonormal: A can train
        layer(torch.randn(3, 48).to(device)).square().sum().backward()
        assert (layer.weight == 0).all() and (layer.lora_A == 0).all()
        assert (layer.lora_A.grad.abs().amax(1) > 0).all()

    @pytest.mark.parametrize("method", ["randomized", "exact"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_pissa_of_a_rank_that_is_too_small(self, method, dtype, device):
        """Also where rounding to float32 turned the zeros into small numbers."""
        left, right = torch.randn(200, 6, dtype=dtype), torch.randn(6, 150, dtype=dtype)
        weight = (left @ right).to(device)
        with pytest.raises(ValueError, match=r"numerical rank 6, less than r = 9.*take r <= 6"):
            PiSSA(method=method)(weight, 9)
        start = PiSSA(method=method)(weight, 6)
        A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
        W = to_numpy(weight)
        assert np.linalg.norm(B @ A - W) <= 1e-5 * np.linalg.norm(W)

    @pytest.mark.parametrize("method", ["randomized", "exact"])
    @pytest.mark.parametrize("size", [10, 30, 90])
    def test_milora_of_a_singular_weight(self, size, method, device):
        """An SVD may find zeros or a few eps: no component may be zero in both A and B."""
        weight = torch.zeros(size + 10, size)
        weight[torch.arange(size - 5), torch.arange(size - 5)] = torch.linspace(1, 2, size - 5)
        try:
            start = MiLoRA(method=method)(weight.to(device), 8)
        except ValueError as error:
            assert "smallest singular values" in str(error)
            return
        assert (start.lora_A.abs().amax(1) > 1e-7).all()
        assert (start.lora_B.abs().amax(0) > 1e-7).all()

    @pytest.mark.parametrize(
        "zeros,match",
        [
            (5, r"5 of the 8 smallest singular values .* numerical rank 25, are zero"),
            (8, r"8 of the 8 smallest singular values .* rank at most 22, are zero"),
        ],
    )
    def test_milora_of_zero_singular_values(self, zeros, match, monkeypatch, device):
        weight = torch.randn(40, 30).to(device)
        exact = svd.minor([weight], 8)
        exact.S[0, :zeros] = 0
        monkeypatch.setattr(svd, "minor", lambda *args, **kwargs: exact)
        with pytest.raises(ValueError, match=match):
            MiLoRA()(weight, 8)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, name, bad, device):
        linear = nn.Linear(48, 40).to(device)
        with torch.no_grad():
            linear.weight[39, 47] = bad
        before = linear.weight.detach().clone()
        with pytest.raises(ValueError, match="NaN or Inf"):
            LoRALinear.from_linear(linear, r=4, init_lora_weights=name)
        assert torch.equal(linear.weight.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("name", NAMES)
def test_life_of_a_layer(name, residual, dtype, device):
    linear = nn.Linear(96, 80, dtype=dtype).to(device)
    original = copy.deepcopy(linear)
    options = {"r": 8, "lora_alpha": 16, "init_lora_weights": name, "residual": residual}
    layer = LoRALinear.from_linear(linear, **options)
    x = torch.randn(5, 96, dtype=dtype).to(device)
    y, eps = original(x).double(), ROUNDING[dtype]
    # W, W_res and s·BA all have W's size here: each rounds a few times, OLoRA's twice as often (s).
    assert (layer(x).double() - y).norm() <= 32 * eps * y.norm()
    A0, B0 = (p.detach().double().clone() for p in (layer.lora_A, layer.lora_B))
    W, W_res = original.weight.double(), layer.weight.double()
    if residual == "implicit":
        assert torch.equal(layer.weight, original.weight)
    else:  # W_res + s·BA is W to one rounding of W_res, and float32's of the product
        factor = ROUNDING[layer.lora_A.dtype]
        bound = 1.01 * eps * W_res.abs() + 8 * factor * (W.abs() + 2 * B0.abs() @ A0.abs())
        bound += TINY[dtype]
        assert ((W_res + 2 * B0 @ A0 - W).abs() <= bound).all()

    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).double().square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.lora_A.double(), A0)
    trained = layer(x)

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = nn.Linear(96, 80, dtype=dtype).to(device)
    loaded = LoRALinear.from_linear(fresh, **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(x), trained)  # nothing is computed again
    for one in (layer, loaded):
        base = one.base_linear().weight
        if residual == "implicit":
            assert torch.equal(base, original.weight)
        else:
            room = 1.01 * eps * (W_res.abs() + W.abs())
            room += 16 * ROUNDING[layer.lora_A.dtype] * (W.abs() + 2 * B0.abs() @ A0.abs())
            room += 2 * TINY[dtype]
            assert ((base.double() - W).abs() <= room).all()
        merged = one.to_linear()(x).double()
        assert (merged - trained.double()).norm() <= 32 * eps * (y.norm() + merged.norm())
        one.adapter_enabled = False
        assert (one(x).double() - y).norm() <= 32 * eps * y.norm()


def peft_start(linear: nn.Linear, init: str, r: int, alpha: int):
    """(s·BA, residual weight) from PEFT, in float64."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(copy.deepcopy(linear))
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, bias="none"
    )
    layer = peft.get_peft_model(model, config).base_model.model[0]
    A, B = (to_numpy(m["default"].weight) for m in (layer.lora_A, layer.lora_B))
    return alpha / r * B @ A, to_numpy(layer.base_layer.weight)


@needs_real_model
@pytest.mark.parametrize(
    "name,init", [("pissa", PiSSA(method="exact")), ("pissa", PiSSA()), ("olora", OLoRA())]
)
def test_peft_on_real_weights(name, init, real_linears, device):
    """The same s·BA and the same residual, whatever the signs."""
    for linear in real_linears:
        W = to_numpy(linear.weight)
        want, want_residual = peft_start(linear, name, 16, 32)
        ours = copy.deepcopy(linear).to(device)
        layer = LoRALinear.from_linear(ours, r=16, lora_alpha=32, init_lora_weights=init)
        A, B = to_numpy(layer.lora_A), to_numpy(layer.lora_B)
        got, got_residual = layer.scaling * B @ A, to_numpy(layer.weight)
        if init == PiSSA():  # a randomized SVD only guarantees the error
            for residual in (W - got, got_residual):
                assert np.linalg.norm(residual) <= 1.001 * np.linalg.norm(W - want)
            continue
        # PEFT's W is float32's as well. Vectors at a near tie of σ_r and σ_{r+1} mix: the product
        # is off by rounding over their gap, which is about 1e-2 of σ_1 here.
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)
        assert np.linalg.norm(got_residual - want_residual) <= 1e-4 * np.linalg.norm(W)


@needs_real_model
@pytest.mark.parametrize("init", [MiLoRA(), MiLoRA(method="exact")], ids=repr)
def test_milora_on_real_weights(init, real_linears, device):
    """PEFT has no MiLoRA: compared with the paper's formula from float64 LAPACK. The subtracted
    part is as small as any 16 components can be, and W_res has 16 zero singular values.
    """
    for linear in real_linears:
        W = to_numpy(linear.weight)
        sigma = np.linalg.svd(W, compute_uv=False)
        ours = copy.deepcopy(linear).to(device)
        layer = LoRALinear.from_linear(ours, r=16, lora_alpha=32, init_lora_weights=init)
        got = layer.scaling * to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
        noise = 1e-5 * sigma[0]
        least = np.linalg.norm(sigma[-16:])
        assert abs(np.linalg.norm(got) - least) <= 1e-3 * least + noise
        kept = np.linalg.svd(W - got, compute_uv=False)
        assert (np.abs(kept[:-16] - sigma[:-16]) <= 1e-3 * sigma[:-16] + noise).all()
        assert kept[-16:].max() <= 1e-3 * sigma[0]


class TestLoRAXS:
    """The triplets are in A and B, with all of S in A, and R is small: section 3 of the paper."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("method", ["randomized", "exact"])
    @pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
    def test_formula(self, method, dtype, shape, device):
        r = 8
        weight = stepped(*shape, r).to(device, dtype)
        before = weight.clone()
        start = LoRAXS(method=method)(weight, r, 0.25)  # s plays no part
        assert torch.equal(weight, before) and start.beta is None
        A, B, R = (to_numpy(t) for t in (start.lora_A, start.lora_B, start.lora_R))
        W = to_numpy(weight)
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        noise = 10 * noise_of(weight)
        assert np.abs(B @ A - U[:, :r] * S[:r] @ Vh[:r]).max() <= noise * S[0]
        assert np.abs(B.T @ B - np.eye(r)).max() <= noise
        assert np.abs(A @ A.T - np.diag(S[:r] ** 2)).max() <= max(noise, 2e-3) * S[0] ** 2
        assert R.shape == (r, r) and 0 < np.abs(R).max() < 5e-5  # five σ
        assert np.std(R) == pytest.approx(1e-5, rel=0.3)  # of 64 numbers: 0.09 is one σ

    def test_seed_and_sigma(self, device):
        weight = torch.randn(30, 40).to(device)
        state = rng_state(device)
        first, same = LoRAXS(seed=3)(weight, 4), LoRAXS(seed=3)(weight, 4)
        wider, other = LoRAXS(seed=3, sigma=1e-2)(weight, 4), LoRAXS(seed=4)(weight, 4)
        assert torch.equal(rng_state(device), state)
        assert torch.equal(first.lora_R, same.lora_R)
        torch.testing.assert_close(wider.lora_R, 1000 * first.lora_R)
        assert not torch.equal(first.lora_R, other.lora_R)

    @pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
    def test_bad_sigma(self, sigma):
        with pytest.raises(ValueError, match="sigma must be positive"):
            LoRAXS(sigma=sigma)

    def test_bad_weights(self, device):
        weight = (torch.randn(40, 3) @ torch.randn(3, 30)).to(device)
        with pytest.raises(ValueError, match=r"numerical rank 3, less than r = 4.*LoRAXS"):
            LoRAXS()(weight, 4)
        with pytest.raises(ValueError, match="weight is zero: LoRAXS"):
            LoRAXS()(torch.zeros(8, 9, device=device), 2)
        with pytest.raises(ValueError, match="meta device: load it first"):
            linear = nn.Linear(8, 8, device="meta")
            LoRALinear.from_linear(linear, r=2, init_lora_weights="lora_xs")

    @needs_real_model
    def test_real_weights(self, real_linears, device):
        for linear in real_linears:
            W = to_numpy(linear.weight)
            start = LoRAXS(method="exact")(linear.weight.to(device), 16)
            A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
            U, S, Vh = np.linalg.svd(W, full_matrices=False)
            want = U[:, :16] * S[:16] @ Vh[:16]
            # Vectors at a near tie of σ_r and σ_{r+1} mix, as in PiSSA's test above.
            assert np.linalg.norm(B @ A - want) <= 1e-4 * np.linalg.norm(want)
