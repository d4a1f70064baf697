"""At its start, a layer computes what its base computes, as each initializer promises."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import InitAB, LoRAM, PiSSA, get_initializer, initializer_names

from ..support.exhaustive import paired
from ..support.oracle import ROUNDING, TINY, to_numpy
from ..support.packages import needs_real_model
from ..support.running import layer_data

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STARTS = [
    # LoftQ and QERA change the base on purpose, and KaSA the layer: they have tests of their own.
    *(
        name
        for name in initializer_names()
        if not get_initializer(name).rewrites_base and not get_initializer(name).has_diag
    ),
    LoRAM(basis="orthogonal"),
    LoRAM(basis="gaussian"),
    LoRAM(gain="exact"),
    LoRAM(gain="log_half", statistic="variance"),
    LoRAM(track="pissa"),
    PiSSA(method="exact"),
    InitAB(gamma=16),
]


def start_of(linear: nn.Linear, initializer, residual: str, G: torch.Tensor, **options):
    """(layer, the original W); s is 2 by default."""
    W = to_numpy(linear.weight).copy()
    data = layer_data(get_initializer(initializer), linear.weight.detach())
    if "gradient" in data:
        data = {"gradient": G}
    options = {"r": 8, "lora_alpha": 16, **options, **data}
    layer = LoRALinear.from_linear(
        linear, init_lora_weights=initializer, residual=residual, **options
    )
    return layer, W


def factors(layer: LoRALinear) -> tuple[np.ndarray, np.ndarray]:
    """B and A, or B and R A."""
    right = to_numpy(layer.lora_A)
    if layer.lora_R is not None:
        right = to_numpy(layer.lora_R) @ right
    return to_numpy(layer.lora_B), right


def check_absorbed(layer: LoRALinear, W: np.ndarray) -> float:
    """The largest |W_res + s·BA − W| in ulps of W's dtype, where one ulp is twice the largest
    rounding of |W| + s|B||A|, the size of the terms.

    The rounding of W_res contributes at most half an ulp. The rest is float32's (float64's for a
    float64 base): r + 3 roundings of s·BA and of the difference in sequence, which for a float32
    base are as large as the first, (r + 4) / 2 in all.
    """
    dtype = layer.weight.dtype
    B, A = (f.astype(np.longdouble) for f in factors(layer))  # finer than the errors it measures
    size = np.abs(W) + layer.scaling * np.abs(B) @ np.abs(A)
    error = np.abs(to_numpy(layer.weight) + layer.scaling * B @ A - W)
    ulp = 2 * ROUNDING[dtype] * size
    roundings = ROUNDING[dtype] + (layer.r + 3) * ROUNDING[layer.lora_A.dtype]
    assert (error <= roundings * size + TINY[dtype]).all()
    # Where W and the start are zero there is no ulp, and the error is zero.
    return float((error[ulp > 0] / ulp[ulp > 0]).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("initializer", STARTS, ids=str)
def test_absorbed_start_is_the_base(initializer, dtype, device):
    """Largest error measured over the initializers: 0.46 to 0.50 ulps for bfloat16 and float16, the
    one rounding of W_res; 0.8 to 2.1 for float32 and 1.4 to 2.4 for float64, where the products
    round too.
    """
    torch.manual_seed(7)
    linear = nn.Linear(96, 300, dtype=dtype).to(device)
    layer, W = start_of(linear, initializer, "absorb", torch.randn(300, 96))
    if not get_initializer(initializer).changes_base:
        assert np.array_equal(to_numpy(layer.weight), W)
        assert torch.equal(layer.base_linear().weight, layer.weight)
        return
    assert not np.array_equal(to_numpy(layer.weight), W)
    ulps = check_absorbed(layer, W)
    assert ulps <= (0.51 if dtype in (torch.bfloat16, torch.float16) else (layer.r + 4) / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("initializer", STARTS, ids=str)
def test_implicit_start_is_the_base(initializer, dtype, device):
    """W keeps its bits, and y is the base's up to the roundings of the terms that cancel."""
    torch.manual_seed(7)
    linear = nn.Linear(96, 300, dtype=dtype).to(device)
    layer, W = start_of(linear, initializer, "implicit", torch.randn(300, 96))
    assert np.array_equal(to_numpy(layer.weight), W)
    x = torch.randn(9, 96, dtype=dtype).to(device)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    got, want = to_numpy(layer(x)), to_numpy(base)
    B, A = factors(layer)
    if not get_initializer(initializer).changes_base:
        want = want + layer.scaling * to_numpy(x) @ A.T @ B.T
    size = np.linalg.norm(layer.scaling * (np.abs(to_numpy(x)) @ np.abs(A).T) @ np.abs(B).T)
    assert np.linalg.norm(got - want) <= 4 * ROUNDING[dtype] * (np.linalg.norm(want) + size)


@needs_real_model
@pytest.mark.parametrize(
    ("initializer", "dtype"),
    paired([n for n in STARTS if get_initializer(n).changes_base], DTYPES[1:]),
)
def test_real_weights(initializer, dtype, real_linears, real_gradients, device):
    for linear, G in zip(real_linears, real_gradients, strict=True):
        ours = copy.deepcopy(linear).to(device, dtype)
        layer, W = start_of(ours, initializer, "absorb", G, r=16, lora_alpha=32)
        check_absorbed(layer, W)


@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize("initializer", STARTS, ids=str)
def test_the_base_comes_back(initializer, residual, device):
    """From β or the stored factors, after training, from a file, and with the adapter disabled."""
    torch.manual_seed(7)
    linear = nn.Linear(40, 60).to(device)
    original, G = copy.deepcopy(linear), torch.randn(60, 40)
    layer, W = start_of(linear, initializer, residual, G)
    B, A = factors(layer)
    size = np.abs(W) + layer.scaling * np.abs(B) @ np.abs(A)
    x = torch.randn(3, 40).to(device)
    for p in layer.parameters():
        if p.requires_grad:
            p.data.mul_(0.5).add_(0.01)
    loaded, _ = start_of(nn.Linear(40, 60).to(device), initializer, residual, G)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))
    untouched = residual == "implicit" or not get_initializer(initializer).changes_base
    for one in (layer, loaded):
        base = to_numpy(one.base_linear().weight)
        # Subtracting and adding back: each has the roundings that `check_absorbed` counts.
        room = 0.0 if untouched else 2 * (layer.r + 4) * ROUNDING[torch.float32]
        assert (np.abs(base - W) <= room * size).all()
        merged = one.to_linear()(x)
        torch.testing.assert_close(merged, one(x), rtol=1e-4, atol=1e-4)
        one.adapter_enabled = False
        torch.testing.assert_close(one(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("initializer", [n for n in STARTS if get_initializer(n).changes_base])
def test_no_room_for_the_residual(initializer, device):
    """float16 ends at 65504: the start raises an error before anything is written."""
    linear = nn.Linear(96, 80, dtype=torch.float16).to(device)
    before = linear.weight.detach().clone()
    options = {"r": 8, "lora_alpha": 8e7}
    if get_initializer(initializer).grows_with_scaling:
        with pytest.raises(ValueError, match="could overflow"):
            start_of(linear, initializer, "absorb", torch.randn(80, 96), **options)
        assert torch.equal(linear.weight, before)
    else:  # divided by s
        layer, W = start_of(linear, initializer, "absorb", torch.randn(80, 96), **options)
        check_absorbed(layer, W)
