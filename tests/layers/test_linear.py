"""`LoRALinear`: what users rely on when it replaces an nn.Linear."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear
from lora_kernels.init import LoRA, LoRAM

from ..support import ROOT
from ..support.devices import rng_state
from ..support.exhaustive import paired
from ..support.oracle import ROUNDING

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
METHODS = ["loram", "lora"]
RESIDUALS = ["absorb", "implicit"]


def make(method="loram", residual="absorb", dtype=torch.float32, *, device, bias=True, **kwargs):
    """(layer, a copy of its original linear layer)."""
    linear = nn.Linear(48, 40, bias=bias, dtype=dtype).to(device)
    original = copy.deepcopy(linear)
    kwargs = {"r": 8, "lora_alpha": 16, **kwargs}
    layer = LoRALinear.from_linear(linear, init_lora_weights=method, residual=residual, **kwargs)
    return layer, original


def train_a_little(layer: LoRALinear, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, layer.in_features, dtype=layer.weight.dtype)
        layer(x.to(layer.weight.device)).float().square().mean().backward()
        optimizer.step()


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, roundings: float) -> None:
    """‖got − want‖ is within `roundings` of the dtype."""
    difference = (got.double() - want.double()).norm()
    assert difference <= roundings * ROUNDING[dtype] * want.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("method", METHODS)
def test_life_of_a_layer(method, residual, dtype, device):
    layer, original = make(method, residual, dtype, device=device)
    x = torch.randn(5, 7, 48, dtype=dtype).to(device)
    y = original(x)
    # The start: the same function. Absorbing rounds W once at the size of W − sBA (here up to
    # twice W), and the product of A and B as often again.
    close(layer(x), y, dtype, 16)
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["adapters.default.lora_A", "adapters.default.lora_B"]
    assert layer.lora_A.shape == (8, 48) and layer.lora_B.shape == (40, 8)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected

    before = layer.lora_B.detach().clone()
    train_a_little(layer)
    assert not torch.equal(layer.lora_B, before)
    assert layer.weight.grad is None and layer.bias.grad is None

    # Disabled: the original layer, now and after training; exact where W was not rewritten.
    layer.adapter_enabled = False
    base = layer.base_linear()
    if residual == "implicit" or method == "lora":
        assert torch.equal(layer(x), y) and torch.equal(base.weight, original.weight)
    else:
        close(layer(x), y, dtype, 16)
        close(base.weight, original.weight, dtype, 4)
    layer.adapter_enabled = True
    merged = layer.to_linear()
    assert type(merged) is nn.Linear and type(base) is nn.Linear
    assert merged.weight.dtype == dtype and torch.equal(merged.bias, original.bias)
    close(merged(x), layer(x), dtype, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed_start_is_exact_to_one_rounding(dtype, device):
    """Max |W_res + s·BA − W| in units of the rounding of W_res, plus float32's rounding of the
    product.
    """
    layer, original = make(dtype=dtype, device=device)
    wide = layer.weight.double()
    A, B = layer.lora_A.double(), layer.lora_B.double()
    error = (wide + layer.scaling * B @ A - original.weight.double()).abs()
    factor = ROUNDING[layer.lora_A.dtype]
    bound = 1.01 * (ROUNDING[dtype] + factor) * wide.abs()
    bound += 4 * factor * layer.scaling * (B.abs() @ A.abs()) + 2e-16
    assert (error <= bound).all()


def test_takes_the_storage_over(device):
    linear = nn.Linear(48, 40).to(device)
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight is weight and layer.bias is bias
    assert not weight.requires_grad and not bias.requires_grad


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("method", METHODS)
def test_copies(method, residual, device):
    layer, _ = make(method, residual, device=device)
    train_a_little(layer)
    x = torch.randn(3, 48).to(device)
    y, base = layer(x), layer.base_linear()

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    options = {"init_lora_weights": method, "residual": residual, "device": device}
    loaded = LoRALinear(48, 40, r=8, lora_alpha=16, **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), y)
        assert torch.equal(other.base_linear().weight, base.weight)
        with torch.no_grad():
            other.lora_A.zero_()
    assert torch.equal(layer(x), y)  # nothing was shared


def test_state_dict_is_tensors_only(tmp_path, device):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, _ = make(device=device)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = LoRALinear(48, 40, r=8, lora_alpha=16, device=device)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(2, 48).to(device)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.base_linear().weight, layer.base_linear().weight)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_moves_to_another_dtype(residual, device):
    layer, original = make(residual=residual, device=device)
    layer.to(torch.bfloat16)
    x = torch.randn(4, 48).to(device, torch.bfloat16)
    y = original.to(torch.bfloat16)(x)
    # A and B are now bfloat16 too: three rounded factors of a product larger than W.
    close(layer(x), y, torch.bfloat16, 16)
    close(layer.base_linear().weight, original.weight, torch.bfloat16, 4)


def test_moves_to_a_device(device):
    layer, original = make(device="cpu")
    layer.to(device)
    x = torch.randn(4, 48)
    close(layer(x.to(device)).cpu(), original(x), torch.float32, 64)
    layer.adapter_enabled = False
    close(layer(x.to(device)).cpu(), original(x), torch.float32, 64)


def test_construct_without_a_linear(device):
    options = {"dtype": torch.bfloat16, "device": device}
    layer = LoRALinear(48, 40, bias=False, r=4, lora_alpha=8, **options)
    assert layer.bias is None and layer.scaling == 2.0
    assert layer(torch.randn(2, 48).to(device, torch.bfloat16)).shape == (2, 40)


def test_stands_in_for_nn_linear(device):
    layer, original = make(device=device)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (48, 40)
    assert layer.weight.shape == original.weight.shape and layer.bias is not None
    assert "r=8" in repr(layer) and "scaling=2" in repr(layer)


def test_training_flag_and_bias_are_kept(device):
    linear = nn.Linear(8, 8, bias=False).to(device).eval()
    layer = LoRALinear.from_linear(linear, r=2)
    assert not layer.training and layer.bias is None
    assert not layer.to_linear().training


@pytest.mark.parametrize(
    "alpha,rs,want", [(16, False, 2), (16, True, 16 / 8**0.5), (1, False, 1 / 8)]
)
def test_scaling(alpha, rs, want, device):
    layer, _ = make(lora_alpha=alpha, use_rslora=rs, device=device)
    assert layer.scaling == pytest.approx(want) and isinstance(layer.scaling, float)


def test_scaling_enters_the_subtraction_and_not_beta(device):
    one, original = make(lora_alpha=8, device=device)
    two = LoRALinear.from_linear(copy.deepcopy(original), r=8, lora_alpha=32)
    assert torch.equal(one.lora_A, two.lora_A) and torch.equal(one.lora_B, two.lora_B)
    x = torch.randn(3, 48).to(device)
    close(two(x), original(x), torch.float32, 32)


def test_initializer_objects_and_names(device):
    linear = nn.Linear(48, 40).to(device)
    a = LoRALinear.from_linear(copy.deepcopy(linear), r=4, init_lora_weights=LoRA(seed=3))
    b = LoRALinear.from_linear(copy.deepcopy(linear), r=4, init_lora_weights=LoRA(seed=3))
    assert torch.equal(a.lora_A, b.lora_A) and (a.lora_B == 0).all()
    c = LoRALinear.from_linear(copy.deepcopy(linear), r=4, init_lora_weights=LoRAM())
    d = LoRALinear.from_linear(copy.deepcopy(linear), r=4, init_lora_weights="LoRAM")
    assert torch.equal(c.lora_A, d.lora_A)


class TestDropout:
    def test_off_when_it_does_not_train(self, device):
        layer, _ = make(lora_dropout=0.5, device=device)
        x = torch.randn(4, 48).to(device)
        layer.eval()
        state = rng_state(device)
        assert torch.equal(layer(x), layer(x))
        assert torch.equal(rng_state(device), state)

    def test_follows_manual_seed(self, device):
        layer, _ = make(lora_dropout=0.5, device=device)
        x = torch.randn(4, 48).to(device)
        torch.manual_seed(1)
        first, second = layer(x), layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first) and not torch.equal(first, second)

    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_expectation_is_the_layer_without(self, residual, device):
        layer, _ = make(residual=residual, lora_dropout=0.5, dtype=torch.float64, device=device)
        x = torch.randn(1, 48, dtype=torch.float64).to(device).expand(20000, 48)
        mean = layer(x).mean(0)
        spread = layer(x).std(0) / 20000**0.5
        layer.eval()
        assert ((mean - layer(x[:1])[0]).abs() <= 5 * spread).all()


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(residual, reentrant, device):
    layer, _ = make(residual=residual, lora_dropout=0.3, device=device)
    x = torch.randn(6, 48).to(device).requires_grad_()
    grads = []
    for run in (layer, lambda v: checkpoint(layer, v, use_reentrant=reentrant)):
        torch.manual_seed(5)
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        grads.append([x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(enabled, device):
    layer, _ = make(device=device)
    layer.adapter_enabled = enabled
    x = torch.randn(4, 48).to(device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    if enabled:
        assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile(residual, dropout, device):
    layer, _ = make(residual=residual, lora_dropout=dropout, device=device)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 48).to(device)
    y = compiled(x)
    y.sum().backward()
    assert layer.lora_A.grad is not None
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


def test_compiles_switched_off(device):
    layer, original = make(device=device)
    layer.adapter_enabled = False
    x = torch.randn(4, 48).to(device)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), original(x))


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 3, 48)])
def test_shapes_of_x(shape, device):
    layer, _ = make(device=device)
    assert layer(torch.randn(*shape).to(device)).shape == (*shape[:-1], 40)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48)])
def test_output_can_be_written_in_place(shape, device):
    layer, _ = make(residual="implicit", device=device)
    y = layer(torch.randn(*shape).to(device))
    y += 1
    nn.functional.relu_(y).sum().backward()
    assert layer.lora_A.grad is not None


def test_a_weight_is_absorbed_once(device):
    linear = nn.Linear(48, 40).to(device)
    first = LoRALinear.from_linear(linear, r=4)
    before = linear.weight.detach().clone()
    for residual in RESIDUALS:
        with pytest.raises(ValueError, match="another adapter's initial factors were already"):
            LoRALinear.from_linear(linear, r=4, residual=residual)
    assert torch.equal(linear.weight, before)
    LoRALinear.from_linear(first.base_linear(), r=4)
    shared = nn.Linear(48, 40).to(device)  # many adapters on one base need implicit
    x = torch.randn(2, 48).to(device)
    y = shared(x)
    for _ in range(2):
        layer = LoRALinear.from_linear(shared, r=4, residual="implicit")
        close(layer(x), y, torch.float32, 32)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make_linear,match",
    [
        (lambda: Doubling(8, 8), "Doubling does not compute"),
        (lambda: nn.MultiheadAttention(8, 2).out_proj, "NonDynamicallyQuantizable"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "parametrization"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), "parametrization"),
    ],
)
def test_linears_that_are_none(make_linear, match):
    linear = make_linear()
    before = linear.weight.detach().clone()
    with pytest.raises(TypeError, match=match):
        LoRALinear.from_linear(linear, r=2)
    assert torch.equal(linear.weight, before)


def test_another_scaling_does_not_load(device):
    layer, _ = make(lora_alpha=16, device=device)
    other = LoRALinear(48, 40, r=8, lora_alpha=8, device=device)
    with pytest.raises(ValueError, match=r"absorbed its start with scaling 2, this one has 1"):
        other.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("method", ["pissa", "olora", "init_ab"])
@pytest.mark.parametrize("saved,built", [("absorb", "implicit"), ("implicit", "absorb")])
def test_another_residual_does_not_load(saved, built, method, device):
    """The keys are the same; the initial factors would be missing, or subtracted twice."""
    layer, _ = make(method, saved, device=device)
    other, _ = make(method, built, device=device)
    with pytest.raises(ValueError, match=f"has residual='{saved}', this one '{built}'"):
        other.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("method", ["lora", "lora_xs"])
@pytest.mark.parametrize("saved,built", [("absorb", "implicit"), ("implicit", "absorb")])
def test_what_subtracts_nothing_loads_into_either(saved, built, method, device):
    layer, _ = make(method, saved, device=device)
    other, _ = make(method, built, device=device)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 48).to(device)
    assert torch.equal(other(x), layer(x))


def test_the_base_does_not_move_with_the_scaling(device):
    layer, original = make(device=device)
    layer.scaling *= 3
    close(layer.base_linear().weight, original.weight, torch.float32, 4)


def test_numbers_of_numpy(device):
    np = pytest.importorskip("numpy")
    layer, _ = make(r=np.int64(4), lora_alpha=np.float32(8), device=device)
    assert layer.r == 4 and layer.scaling == 2.0 and type(layer.scaling) is float


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.sanitize
def test_rank_one_trains(residual, device):
    layer, _ = make(residual=residual, r=1, device=device)
    layer(torch.randn(4, 48).to(device)).square().sum().backward()
    assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("view", [lambda w: w.T.contiguous().T, lambda w: torch.cat([w, w])[::2]])
def test_strided_weight(view, device):
    linear = nn.Linear(48, 40).to(device)
    linear.weight.data = view(linear.weight.data)
    original = copy.deepcopy(linear)
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight.stride() == original.weight.stride() or layer.weight is linear.weight
    x = torch.randn(3, 48).to(device)
    close(layer(x), original(x), torch.float32, 32)


@pytest.mark.parametrize(
    "kwargs,error,match",
    [
        ({"r": 0}, ValueError, "at least 1"),
        ({"r": 41}, ValueError, r"rank 41 is larger than min\(n, m\) = 40"),
        ({"r": 4.0}, TypeError, "integer"),
        ({"r": True}, TypeError, "integer"),
        ({"lora_alpha": 0}, ValueError, "positive"),
        ({"lora_alpha": -1}, ValueError, "positive"),
        ({"lora_alpha": float("nan")}, ValueError, "finite"),
        ({"lora_alpha": float("inf")}, ValueError, "finite"),
        ({"lora_alpha": "16"}, TypeError, "number"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"lora_dropout": "0.1"}, TypeError, "lora_dropout must be a number, got str"),
        ({"lora_dropout": None}, TypeError, "lora_dropout must be a number, got NoneType"),
        ({"init_lora_weights": "lorm"}, ValueError, "did you mean 'loram'"),
        ({"init_lora_weights": "zzz"}, ValueError, "expected one of .*lora.*loram"),
        ({"init_lora_weights": 3}, TypeError, "name or an Initializer"),
        ({"residual": "absorbed"}, ValueError, "did you mean 'absorb'"),
    ],
)
def test_bad_options_change_nothing(kwargs, error, match, device):
    linear = nn.Linear(48, 40).to(device)
    before = linear.weight.detach().clone()
    with pytest.raises(error, match=match):
        LoRALinear.from_linear(linear, **kwargs)
    assert torch.equal(linear.weight, before)
    assert linear.weight.requires_grad and linear.bias.requires_grad


@pytest.mark.parametrize("bad", ["zero", "nan", "inf"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_bad_weights_change_nothing(bad, residual, device):
    linear = nn.Linear(48, 40).to(device)
    with torch.no_grad():
        if bad == "zero":
            linear.weight.zero_()
        else:
            linear.weight[39, 47] = float(bad)
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match=r"NaN or Inf|zero"):
        LoRALinear.from_linear(linear, r=4, residual=residual)
    assert torch.equal(linear.weight.nan_to_num(9.0), before.nan_to_num(9.0))


def test_weights_that_cannot_be_absorbed():
    linear = nn.Linear(48, 40)
    linear.weight = nn.Parameter(torch.ones(40, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"int8.*dequantize"):
        LoRALinear.from_linear(linear, r=4)
    with pytest.raises(ValueError, match="meta"):
        LoRALinear.from_linear(nn.Linear(48, 40, device="meta"), r=4)
    with pytest.raises(TypeError, match="Embedding"):
        LoRALinear.from_linear(nn.Embedding(4, 4), r=2)
    layer = LoRALinear.from_linear(nn.Linear(48, 40), r=4)
    with pytest.raises(TypeError, match="adapted already"):
        LoRALinear.from_linear(layer, r=4)


PEAK = """
import sys, threading
import psutil, torch
from torch import nn
from lora_kernels import LoRALinear
LoRALinear(64, 64, r=4)  # what the first call loads
dtype, layout = getattr(torch, sys.argv[1]), sys.argv[2]
linear = nn.Linear(8192, 8192, bias=False, dtype=dtype)
if layout == "transposed":
    linear.weight.data = linear.weight.data.T.contiguous().T
elif layout == "strided":
    linear.weight.data = torch.cat([linear.weight.data] * 2)[::2]
resident = psutil.Process().memory_info
before, peak, done = resident().rss, 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, resident().rss)
watcher = threading.Thread(target=watch)
watcher.start()
layer = LoRALinear.from_linear(linear, r=8)
done.set()
watcher.join()
print((max(peak, resident().rss) - before) / (8192 * 8192 * dtype.itemsize))
"""


@pytest.mark.parametrize(
    ("layout", "dtype"), paired(["contiguous", "transposed", "strided"], ["float32", "bfloat16"])
)
def test_absorbing_holds_no_second_copy(dtype, layout):
    """The process grows by A and B, and never by a tenth of W."""
    command = [sys.executable, "-c", PEAK, dtype, layout]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert float(done.stdout) < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_absorbing_holds_no_second_copy_on_a_gpu(dtype, layout):
    linear = nn.Linear(8192, 8192, bias=False, dtype=dtype, device="cuda")
    if layout == "transposed":
        linear.weight.data = linear.weight.data.T.contiguous().T
    elif layout == "strided":
        linear.weight.data = torch.cat([linear.weight.data] * 2)[::2]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    LoRALinear.from_linear(linear, r=8)
    growth = torch.cuda.max_memory_allocated() - before
    assert growth < 0.1 * linear.weight.numel() * dtype.itemsize
