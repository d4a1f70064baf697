"""LoftQ: the alternation against float64 NumPy, the quantizers against bitsandbytes."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import LoftQ, Start, get_initializer
from lora_kernels.init.quantizers import quantized
from lora_kernels.layers.base import base_of
from lora_kernels.model.originals import OriginalWeights

from ..support.oracle import ROUNDING, to_numpy
from ..support.packages import needs_bitsandbytes, needs_peft, needs_real_model, needs_safetensors
from ..support.quantized import linear_4bit, linear_8bit, quantize_4bit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def best(matrix: np.ndarray, r: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def alternation(W: np.ndarray, r: int, iterations: int, quantize=quantize_4bit):
    """Algorithm 1: [(Q_t, s·B_tA_t)] in float64."""
    steps, low_rank = [], np.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        low_rank = best(W - Q, r)
        steps.append((Q, low_rank))
    return steps


def error_of(layer: LoRALinear, W: np.ndarray) -> float:
    """‖W − Q − s·BA‖ / ‖W‖."""
    product = layer.scaling * to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
    return np.linalg.norm(W - to_numpy(layer.weight) - product) / np.linalg.norm(W)


def start_of(module: nn.Module, original: torch.Tensor, **options) -> Start:
    """Rank 8 and s = 2, for a quantized layer."""
    base = base_of(module).weight()
    return LoftQ(**options).toward(lambda: original)(base, 8, 2.0)


def adapted(linear: nn.Linear, **options) -> LoRALinear:
    options = {"r": 8, "lora_alpha": 16, **options}  # s = 2
    initializer = LoftQ(**{k: options.pop(k) for k in list(options) if k in LoftQ.__match_args__})
    return LoRALinear.from_linear(copy.deepcopy(linear), init_lora_weights=initializer, **options)


class TestAlternation:
    @pytest.mark.parametrize("quantizer", ["nf4", "fp4"])
    @pytest.mark.parametrize("iterations", [1, 2, 5])
    def test_oracle(self, iterations, quantizer, device):
        """An entry within float32's rounding of halfway between two codes may get either, and later
        iterations then differ a little. Compared are the errors, and nearly all codes.
        """
        linear = nn.Linear(128, 96).to(device)
        W = to_numpy(linear.weight)
        options = {"iterations": iterations, "quantizer": quantizer, "method": "exact"}
        layer = adapted(linear, **options)
        Q, product = alternation(W, 8, iterations, lambda X: quantize_4bit(X, quantizer))[-1]
        other = np.abs(to_numpy(layer.weight) - Q) > 1e-4 * np.abs(W).max()
        assert other.mean() <= (iterations - 1) * 2e-4
        want = np.linalg.norm(W - Q - product) / np.linalg.norm(W)
        assert error_of(layer, W) == pytest.approx(want, rel=1e-5 if not other.any() else 1e-3)
        A, B = to_numpy(layer.lora_A), to_numpy(layer.lora_B)
        # Half of each σ on either side.
        assert np.linalg.norm(A, axis=1) == pytest.approx(np.linalg.norm(B, axis=0), rel=1e-5)

    def test_the_randomized_svd_does_as_well(self, device):
        linear = nn.Linear(300, 200).to(device)
        W = to_numpy(linear.weight)
        exact = error_of(adapted(linear, method="exact"), W)
        assert error_of(adapted(linear), W) <= 1.01 * exact

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_error_falls(self, dtype, device):
        """The first iteration already beats the quantizer alone, and nearly every further one
        improves where r is small beside W's sizes (at r = 64 of 192 the oracle's error too rises
        from the third on).
        """
        linear = nn.Linear(256, 192, dtype=dtype).to(device)
        W = to_numpy(linear.weight)
        plain = np.linalg.norm(W - to_numpy(quantized(linear.weight))) / np.linalg.norm(W)
        errors = [error_of(adapted(linear, iterations=t, r=8), W) for t in (1, 2, 3, 5)]
        assert errors[0] < 0.95 * plain
        assert all(b <= 1.002 * a for a, b in pairwise(errors))
        assert errors[-1] < 0.95 * errors[0]

    def test_deterministic_and_no_global_randomness(self, device):
        linear = nn.Linear(128, 96).to(device)
        state = torch.get_rng_state()
        first, second = adapted(linear), adapted(linear)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.lora_A, second.lora_A)

    @pytest.mark.parametrize("name", ["loftq", "LoftQ"])
    def test_name(self, name):
        assert get_initializer(name) == LoftQ(quantizer="nf4", iterations=5)

    @needs_real_model
    def test_real_weights(self, real_linears, device):
        for linear in real_linears:
            ours = copy.deepcopy(linear).to(device)
            W = to_numpy(linear.weight)
            layer = adapted(ours, r=16, lora_alpha=16)
            want = [
                np.linalg.norm(W - Q - product) / np.linalg.norm(W)
                for Q, product in alternation(W, 16, 5)
            ]
            assert error_of(layer, W) <= 1.01 * want[-1] < want[0]


class TestBase:
    """What W becomes, and what the layer computes without its adapter."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("quantizer", ["nf4", "fp4", "int8"])
    def test_quantizing_it_again_changes_nothing(self, quantizer, dtype, device):
        layer = adapted(nn.Linear(128, 96, dtype=dtype).to(device), quantizer=quantizer)
        again = quantized(layer.weight, quantizer)
        assert layer.weight.dtype == dtype
        if quantizer == "int8" and dtype in (torch.float64, torch.float32):
            # 127 c / 127 is c up to float32's rounding.
            assert (again - layer.weight).norm() <= 4 * ROUNDING[torch.float32] * again.norm()
        else:
            assert torch.equal(again.to(dtype), layer.weight)

    @needs_bitsandbytes
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_bitsandbytes_makes_the_same_of_it(self, dtype):
        """After saving, loading and quantizing by bitsandbytes, the base is the one that was
        trained on.
        """
        layer = adapted(nn.Linear(128, 96, dtype=dtype))
        loaded = nn.Linear(128, 96, dtype=dtype)
        loaded.load_state_dict(layer.state_dict(), strict=False)
        theirs = base_of(linear_4bit(loaded)).weight()
        assert torch.equal(theirs.to(dtype), layer.weight)

    def test_without_the_adapter(self, device):
        """The layer computes W to the quantization error, also after training and from a file."""
        linear = nn.Linear(128, 96).to(device)
        layer = adapted(linear)
        W = to_numpy(linear.weight)
        want = to_numpy(layer.weight) + 2 * to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
        loaded = adapted(nn.Linear(128, 96).to(device))
        with torch.no_grad():
            layer.lora_A.mul_(2)
        loaded.load_state_dict(layer.state_dict())
        x = torch.randn(4, 128).to(device)
        assert torch.equal(loaded(x), layer(x))
        for one in (layer, loaded):
            base = to_numpy(one.base_linear().weight)
            assert np.abs(base - want).max() <= 1e-6
            assert 0 < np.linalg.norm(base - W) < 0.1 * np.linalg.norm(W)
            one.adapter_enabled = False
            assert np.abs(to_numpy(one(x) - linear(x))).max() < 0.5
            one.adapter_enabled = True

    def test_any_function(self, device):
        linear = nn.Linear(64, 48).to(device)

        def rounded(weight):
            return (weight * 64).round() / 64

        layer = adapted(linear, quantizer=rounded)
        assert torch.equal(rounded(layer.weight), layer.weight)
        W = to_numpy(linear.weight)
        Q, product = alternation(W, 8, 5, lambda X: np.round(X * 64) / 64)[-1]
        assert error_of(layer, W) == pytest.approx(
            np.linalg.norm(W - Q - product) / np.linalg.norm(W), rel=1e-2
        )


class TestQuantizers:
    @needs_bitsandbytes
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    @pytest.mark.parametrize("shape", [(96, 128), (33, 64), (64, 576), (7, 31), (10, 50), (3, 5)])
    def test_bits_of_bitsandbytes(self, shape, name, dtype):
        """Its codes times its scales, in blocks of consecutive entries across rows; the last one is
        shorter.
        """
        import bitsandbytes.functional as bnb

        weight = torch.randn(shape).to(dtype) * torch.logspace(-3, 2, shape[0])[:, None].to(dtype)
        weight[0, :3] = 0
        codes, state = bnb.quantize_4bit(weight, quant_type=name)
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)[: weight.numel()]
        scales = state.absmax.repeat_interleave(64)[: weight.numel()]
        want = (state.code[codes.long()] * scales).view(shape)
        assert torch.equal(quantized(weight, name), want)

    @needs_bitsandbytes
    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    def test_zeros_and_ties(self, name):
        import bitsandbytes.functional as bnb

        codes = bnb.get_4bit_type(name, device="cpu").sort().values
        halfway = (codes[:-1] + codes[1:]) / 2
        weight = torch.zeros(4, 64)
        weight[1, : len(halfway)], weight[1, -1] = halfway, 1.0
        weight[2, : len(halfway)], weight[2, -1] = -3 * halfway, 3.0
        weight[3] = 1e-42
        packed, state = bnb.quantize_4bit(weight, quant_type=name)
        assert torch.equal(quantized(weight, name), bnb.dequantize_4bit(packed, state))

    @needs_bitsandbytes
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_int8_of_bitsandbytes(self, dtype):
        linear = nn.Linear(96, 40, dtype=dtype)
        assert torch.equal(quantized(linear.weight, "int8"), base_of(linear_8bit(linear)).weight())

    def test_oracle_without_bitsandbytes(self, device):
        weight = torch.randn(40, 96).to(device)
        W = to_numpy(weight)
        for name in ("nf4", "fp4"):
            want = quantize_4bit(W, name)
            assert np.abs(to_numpy(quantized(weight, name)) - want).max() <= 1e-6
        row = np.abs(W).max(axis=1, keepdims=True)
        assert (np.abs(to_numpy(quantized(weight, "int8")) - W) <= (0.501 / 127 + 1e-3) * row).all()

    @pytest.mark.parametrize(
        "quantizer,error,match",
        [
            ("nf5", ValueError, "unknown quantizer 'nf5': .*did you mean 'nf4'"),
            (4, TypeError, "quantizer must be a name or a function"),
            (lambda W: W[:2], ValueError, r"returned shape \[2, 64\] for a weight \[48, 64\]"),
            (lambda W: W.to(torch.int8), TypeError, "must return a float tensor.*int8"),
            (lambda W: None, TypeError, "must return a float tensor.*NoneType"),
            (lambda W: W * torch.nan, ValueError, "the quantizer returned NaN or Inf"),
        ],
    )
    def test_bad(self, quantizer, error, match, device):
        linear = nn.Linear(64, 48).to(device)
        before = linear.weight.detach().clone()
        with pytest.raises(error, match=match):
            LoRALinear.from_linear(linear, r=4, init_lora_weights=LoftQ(quantizer=quantizer))
        assert torch.equal(linear.weight, before)


class TestErrors:
    @pytest.mark.parametrize(
        "options,error,match",
        [
            ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
            ({"iterations": 1.5}, TypeError, "iterations must be an integer"),
            ({"method": "exat"}, ValueError, "did you mean 'exact'"),
            ({"seed": "1"}, TypeError, "seed must be an integer"),
        ],
    )
    def test_options(self, options, error, match):
        with pytest.raises(error, match=match):
            LoftQ(**options)

    def test_implicit_makes_no_sense(self, device):
        linear = nn.Linear(64, 48).to(device)
        before = linear.weight.detach().clone()
        options = {"r": 4, "init_lora_weights": "loftq", "residual": "implicit"}
        with pytest.raises(ValueError, match=r"LoftQ goes .* float weight .*residual='absorb'"):
            LoRALinear.from_linear(linear, **options)
        assert torch.equal(linear.weight, before)

    @pytest.mark.parametrize(
        "change,match",
        [
            (lambda W: W.mul_(torch.nan), "weight holds NaN or Inf"),
            (lambda W: W.zero_(), r"quantization error W − Q is zero: LoftQ would start at zero"),
            (lambda W: W.copy_(quantized(W)), r"quantization error W − Q is zero"),
            (lambda W: W[1:].zero_(), r"W − Q has numerical rank 1, less than r = 4"),
        ],
    )
    def test_weights(self, change, match, device):
        linear = nn.Linear(64, 48).to(device)
        with torch.no_grad():
            change(linear.weight)
        before = linear.weight.detach().clone()
        with pytest.raises(ValueError, match=match):
            LoRALinear.from_linear(linear, r=4, init_lora_weights="loftq")
        assert torch.equal(linear.weight.nan_to_num(), before.nan_to_num())


class TestQuantizedBase:
    """Q is fixed: s·BA is the best approximation of W − Q of rank r."""

    @needs_bitsandbytes
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_oracle(self, dtype, nested):
        linear = nn.Linear(128, 96, dtype=dtype)
        module = linear_4bit(linear, nested=nested)
        before = module.weight.data.clone()
        start = start_of(module, linear.weight, method="exact")
        assert torch.equal(module.weight.data, before)
        assert start.lora_A.dtype == start.lora_B.dtype == torch.float32
        want = best(to_numpy(linear.weight) - to_numpy(base_of(module).weight()), 8)
        got = 2 * to_numpy(start.lora_B) @ to_numpy(start.lora_A)
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)

    @needs_bitsandbytes
    def test_as_good_as_the_first_iteration(self):
        """One iteration quantizes W itself, just as loading a quantized model does."""
        linear = nn.Linear(128, 96)
        start = start_of(linear_4bit(linear), linear.weight, method="exact")
        layer = adapted(linear, iterations=1, method="exact")
        torch.testing.assert_close(start.lora_A, layer.lora_A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(start.lora_B, layer.lora_B, rtol=1e-4, atol=1e-5)

    @needs_bitsandbytes
    def test_nothing_to_make_up_for(self):
        module = linear_4bit(nn.Linear(128, 96))
        with pytest.raises(ValueError, match=r"W − Q is zero: LoftQ would start at zero"):
            start_of(module, base_of(module).weight())
        with pytest.raises(ValueError, match=r"shape \[96, 64\], this one \[96, 128\]"):
            start_of(module, torch.ones(96, 64))


class TestOriginals:
    def test_dict(self):
        base, weight = base_of(nn.Linear(5, 3)), torch.randn(3, 5)
        for source in ({"a.q.weight": weight, "b.q.weight": weight + 1}, {"a.q": weight}):
            assert torch.equal(OriginalWeights(source).weight("a.q", base), weight)

    def test_another_prefix(self):
        """The checkpoint of a model without its head, or with it."""
        base, weight = base_of(nn.Linear(5, 3)), torch.randn(3, 5)
        stored = OriginalWeights({"layers.0.q.weight": weight, "layers.1.q.weight": weight + 1})
        assert torch.equal(stored.weight("model.layers.0.q", base), weight)
        stored = OriginalWeights({"model.layers.0.q.weight": weight})
        assert torch.equal(stored.weight("layers.0.q", base), weight)
        stored = OriginalWeights({"a.q.weight": weight, "b.q.weight": weight})
        with pytest.raises(ValueError, match=r"several .* 'q'.*: a\.q\.weight, b\.q\.weight"):
            stored.weight("q", base)

    def test_errors(self, tmp_path):
        base = base_of(nn.Linear(5, 3))
        with pytest.raises(ValueError, match=r"no weight of 'a\.q'; did you mean 'a\.k\.weight'"):
            OriginalWeights({"a.k.weight": torch.ones(3, 5)}).weight("a.q", base)
        with pytest.raises(ValueError, match=r"'q' is \[5, 3\], the layer 'q' is \[3, 5\]"):
            OriginalWeights({"q": torch.ones(5, 3)}).weight("q", base)
        with pytest.raises(TypeError, match=r"q has dtype torch\.uint8"):
            OriginalWeights({"q": torch.ones(3, 5).byte()}).weight("q", base)
        with pytest.raises(TypeError, match="dict of tensors or the path of a checkpoint, got int"):
            OriginalWeights(3)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            OriginalWeights(tmp_path / "none")

    @needs_safetensors
    def test_checkpoint(self, tmp_path):
        from safetensors.torch import save_file

        tensors = {"model.q.weight": torch.randn(3, 5), "model.k.weight": torch.randn(3, 5)}
        save_file(tensors, tmp_path / "model.safetensors")
        got = OriginalWeights(str(tmp_path)).weight("model.q", base_of(nn.Linear(5, 3)))
        assert torch.equal(got, tensors["model.q.weight"])


@needs_peft
@needs_bitsandbytes
@pytest.mark.parametrize("iterations", [1, 5])
def test_no_worse_than_peft(iterations, monkeypatch):
    """PEFT's `loftq_init` at the same number of iterations. It asks for CUDA by name; the
    arithmetic here is the CPU's.
    """
    from peft.utils import loftq_utils

    to = torch.Tensor.to

    def on_cpu(tensor, *args, **kwargs):
        args = tuple("cpu" if str(arg) == "cuda" else arg for arg in args)
        kwargs = {k: "cpu" if str(v) == "cuda" else v for k, v in kwargs.items()}
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", on_cpu)
    linear = nn.Linear(256, 192)
    W = to_numpy(linear.weight)
    Q, A, B = loftq_utils.loftq_init(linear.weight, 4, 16, iterations)
    monkeypatch.undo()
    theirs = np.linalg.norm(W - to_numpy(Q) - to_numpy(B) @ to_numpy(A)) / np.linalg.norm(W)
    options = {"r": 16, "iterations": iterations}
    # 1 %: a randomized SVD against LAPACK's. Exact against exact: equal except for ties.
    assert error_of(adapted(linear, **options), W) <= 1.01 * theirs
    assert error_of(adapted(linear, method="exact", **options), W) <= 1.0001 * theirs
