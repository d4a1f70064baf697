"""`LoRAEmbedding`: rows of W + s·(BA − B₀A₀) and their gradients, on one layer."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRAConfig, disable_adapters, merge_lora, unload_lora
from lora_kernels.init import InitAB, LoRAXS, get_initializer
from lora_kernels.layers.base import base_of
from lora_kernels.layers.kinds import kind_of, lookup_scale, why_not_embedding
from lora_kernels.layers.linear import LoRAEmbedding

from ..support.exhaustive import EXHAUSTIVE
from ..support.oracle import ROUNDING, to_numpy
from ..support.packages import needs_transformers
from ..support.running import quiet, trained

V, D, PAD = 37, 20, 3
TOKENS = torch.tensor([[5, 0, PAD, 5], [36, 1, 5, PAD]])
METHODS = ["loram", "lora", "pissa", InitAB(seed=0), LoRAXS(sigma=0.3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Scaled(nn.Embedding):
    """As BART's and, with `.to`, Gemma's."""

    def __init__(self, *args, embed_scale=3.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor):
        """Documented."""
        return super().forward(input_ids) * self.embed_scale


class ScaledByBuffer(nn.Embedding):
    def __init__(self, *args, embed_scale=5.3, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scalar_embed_scale = embed_scale
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, input_ids: torch.Tensor):
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class Net(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed = embedding

    def forward(self, tokens):
        return self.embed(tokens)


def made(method="loram", residual="absorb", dtype=torch.float32, cls=nn.Embedding, **options):
    """(a model of one adapted embedding with changed factors, the original embedding)"""
    torch.manual_seed(0)
    embedding = cls(V, D, **options).to(dtype)
    with torch.no_grad():
        embedding.weight.normal_()
    model, original = Net(embedding), copy.deepcopy(embedding)
    config = LoRAConfig(
        r=4, target_modules=["embed"], init_lora_weights=method, residual=residual, lora_dropout=0.5
    )
    quiet(model, config)
    return model, original


def product(layer: LoRAEmbedding, of=np.asarray) -> np.ndarray:
    """s·BRA [D, V] in float64, of these factors or their absolute values."""
    R = np.eye(layer.r) if layer.lora_R is None else to_numpy(layer.lora_R)
    A, B = to_numpy(layer.lora_A), to_numpy(layer.lora_B)
    return layer.scaling * (of(B) @ of(R) @ of(A))


def changing(method) -> bool:
    return get_initializer(method).changes_base


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize("method", METHODS, ids=str)
class TestForward:
    def test_computes_the_formula(self, method, residual, dtype):
        model, original = made(method, residual, dtype)
        layer, W = model.embed, to_numpy(original.weight)
        start = product(layer) if changing(method) else 0.0
        if changing(method) and residual == "implicit":
            assert torch.equal(model(TOKENS), original(TOKENS))
        size = np.abs(W) + product(layer, np.abs).T
        trained(model)
        full, size = W + (product(layer) - start).T, size + product(layer, np.abs).T
        # Absorbed, W was rounded after the subtraction; and y is rounded. The sums are in float32.
        work = torch.promote_types(dtype, torch.float32)
        limit = (2 * ROUNDING[dtype] + 16 * ROUNDING[work]) * size
        y = model(TOKENS)
        assert y.dtype == dtype
        assert (np.abs(to_numpy(y) - full[TOKENS]) <= limit[TOKENS]).all()
        assert (np.abs(to_numpy(layer.effective_weight()) - full) <= limit).all()
        with disable_adapters(model):
            base = to_numpy(model(TOKENS))
        assert (np.abs(base - W[TOKENS]) <= limit[TOKENS]).all()
        if residual == "implicit":
            assert (base == W[TOKENS]).all()

    def test_merging_and_unloading(self, method, residual, dtype):
        model, original = made(method, residual, dtype)
        y = trained(model)(TOKENS)
        other = copy.deepcopy(model)
        merge_lora(model)
        assert type(model.embed) is nn.Embedding and not model.embed.weight.requires_grad
        limit = 4 * ROUNDING[dtype] * (original.weight.abs().max() + 4)
        assert (model(TOKENS) - y).abs().max() <= limit
        unload_lora(other)
        assert type(other.embed) is nn.Embedding
        error = (other.embed.weight - original.weight).abs().max()
        assert error <= (limit if residual == "absorb" else 0)


class TestGradients:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("method", METHODS, ids=str)
    def test_are_those_of_a_product_of_matrices(self, method, residual):
        model, _ = made(method, residual, torch.float64, padding_idx=PAD)
        layer, dy = trained(model).embed, torch.randn(*TOKENS.shape, D, dtype=torch.float64)
        model(TOKENS).backward(dy)
        x = one_hot(TOKENS.flatten(), V).double()  # [n, V]
        flat, s = dy.flatten(0, 1), layer.scaling
        if layer.lora_R is None:
            dA = s * (flat @ layer.lora_B).T @ x
            dA[:, PAD] = 0  # as in PEFT, which passes padding_idx on
            assert torch.allclose(layer.lora_A.grad, dA, rtol=1e-12, atol=1e-12)
            dB = s * flat.T @ (x @ layer.lora_A.T)
            assert torch.allclose(layer.lora_B.grad, dB, rtol=1e-12, atol=1e-12)
        else:
            dR = s * (flat @ layer.lora_B).T @ (x @ layer.lora_A.T)
            assert torch.allclose(layer.lora_R.grad, dR, rtol=1e-12, atol=1e-12)
            assert layer.lora_A.grad is None
        assert layer.weight.grad is None

    def test_scale_grad_by_freq(self):
        once, twice = torch.tensor([7]), torch.tensor([7, 7])
        grads = []
        for tokens in (once, twice):
            model, _ = made(dtype=torch.float64, scale_grad_by_freq=True)
            trained(model)(tokens).sum().backward()
            grads.append(model.embed.lora_A.grad)
        assert torch.allclose(*grads)

    def test_sparse_has_a_dense_gradient(self):
        model, _ = made(sparse=True)
        trained(model)(TOKENS).sum().backward()
        assert not model.embed.lora_A.grad.is_sparse and merge_lora(model).embed.sparse

    def test_checkpointing(self):
        model, _ = made(residual="implicit")
        plain = copy.deepcopy(trained(model))
        plain(TOKENS).square().sum().backward()
        checkpoint(model, TOKENS, use_reentrant=False).square().sum().backward()
        assert torch.equal(model.embed.lora_A.grad, plain.embed.lora_A.grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_masters_are_float32(self, dtype):
        model, _ = made(dtype=dtype)
        trained(model)(TOKENS).float().square().sum().backward()
        assert model.embed.lora_A.dtype == model.embed.lora_A.grad.dtype == torch.float32


class TestScaledEmbeddings:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cls", [Scaled, ScaledByBuffer])
    def test_scale_the_update_too(self, cls, dtype):
        model, original = made("loram", "implicit", dtype, cls)
        layer = model.embed
        assert torch.equal(model(TOKENS), original(TOKENS))
        y = trained(model)(TOKENS)
        assert y.dtype == dtype
        scale = torch.as_tensor(original.embed_scale).to(dtype)
        error = (y - layer.effective_weight()[TOKENS] * scale).abs().max()
        assert error <= 8 * ROUNDING[dtype] * y.abs().max()
        merged = merge_lora(model)
        assert type(merged.embed) is cls
        assert (merged(TOKENS) - y).abs().max() <= 8 * ROUNDING[dtype] * y.abs().max()
        if cls is ScaledByBuffer:
            assert merged.embed.scalar_embed_scale == original.scalar_embed_scale
            assert "embed_scale" not in merged.embed.state_dict()

    def test_copies_alone(self):
        model, original = made(cls=ScaledByBuffer)
        for alone in (model.embed.base_linear(), model.embed.to_linear()):
            assert type(alone) is ScaledByBuffer
            assert torch.allclose(alone(TOKENS), original(TOKENS), atol=1e-6)

    @needs_transformers
    def test_those_of_transformers(self):
        from transformers.models.bart.modeling_bart import (
            BartLearnedPositionalEmbedding,
            BartScaledWordEmbedding,
        )
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
        from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

        assert lookup_scale(nn.Embedding(3, 4)) == ""
        assert lookup_scale(BartScaledWordEmbedding(3, 4, 0)) == "number"
        assert lookup_scale(Gemma3TextScaledWordEmbedding(3, 4, 0, 2.0)) == "cast"
        for other in (BartLearnedPositionalEmbedding(3, 4), OPTLearnedPositionalEmbedding(3, 4)):
            assert kind_of(other) is None
            assert "does not compute as nn.Embedding does" in why_not_embedding(other)


class _Sizes(TorchDispatchMode):
    """The largest tensor that an operator, other than a view, makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.numel())
        return out


class TestLayer:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_reads_only_the_rows(self, residual):
        model, _ = made(residual=residual)
        with _Sizes() as sizes:
            model(TOKENS[:1])
        assert sizes.largest <= max(TOKENS[0].numel(), 8) * D < V * 4 + V * D

    def test_shapes_of_tokens(self):
        model, _ = made(residual="implicit")
        for shape in ((), (0,), (2, 0), (1, 2, 3)):
            assert model(torch.zeros(shape, dtype=torch.int32)).shape == (*shape, D)

    def test_dropout_has_no_effect(self):
        model, _ = made()
        trained(model).train()
        assert torch.equal(model(TOKENS), model.eval()(TOKENS))

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_autocast_rounds_nothing(self, residual):
        model, _ = made(residual=residual)
        y = trained(model)(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(TOKENS), y)

    def test_on_the_meta_device(self):
        model, _ = made("lora", "implicit")
        assert copy.deepcopy(model).to("meta")(TOKENS.to("meta")).shape == (*TOKENS.shape, D)

    @pytest.mark.parametrize("cls", [nn.Embedding, ScaledByBuffer])
    def test_copies(self, cls):
        model, _ = made(cls=cls)
        y = trained(model)(TOKENS)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(TOKENS), y)
            twin.embed.lora_A.data += 1
            assert torch.equal(model(TOKENS), y) and not torch.equal(twin(TOKENS), y)
        fresh, _ = made("loram", cls=cls)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(TOKENS), y)

    @pytest.mark.parametrize("residual", ["absorb", "implicit"] if EXHAUSTIVE else ["implicit"])
    def test_compiled(self, residual):
        model, _ = made(residual=residual, cls=ScaledByBuffer)
        expected = trained(model)(TOKENS)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        y = compiled(TOKENS)
        assert (y - expected).abs().max() <= 4 * ROUNDING[torch.float32] * expected.abs().max()
        y.square().sum().backward()
        expected.square().sum().backward()
        want = model.embed.lora_A.grad
        error = (compiled.embed.lora_A.grad - want).abs().max()
        assert error <= 16 * ROUNDING[torch.float32] * want.abs().max()

    def test_kind_and_view(self):
        model, original = made(residual="implicit")
        base = base_of(model.embed)
        assert (base.kind, base.shape, base.transposed) == ("embedding", (D, V), True)
        assert torch.equal(base.weight(), original.weight.T)
        assert isinstance(model.embed, nn.Embedding) and model.embed.lora_A.shape == (4, V)
        assert repr(model.embed).startswith(f"LoRAEmbedding(\n  {V}, {D}, r=4, scaling=2, residual")


class TestBadInputs:
    def test_reasons(self):
        parametrized = nn.utils.parametrizations.weight_norm(nn.Embedding(3, 4))
        replaced = nn.Embedding(3, 4)
        replaced.forward = lambda tokens: tokens
        more = nn.Embedding(3, 4)
        more.other = nn.Parameter(torch.zeros(2))
        integers = nn.Embedding(3, 4)
        integers.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
        for module, reason in (
            (nn.Embedding(3, 4, max_norm=1.0), "max_norm rewrites its weight in every forward"),
            (parametrized, "its weight is computed"),
            (replaced, "its forward is replaced"),
            (more, "has other parts than a weight"),
            (integers, "not of a floating-point type"),
            (Scaled(3, 4, embed_scale=torch.ones(4)), "does not compute as nn.Embedding does"),
            (Scaled(3, 4, embed_scale=None), "does not compute as nn.Embedding does"),
        ):
            assert kind_of(module) is None and reason in why_not_embedding(module)
            with pytest.raises(TypeError, match="target_modules names 'embed'.*" + reason):
                quiet(Net(module), LoRAConfig(r=2, target_modules=["embed"]))

    def test_resizing(self):
        model, _ = made(residual="implicit")
        layer, y = model.embed, trained(model)(TOKENS)
        layer.weight.data = torch.cat([layer.weight.data, torch.zeros(2, D)])
        sizes = f"{V + 2} rows.* its adapter has {V}; unload_lora"
        with pytest.raises(ValueError, match=f"this embedding has {sizes}"):
            model(TOKENS)
        with pytest.raises(ValueError, match=f"cannot be resized to {sizes}"):
            layer.num_embeddings = V + 2
        assert torch.equal(model(TOKENS), y)  # the rows were taken away again
        layer.weight.data = layer.weight.data[:-1]
        with pytest.raises(ValueError, match="removed rows are lost: load the model again"):
            layer.num_embeddings = V - 1
        layer.num_embeddings = V  # as transformers does without a change

    def test_a_bias_of_B(self):
        model, _ = made(residual="implicit")
        adapter = copy.deepcopy(model.embed.active())
        adapter.lora_bias = nn.Parameter(torch.zeros(D))
        with pytest.raises(ValueError, match="cannot have a bias of lora_B"):
            model.embed.attach("other", adapter)
