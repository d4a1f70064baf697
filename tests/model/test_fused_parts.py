"""`LoRAConfig.fused_parts`: a fused layer computes, starts and trains as separate layers would."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    adapters_per_row,
    add_weighted_adapter,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    optim,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.adapter.recipe import layer_from_dict, layer_to_dict
from lora_kernels.files.adapter.tensors import check_state
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.files.serving.rename import renamed
from lora_kernels.init import LoRAM
from lora_kernels.init.fused import check_parts
from lora_kernels.layers.kinds import is_conv1d
from lora_kernels.layers.state import FACTORS
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state
from tests.support.packages import needs_peft
from tests.support.running import layer_data, logits, move, quiet, train

INNER, R = 16, 2
SIZES = (12, 4, 4)  # q, and k and v of fewer heads
FUSED = {"qkv": SIZES}


class Block(nn.Module):
    """A fused layer whose parts are used in different ways."""

    def __init__(self, sizes=SIZES, transposed=False, dtype=torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.sizes = sizes
        if transposed:
            from transformers.pytorch_utils import Conv1D

            self.qkv = Conv1D(sum(sizes), INNER)
            nn.init.normal_(self.qkv.weight, std=0.3)
        else:
            self.qkv = nn.Linear(INNER, sum(sizes))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return used(self.qkv(x).split(list(self.sizes), -1))


def used(parts) -> Tensor:
    return torch.cat([torch.sin((k + 1) * part) for k, part in enumerate(parts)], -1)


def adapted(start="loram", block=None, fused=FUSED, data=None, **options) -> Block:
    block = Block() if block is None else block
    config = LoRAConfig(
        **{"r": R, "target_modules": ["qkv"], "init_lora_weights": start, "fused_parts": fused}
        | options
    )
    quiet(block, config, **({} if data is None else data))
    return block


def rows_of(layer: nn.Module) -> list[nn.Linear]:
    """A plain layer for each part, with copies of its rows."""
    weight = layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()
    found = []
    begin = 0
    for rows in SIZES:
        linear = nn.utils.skip_init(nn.Linear, INNER, rows, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight[begin : begin + rows])
            linear.bias.copy_(layer.bias[begin : begin + rows])
        found.append(linear)
        begin += rows
    return found


def blocks_of(layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A and B of each part, by the definition."""
    found, begin = [], 0
    for k, rows in enumerate(SIZES):
        columns = slice(k * R, (k + 1) * R)
        found.append((layer.lora_A[columns], layer.lora_B[begin : begin + rows, columns]))
        begin += rows
    return found


def off_blocks(tensor: Tensor) -> Tensor:
    """The entries of a B, or of its gradient, outside the blocks."""
    outside, begin = torch.ones_like(tensor, dtype=torch.bool), 0
    for k, rows in enumerate(SIZES):
        outside[begin : begin + rows, k * R : (k + 1) * R] = False
        begin += rows
    return tensor[outside]


def separate(plain: nn.Module, start, data=None, **options) -> list[LoRALinear]:
    """`LoRALinear`s of the rows of an unadapted fused layer."""
    linears = rows_of(plain)
    given = [{}] * len(SIZES)
    if data is not None and "gradient" in data:
        given = [{"gradient": own} for own in data["gradient"].split(list(SIZES))]
    elif data is not None:
        given = [data] * len(SIZES)
    return [
        LoRALinear.from_linear(linear, r=R, init_lora_weights=start, **own, **options)
        for linear, own in zip(linears, given, strict=True)
    ]


STARTS = {
    "loram": "absorb",
    "pissa": "absorb",
    "olora": "implicit",
    "milora": "absorb",
    "mica": "absorb",
    "kasa": "absorb",
    "lora_ga": "implicit",
    "lora_one": "absorb",
    "eva": "absorb",
    "corda": "absorb",
    "gaussian": "absorb",
}


@pytest.mark.parametrize(("start", "residual"), STARTS.items())
def test_starts_are_those_of_the_parts(start, residual):
    plain = Block()
    weight = plain.qkv.weight.detach().clone()
    torch.manual_seed(5)
    data = layer_data(LoRAConfig(init_lora_weights=start).initializer, weight)
    of_model = {f"{key[:8]}s" if key == "gradient" else key: {"qkv": v} for key, v in data.items()}
    torch.manual_seed(7)
    block = adapted(start, copy.deepcopy(plain), data=of_model, residual=residual)
    torch.manual_seed(7)
    layers = separate(plain.qkv, start, data, residual=residual)
    layer = block.qkv
    assert (layer.r, layer.scaling) == (3 * R, layers[0].scaling)
    assert layer.lora_A.shape == (3 * R, INNER) and layer.lora_B.shape == (sum(SIZES), 3 * R)
    assert not bool(off_blocks(layer.lora_B).any())
    for (A, B), own in zip(blocks_of(layer), layers, strict=True):
        torch.testing.assert_close(A, own.lora_A, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(B, own.lora_B, rtol=1e-9, atol=1e-10)
        assert A.requires_grad == own.lora_A.requires_grad
    want = torch.cat([own.matrix() for own in layers])
    torch.testing.assert_close(layer.matrix().detach(), want.detach(), rtol=1e-9, atol=1e-10)
    if start == "kasa":
        diag = torch.cat([own.lora_diag for own in layers])
        torch.testing.assert_close(layer.lora_diag, diag, rtol=1e-9, atol=1e-10)
    x = torch.randn(5, INNER, dtype=torch.float64)
    if start in ("kasa", "lora_one"):  # they change the model on purpose
        torch.testing.assert_close(block(x), used([own(x) for own in layers]))
    else:
        torch.testing.assert_close(block(x), plain(x))
    unload_lora(block)
    torch.testing.assert_close(block.qkv.weight.detach(), weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("start", "residual"), [("loram", "implicit"), ("pissa", "absorb")])
def test_trains_as_separate_layers(start, residual, use_dora, transposed):
    if transposed:
        pytest.importorskip("transformers")
    plain = Block(transposed=transposed)
    options = {"residual": residual, "use_dora": use_dora, "scaling": "rslora"}
    block = adapted(start, copy.deepcopy(plain), **options)
    layers = separate(plain.qkv, start, **options)
    x, target = torch.randn(2, 6, INNER, dtype=torch.float64), torch.randn(6, 20).double()
    both = [block.qkv, *layers]
    steps = [
        torch.optim.AdamW((p for layer in own for p in layer.parameters()), lr=0.05, weight_decay=3)
        for own in (both[:1], both[1:])
    ]
    for _ in range(3):
        for optimizer in steps:
            optimizer.zero_grad()
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = block(inputs[0]), used([own(inputs[1]) for own in layers])
        torch.testing.assert_close(y, want)
        for out in (y, want):
            (out - target).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        gradients = (block.qkv.lora_A.grad, block.qkv.lora_B.grad)
        assert not bool(off_blocks(gradients[1]).any())
        torch.testing.assert_close(gradients[0], torch.cat([own.lora_A.grad for own in layers]))
        for optimizer in steps:
            optimizer.step()
        assert not bool(off_blocks(block.qkv.lora_B).any())
        for (A, B), own in zip(blocks_of(block.qkv), layers, strict=True):
            torch.testing.assert_close(A, own.lora_A)
            torch.testing.assert_close(B, own.lora_B)
    merged = torch.cat([own.to_linear().weight for own in layers])
    y = block(x)
    merge_lora(block)
    weight = block.qkv.weight.T if transposed else block.qkv.weight
    torch.testing.assert_close(weight, merged)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("rule", [optim.LoRAPro, optim.Riemannian, optim.LoRAFA])
def test_rules_are_those_of_the_parts(rule):
    block = adapted("loram", residual="implicit")
    layers = nn.ModuleList(separate(Block().qkv, "loram", residual="implicit"))
    move(block, 0.3)
    with torch.no_grad():
        block.qkv.lora_B.copy_(block.qkv.active().left())
        for (A, B), own in zip(blocks_of(block.qkv), layers, strict=True):
            own.lora_A.copy_(A)
            own.lora_B.copy_(B)
    x = torch.randn(6, INNER, dtype=torch.float64)
    for model, y in ((block, block(x)), (layers, used([own(x) for own in layers]))):
        y.square().sum().backward()
        optim.precondition_gradients_(model, rule())
    gradient = block.qkv.lora_B.grad
    assert not bool(off_blocks(gradient).any())
    begin = 0
    for k, own in enumerate(layers):
        rows, columns = slice(begin, begin + SIZES[k]), slice(k * R, (k + 1) * R)
        torch.testing.assert_close(gradient[rows, columns], own.lora_B.grad)
        if own.lora_A.grad is not None:
            torch.testing.assert_close(block.qkv.lora_A.grad[columns], own.lora_A.grad)
        begin += SIZES[k]


def test_penalty_of_kasa_is_that_of_the_parts():
    block, layers = adapted("kasa"), nn.ModuleList(separate(Block().qkv, "kasa"))
    for (A, B), own in zip(blocks_of(block.qkv), layers, strict=True):
        own.lora_A.data.copy_(A.detach())
        own.lora_B.data.copy_(B.detach())
    got, want = optim.kasa_penalty(block), optim.kasa_penalty(layers)
    torch.testing.assert_close(got, want)


def test_gradients_that_overflow_stay_within_the_blocks():
    block = adapted("lora")
    block(torch.full((2, INNER), 1e200, dtype=torch.float64)).sum().backward()
    with torch.no_grad():
        block.qkv.lora_A.fill_(1e300)
    block.qkv(torch.full((2, INNER), 1e300, dtype=torch.float64)).sum().backward()
    gradient = block.qkv.lora_B.grad
    assert not bool(gradient.isfinite().all())
    assert not bool(off_blocks(gradient).any())


def test_entries_outside_the_blocks_are_not_used():
    block, x = adapted("loram", residual="implicit"), torch.randn(4, INNER, dtype=torch.float64)
    move(block, 0.2)  # all of B
    before = block(x)
    assert bool(off_blocks(block.qkv.lora_B).any())
    state = adapter_state(block).layers["qkv"]
    assert not bool(off_blocks(state.lora_B).any())
    torch.testing.assert_close(block(x), before, rtol=0, atol=0)
    clean = copy.deepcopy(block)
    with torch.no_grad():
        clean.qkv.lora_B.copy_(state.lora_B)
    torch.testing.assert_close(clean(x), before)
    torch.testing.assert_close(clean.qkv.effective_weight(), block.qkv.effective_weight())
    merge_lora(block)
    torch.testing.assert_close(block(x), before)


def test_two_of_three_parts():
    """As loralib's MergedLinear(enable_lora=[True, False, True])."""
    block = adapted("loram", fused={"qkv": ((0, 12), (16, 20))})
    layer, before = block.qkv, Block().qkv.weight.detach()
    assert layer.r == 2 * R
    assert torch.equal(layer.matrix()[12:16], before[12:16])
    want = separate(Block().qkv, "loram")[2]
    torch.testing.assert_close(layer.lora_B[16:, R:], want.lora_B)
    block(torch.randn(4, INNER, dtype=torch.float64)).sum().backward()
    torch.optim.AdamW(block.parameters(), lr=0.1, weight_decay=1).step()
    merge_lora(block)
    assert torch.equal(block.qkv.weight[12:16], before[12:16])
    assert not torch.equal(block.qkv.weight[16:], before[16:])


def phi3(dtype=torch.float32) -> nn.Module:
    """Four heads of queries and two of keys and values, of 8 dimensions."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).to(dtype).eval()


def gpt2() -> nn.Module:
    pytest.importorskip("transformers")
    from tests.support import tiny_models

    return tiny_models.gpt2()


MODELS = {
    "gpt2": (gpt2, ["c_attn", "c_fc"], {"c_attn": 3}),
    "phi3": (phi3, ["qkv_proj", "gate_up_proj"], {"qkv_proj": [32, 16, 16], "gate_up_proj": 2}),
}


def trained(kind: str, start="loram", **options) -> tuple[nn.Module, nn.Module]:
    """The base, and a trained model."""
    make, targets, fused = MODELS[kind]
    model = make()
    config = LoRAConfig(
        r=2, lora_alpha=3, target_modules=targets, fused_parts=fused, init_lora_weights=start,
        **options,
    )  # fmt: skip
    before = logits(model)
    quiet(model, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    train(model, steps=2)
    return make(), model


@needs_peft
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("format", ["native", "peft"])
def test_files(kind, format, tmp_path):
    from peft import PeftModel

    base, model = trained(kind, "pissa" if kind == "phi3" else "loram", use_rslora=kind == "gpt2")
    want, state = logits(model), adapter_state(model)
    save_adapter(model, tmp_path / "a", format=format)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path / "a", progress=False)
    torch.testing.assert_close(logits(fresh), want, rtol=0, atol=1e-5)
    again = adapter_state(fresh)
    assert again.config == state.config
    for name, layer in state.layers.items():
        other = again.layers[name]
        assert other.parts == layer.parts
        assert other.scaling == layer.scaling
        for key in ("lora_A", "lora_B", "start_A", "start_B"):
            left, right = getattr(layer, key), getattr(other, key)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)
    for one in (fresh, model):  # both go on in the same way
        train(one, steps=1, seed=9)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=0, atol=1e-4)
    for layer in adapted_layers(fresh).values():
        if layer.options.parts:
            check_parts(layer.options.parts, layer.lora_B.detach())
    if format == "peft":
        loaded = PeftModel.from_pretrained(base, tmp_path / "a")
        torch.testing.assert_close(logits(loaded.eval()), want, rtol=0, atol=2e-5)


def test_merge_unload_and_compress(tmp_path):
    base, model = trained("phi3", residual="implicit")
    want = logits(model)
    save_adapter(model, tmp_path / "a", compress_to=2)
    assert not any(layer.parts for layer in read_adapter(tmp_path / "a").layers.values())
    restored = unload_lora(copy.deepcopy(model))
    torch.testing.assert_close(logits(restored), logits(base), rtol=0, atol=0)
    torch.testing.assert_close(logits(merge_lora(model)), want, rtol=0, atol=1e-5)


def test_hotswap(tmp_path):
    model = adapted("lora", residual="implicit")
    move(model, 0.2)
    x = torch.randn(4, INNER, dtype=torch.float64)
    want = model(x)
    save_adapter(model, tmp_path / "a", format="native")
    other = adapted("lora", residual="implicit")
    hotswap_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(x), want)
    dense = adapted("lora", residual="implicit", fused={}, r=3 * R)
    with pytest.raises(ValueError, match="its fused layer has other parts"):
        hotswap_adapter(dense, tmp_path / "a")


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_weighted_adapters(kind):
    model = adapted("loram", residual="implicit")
    quiet(model, LoRAConfig(r=2, target_modules=["qkv"], residual="implicit"), adapter_name="b")
    move(model, 0.1)
    states = [adapter_state(model, name).layers["qkv"] for name in ("default", "b")]
    updates = [s.scaling * (B @ A) for s in states for A, B in [s.update_factors()]]
    want = 0.5 * updates[0] - 2 * updates[1]
    add_weighted_adapter(model, ["default", "b"], [0.5, -2.0], "c", kind, svd_rank=None)
    layer = adapter_state(model, "c").layers["qkv"]
    assert not layer.parts
    A, B = layer.update_factors()
    U, S, Vh = torch.linalg.svd(want, full_matrices=False)
    r = 6 * R if kind == "svd" else len(S)
    want = (U[:, :r] * S[:r]) @ Vh[:r]
    assert layer.r == 6 * R + (kind == "cat") * 2 * R
    torch.testing.assert_close(B @ A, want, rtol=1e-7, atol=1e-9)


def test_compiles_as_one_graph():
    from torch._dynamo.testing import CompileCounter

    block, counter = adapted("loram", residual="implicit", lora_alpha=5), CompileCounter()
    move(block, 0.1)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = torch.randn(4, INNER, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), block(x))
    compiled(x).sum().backward()
    assert not bool(off_blocks(block.qkv.lora_B.grad).any())
    block.qkv.scaling = 2.0
    torch.testing.assert_close(compiled(x), block(x))
    assert counter.frame_count == 1


def test_attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 8, dropout=0.0, batch_first=True).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = model(x)
    quiet(model, LoRAConfig(r=2, target_modules=["self_attn"], fused_parts={"self_attn": 3}))
    torch.testing.assert_close(model(x), before)
    layer = model.self_attn
    assert layer.r == 6 and layer.out_proj.r == 2
    wanted = [LoRAM()(own, 2).lora_B for own in layer.base_weight().split(16)]
    torch.testing.assert_close(layer.lora_B, torch.block_diag(*wanted), rtol=1e-9, atol=1e-10)
    model.train()(x).square().sum().backward()
    gradient = layer.lora_B.grad
    assert bool(gradient.any()) and not bool(gradient[:16, 2:].any())


def test_quantized_base():
    from tests.support.quantized import OnlyForward

    plain = nn.Linear(INNER, 24)
    model = nn.Sequential(OnlyForward(plain.weight.detach(), plain.bias.detach(), torch.float32))
    x = torch.randn(5, INNER)
    before = model(x)
    weight = torch.from_numpy(model[0].oracle()).float()
    config = LoRAConfig(r=R, target_modules=["0"], fused_parts={"0": 3})
    quiet(model, config)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    wanted = [LoRAM()(own, R).lora_B for own in weight.split(8)]
    torch.testing.assert_close(model[0].lora_B, torch.block_diag(*wanted))
    model(x).square().sum().backward()
    assert bool(model[0].lora_B.grad.any()) and not bool(model[0].lora_B.grad[:8, R:].any())


def test_state_dict_and_moves():
    block = adapted("loram")
    x = torch.randn(4, INNER, dtype=torch.float64)
    move(block, 0.1)
    with torch.no_grad():
        block.qkv.lora_B.copy_(block.qkv.active().left())
    other = adapted("loram")
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(other(x), block(x))
    empty = copy.deepcopy(block).to_empty(device="cpu")
    empty.load_state_dict(block.state_dict())
    empty.qkv.lora_B.data += 1
    torch.testing.assert_close(empty.qkv.active().left()[:12, R:], torch.zeros(12, 2 * R).double())
    dense = adapted("pissa", fused={}, r=3 * R)
    with pytest.raises(ValueError, match="lora_B is not zero outside the blocks of its parts"):
        other.load_state_dict(dense.state_dict())


def test_report_and_scaling():
    report = quiet(
        Block(), LoRAConfig(r=R, target_modules=["qkv"], fused_parts=FUSED, lora_alpha=5)
    )
    assert report.adapted[0].parts == ((0, 12), (12, 16), (16, 20))
    assert "r=6 (3 parts), s=2.5" in str(report)
    for rule in ("lora", "rslora", "alpha_sqrt"):
        block = adapted("lora", scaling=rule)
        config = LoRAConfig(r=R, scaling=rule, init_lora_weights="lora")
        assert block.qkv.scaling == pytest.approx(config.layer_scaling("qkv"), rel=1e-15)


def test_ranks_by_eva_are_those_of_parts():
    from lora_kernels import capture_activations
    from lora_kernels.init import EVA

    model = nn.Sequential(Block(), nn.Linear(20, 6, dtype=torch.float64))
    batches = [torch.randn(40, INNER, dtype=torch.float64)]
    found = capture_activations(model, batches, progress=False)
    config = LoRAConfig(r=3, fused_parts=FUSED, init_lora_weights=EVA(rho=2.0))
    quiet(model, config, activations=found)
    assert 3 <= model[0].qkv.r <= 12 and model[0].qkv.r % 3 == 0


BAD_VALUES = {
    "one": (1, ValueError, r"fused_parts\['qkv'\] must be at least 2"),
    "bool": (True, TypeError, "must be an integer"),
    "text": ("qkv", TypeError, "must be the number of equal parts"),
    "float": (1.5, TypeError, "must be an integer"),
    "empty": ((), TypeError, "must be the number of equal parts"),
    "size 0": ((12, 0, 8), ValueError, "must be at least 1"),
    "one size": ((20,), ValueError, "has one part"),
    "mixed": (((0, 4), 8), TypeError, "must be the number of equal parts"),
    "overlap": (((0, 8), (4, 20)), ValueError, "has the rows 4 to 20 after row 8"),
    "backwards": (((8, 4),), ValueError, "has the rows 8 to 4 after row 0"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_refuses_values(case):
    value, error, text = BAD_VALUES[case]
    with pytest.raises(error, match=text):
        LoRAConfig(fused_parts={"qkv": value})


BAD_SIZES = {
    "not divisible": (3, "qkv: its weight has 20 rows, which are not 3 equal parts"),
    "sum": ((12, 4, 5), r"qkv: fused_parts gives it 12 \+ 4 \+ 5 = 21 rows, its weight has 20"),
    "too few": ((12, 4), r"12 \+ 4 = 16 rows, its weight has 20"),
    "beyond": (((0, 4), (16, 24)), "parts up to row 24, its weight has 20 rows"),
    "rank": ((13, 6, 1), r"r = 2 is larger than min\(out, in\) = 1 of qkv\[19:20\] \[1, 16\]"),
}


@pytest.mark.parametrize("case", BAD_SIZES)
def test_refuses_sizes(case):
    value, text = BAD_SIZES[case]
    block = Block()
    with pytest.raises(ValueError, match=text):
        adapted("loram", block, {"qkv": value})
    assert type(block.qkv) is nn.Linear
    assert torch.equal(block.qkv.weight, Block().qkv.weight)


@pytest.mark.parametrize(
    ("start", "text"),
    [("lora_xs", "LoRAXS trains an R"), ("loftq", "LoftQ rewrites"), ("qera", "QERA rewrites")],
)
def test_refuses_starts(start, text):
    with pytest.raises(ValueError, match=f"fused_parts is not possible for qkv: {text}"):
        adapted(start)


def test_refuses_layers():
    with pytest.raises(ValueError, match=r"fused_parts has 'qvk', which matches .* mean 'qkv'"):
        adapted(fused={"qvk": 2})
    with pytest.raises(TypeError, match="fused_parts must be a dict, got int"):
        LoRAConfig(fused_parts=3)
    with pytest.raises(ValueError, match="not a regular expression"):
        LoRAConfig(fused_parts={"(": 3})
    with pytest.raises(ValueError, match="leaves out 4 of the 20 rows of qkv, whose norms"):
        adapted(fused={"qkv": ((0, 12), (16, 20))}, use_dora=True)
    for layer, what in ((nn.Embedding(12, 8), "an embedding"), (nn.Conv1d(8, 8, 3), "a convol")):
        config = LoRAConfig(r=2, target_modules=["0"], fused_parts={"0": 2})
        with pytest.raises(ValueError, match=f"not possible for 0: it is {what}"):
            quiet(nn.Sequential(layer), config)
    with pytest.raises(ValueError, match="on the meta device: adapt the model once"):
        adapted(block=Block().to("meta"))
    gradient = {"gradients": {"qkv": torch.zeros(4, INNER).double()}}
    with pytest.raises(ValueError, match=re.escape("the gradient of qkv is [4, 16]")):
        adapted("lora_ga", data=gradient)
    broken = Block()
    with torch.no_grad():
        broken.qkv.weight[12:16] = 0
    with pytest.raises(ValueError, match=re.escape("qkv[12:16]: weight is zero")):
        adapted("loram", broken)


def test_damaged_files(tmp_path):
    state = adapter_state(adapted("pissa"))
    layer = state.layers["qkv"]
    recipe = layer_to_dict(layer)
    factors = {key: value for key in FACTORS if (value := getattr(layer, key)) is not None}
    assert layer_from_dict(recipe, dict(factors)).parts == layer.parts
    for parts, text in (([[4, 2]], "rows 4 to 2 after"), ([[0, "a"]], "must be an integer")):
        with pytest.raises((ValueError, TypeError), match=text):
            layer_from_dict(recipe | {"parts": parts}, dict(factors))
    for parts, text in (
        (((0, 30),), r"'qkv': lora_B \[20, 6\] has no blocks for the parts \[\[0, 30\]\]"),
        (((0, 4), (4, 8), (8, 12), (12, 20)), "has no blocks for the parts"),
        (((0, 10), (10, 20)), "lora_B is not zero outside the blocks of its parts"),
    ):
        wrong = replace(state, layers={"qkv": replace(layer, parts=parts)})
        with pytest.raises(ValueError, match=text):
            check_state(wrong)


def test_other_places():
    state = adapter_state(adapted("loram"))
    config = replace(state.config, fused_parts={"^qkv": SIZES})
    moved = renamed(replace(state, config=config), "", "model")
    assert moved.config.layer_parts("model.qkv") == SIZES
    assert renamed(state, "", "model").config.fused_parts == FUSED
    with pytest.raises(ValueError, match="fused_parts is for models that are loaded"):
        initialize("model", "out", LoRAConfig(fused_parts=FUSED))


def test_mixed_batch():
    model = adapted("loram", residual="implicit").eval()
    quiet(model, LoRAConfig(r=2, target_modules=["qkv"], residual="implicit"), adapter_name="b")
    move(model, 0.1)
    x, alone = torch.randn(3, INNER, dtype=torch.float64), []
    for k, name in enumerate(("default", "b", "default")):
        set_adapter(model, name)
        alone.append(model(x[k : k + 1]))
    with torch.no_grad(), adapters_per_row(model, ["default", "b", "default"]):
        torch.testing.assert_close(model(x), torch.cat(alone).detach())
