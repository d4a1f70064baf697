"""Quantized layers: recognized, dequantized, differentiated; sharded ones raise an error."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.prune import random_unstructured

from lora_kernels import LoRALinear
from lora_kernels.layers.base import base_of
from lora_kernels.layers.dequantize import frozen_forward, passes_gradient
from lora_kernels.layers.kinds import FLOAT8, kind_of, refuse_sharded

from ..support.oracle import ROUNDING, to_numpy
from ..support.packages import needs_bitsandbytes, needs_torchao, needs_transformers
from ..support.quantized import ForInference, OnlyForward, linear_4bit, linear_8bit, quantize_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def torchao_linear(linear: nn.Linear, kind: str) -> nn.Linear:
    import torchao.quantization as ao

    configs = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }
    model = nn.Sequential(linear)
    ao.quantize_(model, configs[kind]())
    return model[0]


def unchanged(module: nn.Module):
    """Returns a check that tensors, attributes and bits are still the same."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kept = {name: id(value) for name, value in vars(module).items()}

    def check() -> None:
        assert {name: id(value) for name, value in vars(module).items()} == kept
        after = module.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    return check


class TestKinds:
    def test_float_layers(self):
        assert kind_of(nn.Linear(3, 4)) == "linear"
        assert kind_of(nn.Linear(3, 4, dtype=torch.float16, device="meta")) == "linear"
        parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        pruned = random_unstructured(nn.Linear(3, 4), "weight", 0.5)
        odd = nn.MultiheadAttention(4, 1).out_proj
        norm = nn.LayerNorm(3)
        assert kind_of(odd) == "attention_out"
        computed = (parametrized, pruned, norm, nn.Bilinear(2, 3, 4), nn.EmbeddingBag(3, 4))
        for module in (*computed, LoRALinear(8, 8), nn.Sequential(nn.Linear(3, 4))):
            assert kind_of(module) is None
        assert kind_of(nn.Embedding(3, 4)) == "embedding"

    @needs_transformers
    def test_conv1d(self):
        from transformers.pytorch_utils import Conv1D

        module = Conv1D(5, 3)
        assert kind_of(module) == "conv1d" and base_of(module).shape == (5, 3)
        weight = base_of(module).weight()
        assert weight.data_ptr() == module.weight.data_ptr()
        assert torch.equal(weight, module.weight.T) and not weight.requires_grad

    @needs_bitsandbytes
    def test_bitsandbytes(self):
        assert kind_of(linear_4bit(nn.Linear(64, 32))) == "bnb_4bit"
        assert kind_of(linear_8bit(nn.Linear(64, 32))) == "bnb_8bit"

    @needs_torchao
    def test_torchao(self):
        assert kind_of(torchao_linear(nn.Linear(64, 32), "int8")) == "torchao"

    @needs_transformers
    @pytest.mark.parametrize("dtype", FLOAT8)
    def test_float8(self, dtype):
        from transformers.pytorch_utils import Conv1D

        for module in (nn.Linear(3, 5), Conv1D(5, 3)):
            module.to(dtype)
            base = base_of(module)
            assert (base.kind, base.shape, base.rewritable) == ("float8", (5, 3), False)
            stored = module.weight.float()
            assert torch.equal(base.weight(), stored.T if base.transposed else stored)
        replaced = nn.Linear(3, 5).to(dtype)
        replaced.forward = lambda x: x  # perhaps with scales of its own
        assert kind_of(replaced) == "forward"

    def test_only_a_forward(self):
        module = OnlyForward(torch.randn(5, 3), None, torch.float32)
        assert kind_of(module) == "forward" and base_of(module).shape == (5, 3)

        class Wrapper(nn.Module):
            """Like PEFT's layers."""

            def __init__(self, base_layer: nn.Module) -> None:
                super().__init__()
                self.base_layer, self.in_features, self.out_features = base_layer, 3, 5

        assert kind_of(Wrapper(module)) is None and kind_of(Wrapper(nn.Linear(3, 5))) is None

    def test_no_codes(self):
        """A layer that only has the sizes of a linear layer is not one."""

        class Fourier(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features = 3, 5
                self.register_buffer("frequencies", torch.randn(5, 3))

            def forward(self, x):
                return (x @ self.frequencies.T).sin()

        assert kind_of(Fourier()) is None

    def test_others_have_no_base(self):
        assert kind_of(nn.LayerNorm(3)) is None and base_of(nn.LayerNorm(3)) is None

    def test_adapted_layers_keep_their_kind(self):
        linear = nn.Linear(3, 5)
        layer = LoRALinear.from_linear(linear, r=2, residual="implicit")
        base = base_of(layer)
        assert (base.kind, base.shape, base.rewritable) == ("linear", (5, 3), True)
        assert torch.equal(base.weight(), linear.weight) and base.module is layer

    def test_no_package_is_imported(self):
        """Each takes seconds to import, and may be broken on machines that do not need it."""
        code = """
import sys
import torch
from lora_kernels.layers.base import base_of
from lora_kernels.layers.kinds import kind_of
from tests.support.quantized import OnlyForward
for module in (torch.nn.Linear(3, 4), OnlyForward(torch.ones(4, 3), None, torch.float32)):
    kind_of(module), base_of(module).weight()
assert not {"bitsandbytes", "torchao", "transformers"} & sys.modules.keys()
"""
        subprocess.run([sys.executable, "-c", code], check=True)


class TestDequantizedWeight:
    def test_float(self):
        linear = nn.Linear(3, 4, dtype=torch.bfloat16)
        weight = base_of(linear).weight()
        assert weight.data_ptr() == linear.weight.data_ptr() and not weight.requires_grad

    @needs_bitsandbytes
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_4bit(self, dtype, quant_type):
        """QLoRA's formula in float64. Only rows of whole blocks: for other sizes bitsandbytes 0.50
        misplaces the scales on a CPU.
        """
        linear = nn.Linear(128, 40, dtype=dtype)
        want = quantize_4bit(to_numpy(linear.weight), quant_type)
        module = linear_4bit(linear, quant_type=quant_type)
        check = unchanged(module)
        got = base_of(module).weight()
        check()
        assert got.dtype == torch.float32  # the codes' product is not rounded to 16 bits
        assert base_of(module).dtype == dtype and base_of(module).device.type == "cpu"
        noise = 4 * ROUNDING[torch.float32]  # 1 / absmax, the product, the code, the product
        W, got = to_numpy(linear.weight), to_numpy(got)
        other = np.abs(got - want) > noise * np.abs(want)
        # 16-bit entries are sometimes halfway between two codes.
        assert other.mean() < (0.001 if dtype == torch.float32 else 0.05)
        largest = np.repeat(np.abs(W.reshape(-1, 64)).max(axis=1), 64).reshape(W.shape)
        assert (np.abs(np.abs(got - W) - np.abs(want - W)) <= noise * largest).all()

    @needs_bitsandbytes
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_double_quantization(self, dtype):
        """The scales are 8-bit codes over 256 blocks: bitsandbytes' own result, unrounded, and as
        near to W as it should be.
        """
        import bitsandbytes as bnb

        linear = nn.Linear(256, 96, dtype=dtype)
        module = linear_4bit(linear, nested=True)
        check = unchanged(module)
        got = base_of(module).weight()
        check()
        theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert got.dtype == torch.float32 and theirs.dtype == dtype
        assert torch.equal(got.to(dtype), theirs)
        plain = base_of(linear_4bit(linear)).weight()
        assert 0 < (got - plain).norm() < 0.02 * plain.norm()

    @needs_bitsandbytes
    @pytest.mark.parametrize("nested", [False, True])
    def test_4bit_after_inference(self, nested):
        """On a CPU with AVX512-BF16, the first forward in eval mode packs codes and scales. The
        dequantized weight is then the one that the packed layer multiplies with, rounded to
        bfloat16.
        """
        linear = nn.Linear(128, 64)
        module = linear_4bit(linear, nested=nested).eval()
        before = base_of(module).weight()
        with torch.no_grad():
            y = module(torch.eye(128)) - module.bias
        data = module.weight.data.clone()
        after = base_of(module).weight()
        assert torch.equal(module.weight.data, data)
        # Scale and product are rounded to bfloat16.
        assert ((after - before).abs() <= 3 * ROUNDING[torch.bfloat16] * before.abs()).all()
        # y rounds the sum with a bias to float32.
        torch.testing.assert_close(after.T, y, rtol=0, atol=2 * ROUNDING[torch.float32])

    @needs_bitsandbytes
    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_8bit(self, dtype, threshold):
        """round(127 W / max |row|) · max |row| / 127, before the first forward and after it, when
        bitsandbytes has moved the scales.
        """
        linear = nn.Linear(96, 40, dtype=dtype)
        # bitsandbytes first rounds the weight to float16.
        W = to_numpy(linear.weight.to(torch.float16))
        largest = np.abs(W).max(axis=1, keepdims=True)
        # In float16: an entry within its rounding (127 · 2⁻¹¹) of a tie may go either way.
        exact = W * (127 / largest)
        module = linear_8bit(linear, threshold)
        check = unchanged(module)
        got = base_of(module).weight()
        check()
        codes = to_numpy(got) * 127 / largest
        noise = 127 * ROUNDING[torch.float32] * 4
        assert np.abs(codes - codes.round()).max() <= noise
        assert np.abs(codes.round() - exact).max() <= 0.5 + 127 * ROUNDING[torch.float16]
        module(torch.randn(3, 96, dtype=dtype))
        assert module.weight.SCB is None and module.state.SCB is not None
        check = unchanged(module)
        assert torch.equal(base_of(module).weight(), got)
        check()

    @needs_torchao
    @pytest.mark.parametrize("kind", ["int8", "int8_dynamic", "int4"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torchao(self, dtype, kind):
        linear = nn.Linear(96, 40, dtype=dtype)
        W = to_numpy(linear.weight)
        module = torchao_linear(linear, kind)
        weight = module.weight
        got = base_of(module).weight()
        assert module.weight is weight and base_of(module).dtype == dtype
        assert got.dtype == torch.float32 and type(got) is torch.Tensor
        levels = 127.5 if kind != "int4" else 7.5
        step = np.abs(W).max(axis=1, keepdims=True) / levels
        # Half a step, and int4's asymmetric one where the largest is rounded down.
        slack = ROUNDING[dtype] * np.abs(W).max()
        assert (np.abs(to_numpy(got) - W) <= 1.01 * step + 3 * slack).all()
        if kind == "int8_dynamic":  # its forward rounds the identity
            return
        # By its forward: one rounding of the sum's dtype.
        y = module(torch.eye(96, dtype=dtype)) - module.bias
        assert (y.T.float() - got).abs().max() <= 4 * float(slack) + 2 * ROUNDING[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [None, 0.0, 300.0])
    def test_forward(self, bias, dtype):
        """W from the forward of the identity, in blocks; a large bias, as in some models, costs no
        bits of W.
        """
        linear = nn.Linear(600, 40)
        added = None if bias is None else torch.randn(40) * bias
        module = OnlyForward(linear.weight.detach(), added, dtype)
        check = unchanged(module)
        got = base_of(module).weight()
        check()
        assert got.dtype == torch.float32 and base_of(module).dtype == dtype
        want = module.oracle()
        assert (np.abs(to_numpy(got) - want) <= ROUNDING[dtype] * np.abs(want)).all()

    def test_a_constant_of_another_name(self):
        class Shifted(OnlyForward):
            def forward(self, x):
                return super().forward(x) + 1

        module = Shifted(torch.randn(8, 16), None, torch.float32)
        got = to_numpy(base_of(module).weight())
        assert np.abs(got - module.oracle()).max() <= 4 * ROUNDING[torch.float32] * 8

    @pytest.mark.parametrize("change", [torch.sin, torch.abs, lambda y: y * torch.nan])
    def test_not_linear(self, change):
        class Changed(OnlyForward):
            def forward(self, x):
                return change(super().forward(x))

        with pytest.raises(ValueError, match="Changed computes no linear function of its input"):
            base_of(Changed(torch.randn(8, 16), None, torch.float32)).weight()

    def test_hooks_do_not_see_the_identity(self):
        module = OnlyForward(torch.randn(8, 16), None, torch.float32)
        module.register_forward_hook(lambda *_: pytest.fail("the hook was called"))
        base_of(module).weight()

    def test_not_quantized_yet(self):
        class Wants3D(OnlyForward):
            def forward(self, x):
                raise RuntimeError("3-D only")

        with pytest.raises(ValueError, match=r"Wants3D does not take inputs \[n, 3\].*3-D only"):
            base_of(Wants3D(torch.randn(5, 3), None, torch.float32)).weight()

    @needs_bitsandbytes
    def test_bitsandbytes_not_quantized_yet(self):
        import bitsandbytes as bnb

        layers = (bnb.nn.Linear4bit(64, 32), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False))
        for layer in layers:
            with pytest.raises(ValueError, match=r"not quantized yet: .*model.to\(device\)"):
                base_of(layer).weight()


class TestGradient:
    """dL/dx = dL/dy · W, from the layer's own backward or from ours."""

    def check(self, module: nn.Module, passes: bool, noise: float) -> None:
        assert passes_gradient(module) == passes
        weight = to_numpy(base_of(module).weight())
        for shape in [(5,), (2, 3)]:
            x = torch.randn(*shape, module.in_features).requires_grad_()
            with torch.no_grad():
                want = module(x)
            y = frozen_forward(module, x, passes)
            assert torch.equal(y.detach(), want)
            dy = torch.randn_like(y)
            y.backward(dy)
            exact = to_numpy(dy) @ weight
            assert np.linalg.norm(to_numpy(x.grad) - exact) <= noise * np.linalg.norm(exact)

    def test_forward(self):
        module = OnlyForward(torch.randn(8, 16), torch.randn(8), torch.float32)
        self.check(module, True, 1e-6)

    def test_no_backward(self):
        module = ForInference(torch.randn(8, 16), torch.randn(8), torch.float32)
        assert not module(torch.randn(2, 16).requires_grad_()).requires_grad
        self.check(module, False, 1e-6)

    @needs_torchao
    def test_torchao_that_quantizes_its_input(self):
        """torchao's own layer silently returns no gradient for x."""
        module = torchao_linear(nn.Linear(64, 32), "int8_dynamic")
        x = torch.randn(3, 64).requires_grad_()
        module(x).sum().backward()
        assert x.grad is None
        self.check(module, False, 1e-6)
        self.check(torchao_linear(nn.Linear(64, 32), "int8").requires_grad_(False), True, 1e-6)

    @needs_bitsandbytes
    def test_bitsandbytes(self):
        self.check(linear_4bit(nn.Linear(64, 32)), True, 1e-6)
        self.check(linear_8bit(nn.Linear(64, 32)), True, 1e-6)

    @needs_bitsandbytes
    @pytest.mark.parametrize("bias", [True, False])
    def test_4bit_after_inference(self, bias):
        """Training continues after an evaluation; bitsandbytes' own layer raises on a CPU that
        packs its weights.
        """
        module = linear_4bit(nn.Linear(64, 32, bias)).eval()
        with torch.no_grad():
            module(torch.randn(2, 64))
        self.check(module.train(), True, 1e-6)

    def test_a_bias_that_trains(self):
        module = ForInference(torch.randn(8, 16), None, torch.float32)
        module.bias = nn.Parameter(torch.randn(8))
        frozen_forward(module, torch.randn(2, 3, 16).requires_grad_(), False).sum().backward()
        assert (module.bias.grad == 6).all()


class TestSharded:
    def test_whole_layers_pass(self):
        refuse_sharded("q", nn.Linear(3, 4))
        refuse_sharded("q", OnlyForward(torch.randn(5, 3), None, torch.float32))
        refuse_sharded("q", nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
        refuse_sharded("q", random_unstructured(nn.Linear(3, 4), "weight", 0.5))

    def test_zero_3_without_partitions(self):
        linear = nn.Linear(3, 4)
        linear.weight.ds_id, linear.weight.ds_shape = 0, linear.weight.shape
        refuse_sharded("q", linear)  # gathered
        linear.weight.data = torch.empty(0)
        with pytest.raises(ValueError, match=r"q\.weight is partitioned .*ZeRO-3: adapt .*before"):
            refuse_sharded("q", linear)

    def test_meta(self):
        with pytest.raises(ValueError, match=r"q\.weight is on the meta device: load it first"):
            refuse_sharded("q", nn.Linear(3, 4, device="meta"))

    @pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
    def test_torch_distributed(self, tmp_path):
        """Real shards, in a group of one process."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
        from torch.distributed.tensor import Shard, distribute_tensor

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            parallel = nn.Linear(8, 8)
            shard = distribute_tensor(parallel.weight.detach(), mesh, [Shard(0)])
            parallel.weight = nn.Parameter(shard)
            fsdp2 = nn.Sequential(nn.Linear(8, 8))
            fully_shard(fsdp2, mesh=mesh)
            for layer in (parallel, fsdp2[0]):
                assert kind_of(layer) == "linear"
                refuse_sharded("q", layer)
            for original in (False, True):
                device = torch.device("cpu")
                fsdp1 = FullyShardedDataParallel(
                    nn.Sequential(nn.Linear(8, 8)), use_orig_params=original, device_id=device
                )
                layer = fsdp1.module[0]
                assert kind_of(layer) == "linear"
                with pytest.raises(ValueError, match=r"q\.weight is part of a flat parameter"):
                    refuse_sharded("q", layer)
        finally:
            dist.destroy_process_group()


def test_copies(device):
    """A copied model is dequantized like the original."""
    module = OnlyForward(torch.randn(8, 16), None, torch.float32).to(device)
    assert base_of(module).device.type == device
    assert torch.equal(base_of(copy.deepcopy(module)).weight(), base_of(module).weight())
