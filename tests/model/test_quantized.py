"""Whole models over quantized bases: bitsandbytes, torchao, GPTQ-like layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    disable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import LoftQ
from lora_kernels.layers.base import base_of
from lora_kernels.layers.wrapper import LoRAWrapper
from lora_kernels.model.install import adapted_layers
from lora_kernels.training.trainer import accepted_by_trainer

from ..support.oracle import loram_beta, to_numpy
from ..support.packages import (
    needs_bitsandbytes,
    needs_safetensors,
    needs_torchao,
    needs_transformers,
)
from ..support.quantized import ForInference, OnlyForward, linear_4bit, linear_8bit
from ..support.running import training_arguments
from ..support.tiny_models import llama

KINDS = [
    pytest.param("nf4", marks=needs_bitsandbytes),
    pytest.param("nf4_double", marks=needs_bitsandbytes),
    pytest.param("fp4", marks=needs_bitsandbytes),
    pytest.param("int8", marks=needs_bitsandbytes),
    pytest.param("torchao_int8", marks=needs_torchao),
    pytest.param("torchao_int8_dynamic", marks=needs_torchao),
    pytest.param("torchao_int4", marks=needs_torchao),
    "gptq",
    "inference",
]


class Block(nn.Module):
    """A gated MLP with a residual, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.gate, self.up = nn.Linear(64, 128), nn.Linear(64, 128, bias=False)
        self.down, self.head = nn.Linear(128, 64), nn.Linear(64, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


TARGETS = ("gate", "up", "down")


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Quantize the targets of the model in place."""
    if kind.startswith("torchao"):
        import torchao.quantization as ao

        config = {
            "torchao_int8": ao.Int8WeightOnlyConfig,
            "torchao_int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
            "torchao_int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        }[kind]()
        ao.quantize_(model, config, lambda _, name: name in TARGETS)
        return model
    make: Callable[[nn.Linear], nn.Module] = {
        "nf4": linear_4bit,
        "nf4_double": lambda linear: linear_4bit(linear, nested=True),
        "fp4": lambda linear: linear_4bit(linear, quant_type="fp4"),
        "int8": linear_8bit,
        "gptq": lambda m: OnlyForward(m.weight.detach(), m.bias, m.weight.dtype),
        "inference": lambda m: ForInference(m.weight.detach(), m.bias, m.weight.dtype),
    }[kind]
    for name in TARGETS:
        setattr(model, name, make(getattr(model, name)))
    return model


IDS = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def train(model: nn.Module, steps: int = 5) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return float(loss_of(model).detach())


def config(**options) -> LoRAConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    return LoRAConfig(**options)


@pytest.mark.parametrize("start", ["loram", "pissa", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_training_and_the_base(kind, start):
    """The first loss equals the base's to the last bit, and so do the model with its adapter
    disabled and the base after unloading.
    """
    model = quantize(Block(), kind)
    untouched = copy.deepcopy(model)
    with torch.no_grad():
        base = model(IDS)
        before = loss_of(model)
    report = add_lora(model, config(init_lora_weights=start))
    assert all(isinstance(getattr(model, name), LoRAWrapper) for name in TARGETS)
    assert len(adapted_layers(model)) == 3 and "cannot be rewritten" in str(report)
    with torch.no_grad():
        assert torch.equal(model(IDS), base) and torch.equal(loss_of(model), before)
    assert torch.equal(loss_of(model).detach(), before)
    assert train(model) < float(before) - 0.05
    with torch.no_grad():
        assert not torch.equal(model(IDS), base)
        with disable_adapters(model):
            assert torch.equal(model(IDS), base)
        unload_lora(model)
        assert torch.equal(model(IDS), base)
        assert torch.equal(untouched(IDS), base)


@pytest.mark.parametrize("kind", KINDS)
def test_beta_is_that_of_the_dequantized_weight(kind):
    model = quantize(Block(), kind)
    weights = {name: to_numpy(base_of(getattr(model, name)).weight()) for name in TARGETS}
    add_lora(model, config())
    for name, layer in adapted_layers(model).items():
        beta = layer.layer_state().beta
        assert beta == pytest.approx(loram_beta(weights[name], 4), rel=1e-6)


@needs_safetensors
@pytest.mark.parametrize("format", ["peft", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, format, tmp_path):
    model = quantize(Block(), kind)
    fresh = copy.deepcopy(model)
    add_lora(model, config())
    train(model)
    save_adapter(model, tmp_path / "adapter", format=format)
    load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh(IDS), model(IDS))
    assert train(fresh) == pytest.approx(train(model), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_base(kind):
    """The gradients of the factors and of the layers below are those of the same model over
    dequantized weights; where the base quantizes its input, they pass straight through.
    """
    torch.manual_seed(0)
    model = quantize(Block(), kind)
    plain = copy.deepcopy(model)
    for name in TARGETS:
        layer = getattr(plain, name)
        weight, bias = base_of(layer).weight(), getattr(layer, "bias", None)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        linear.weight.data.copy_(weight)
        if bias is not None:
            linear.bias.data.copy_(bias)
        setattr(plain, name, linear)
    for one in (model, plain):
        add_lora(one, config(residual="implicit", modules_to_save=["embed"]))
        loss_of(one).backward()
    rounded = kind in ("int8", "torchao_int8_dynamic")  # x to 8 bits
    seen = 0
    named = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        want = to_numpy(named[name].grad)
        error = np.linalg.norm(to_numpy(parameter.grad) - want)
        assert error <= (0.1 if rounded else 1e-4) * np.linalg.norm(want), name
        seen += 1
    assert seen == 7


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_evaluations_and_checkpoints_leave_the_base_alone(kind):
    """On a CPU with AVX512-BF16, bitsandbytes packs its 4-bit weights permanently at the first
    forward in eval mode, gives no gradient from then on, and unpacks them wrongly in
    state_dict().
    """
    model = quantize(Block(), kind)
    with torch.no_grad():
        base = model(IDS)
    add_lora(model, config())
    train(model, 2)
    model.eval()
    with torch.no_grad():
        before = float(loss_of(model))
        model.state_dict()
        with disable_adapters(model):
            assert torch.equal(model(IDS), base)
    assert train(model.train(), 3) < before - 0.02
    with torch.no_grad(), disable_adapters(model):
        assert torch.equal(model(IDS), base)


@needs_bitsandbytes
def test_a_base_that_is_packed_already():
    """The model is told so, trains all the same, and starts from the same function."""
    model = quantize(Block(), "nf4").eval()
    with torch.no_grad():
        base = model(IDS)
    if not getattr(model.gate.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor's 4-bit layers are not packed")
    with pytest.warns(UserWarning, match=r"packed this 4-bit model for inference.*Load it again"):
        add_lora(model, config())
    with torch.no_grad():
        assert torch.equal(model(IDS), base)
        before = float(loss_of(model))
    assert train(model.train()) < before - 0.05
    with torch.no_grad(), disable_adapters(model):
        assert torch.equal(model(IDS), base)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_into_floating_point(kind):
    model = quantize(Block(), kind)
    add_lora(model, config())
    train(model)
    with torch.no_grad():
        want = model(IDS)
    with pytest.raises(ValueError, match=r"3 layers are quantized .*dequantize=True"):
        merge_lora(model)
    merge_lora(model, dequantize=True)
    assert all(type(getattr(model, name)) is nn.Linear for name in TARGETS)
    # Where x is quantized too, it has 8 bits.
    room = 0.05 if kind in ("int8", "torchao_int8_dynamic") else 1e-5
    assert (model(IDS) - want).norm() <= room * want.norm()


def test_second_adapter_shares_the_base():
    model = quantize(Block(), "gptq")
    with torch.no_grad():
        base = model(IDS)
    add_lora(model, config())
    train(model)
    with torch.no_grad():
        first = model(IDS)
    add_lora(model, config(r=2), adapter_name="second")
    with torch.no_grad():
        assert torch.equal(model(IDS), base)
        set_adapter(model, "default")
        assert torch.equal(model(IDS), first)


class TestLoftQ:
    @pytest.mark.parametrize("kind", KINDS)
    def test_original_weights(self, kind):
        """The start corrects part of the quantization error; disabled, the model is the base."""
        torch.manual_seed(0)
        original = Block()
        model = quantize(copy.deepcopy(original), kind)
        with torch.no_grad():
            exact, base = original(IDS), model(IDS)
        options = {"original_weights": original.state_dict()}
        add_lora(model, config(r=32, init_lora_weights="loftq"), **options)
        with torch.no_grad():
            start = model(IDS)
            with disable_adapters(model):
                assert torch.equal(model(IDS), base)
        # Rounding x to 8 bits is most of the error of 8-bit weights.
        part = 1.0 if kind == "torchao_int8_dynamic" else 0.9
        assert (start - exact).norm() < part * (base - exact).norm()
        for name, layer in adapted_layers(model).items():
            W = to_numpy(getattr(original, name).weight)
            error = W - to_numpy(base_of(layer.base_layer).weight())
            rest = error - layer.scaling * to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
            sigma = np.linalg.svd(error, compute_uv=False)
            assert np.linalg.norm(rest) <= 1.02 * np.linalg.norm(sigma[32:])
        before = float(loss_of(model).detach())
        assert train(model) < before - 0.05

    @needs_safetensors
    def test_of_a_checkpoint(self, tmp_path):
        from safetensors.torch import save_file

        original = Block()
        save_file(original.state_dict(), tmp_path / "model.safetensors")
        model = quantize(copy.deepcopy(original), "gptq")
        other = copy.deepcopy(model)
        add_lora(model, config(init_lora_weights="loftq"), original_weights=tmp_path)
        options = {"original_weights": original.state_dict()}
        add_lora(other, config(init_lora_weights=LoftQ()), **options)
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two), name

    def test_a_float_model(self):
        """Its base becomes the quantizer's values, in place, and the start is near W."""
        model = Block()
        original = copy.deepcopy(model)
        add_lora(model, config(r=16, init_lora_weights="loftq"))
        with torch.no_grad():
            exact, start = original(IDS), model(IDS)
            for name in TARGETS:
                layer = getattr(model, name)
                blocks = layer.weight.view(-1, 64)
                assert all(len(block.unique()) <= 16 for block in blocks)
            with disable_adapters(model):
                base = model(IDS)
        assert 0 < (start - exact).norm() < 0.1 * exact.norm()
        torch.testing.assert_close(base, start, rtol=1e-4, atol=1e-4)

    @needs_safetensors
    @pytest.mark.parametrize("format", ["peft", "native"])
    def test_the_adapter_is_one_of_the_new_base(self, format, tmp_path):
        """Saved separately, it fits the rewritten base, in floating point or quantized again."""
        from safetensors.torch import load_file

        model = Block()
        add_lora(model, config(init_lora_weights="loftq"))
        train(model)
        with torch.no_grad():
            want = model(IDS)
        base = Block()
        base.load_state_dict(model.state_dict(), strict=False)
        with pytest.warns(UserWarning, match="LoftQ has given the model another base"):
            save_adapter(model, tmp_path, format=format)
        if format == "peft":  # no more than A and B
            stored = load_file(tmp_path / "adapter_model.safetensors")
            assert stored["base_model.model.up.lora_A.weight"].shape == (4, 64)
        load_adapter(base, tmp_path)
        with torch.no_grad():
            assert torch.equal(base(IDS), want)

    def test_errors(self):
        original = Block()
        model = quantize(copy.deepcopy(original), "gptq")
        state = original.state_dict()

        def refused(match: str, weights=None, init="loftq", model=model) -> None:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            with pytest.raises(ValueError, match=match):
                add_lora(model, config(init_lora_weights=init), original_weights=weights)
            after = model.state_dict()
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert not adapted_layers(model)

        refused(r"gate is quantized already \(forward\): without .*original_weights=")
        refused("LoRAM does not use original_weights", state, "loram")
        refused("no weight of 'gate'; did you mean", {"gates.weight": state["gate.weight"]})
        refused(r"'up\.weight' is \[3, 3\]", {**state, "up.weight": torch.ones(3, 3)})
        refused("for quantized layers, of which there are none", state, model=original)
        dequantized = {f"{n}.weight": base_of(getattr(model, n)).weight() for n in TARGETS}
        refused(r"gate: the quantization error W − Q is zero", dequantized)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """The folder of a saved Llama."""
    folder = tmp_path_factory.mktemp("llama")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@needs_transformers
@needs_bitsandbytes
class TestTransformers:
    """A model that transformers quantizes while loading it."""

    def load(self, folder, bits: int, dtype=torch.float32):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantized = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        quantized |= {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
        options = quantized if bits == 4 else {"load_in_8bit": True}
        return AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**options),
            device_map={"": "cpu"},
            dtype=dtype,
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_loop(self, bits, dtype, tiny_llama, tmp_path):
        model = self.load(tiny_llama, bits, dtype).train()
        ids = torch.randint(96, (4, 16))
        before = model(input_ids=ids, labels=ids).loss.detach()
        add_lora(model, LoRAConfig(r=8, lora_alpha=16))
        assert len(adapted_layers(model)) == 14  # not the head
        assert torch.equal(model(input_ids=ids, labels=ids).loss.detach(), before)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        after = model(input_ids=ids, labels=ids).loss.detach()
        assert after < before - 0.05
        save_adapter(model, tmp_path / "adapter")
        fresh = self.load(tiny_llama, bits, dtype).train()
        load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(input_ids=ids, labels=ids).loss.detach(), after)
        with disable_adapters(model):
            assert torch.equal(model(input_ids=ids, labels=ids).loss.detach(), before)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_loftq_of_the_checkpoint(self, bits, tiny_llama):
        """The original weights come from the folder that was quantized while loading."""
        from transformers import AutoModelForCausalLM

        ids = torch.randint(96, (2, 16))
        with torch.no_grad():
            exact = AutoModelForCausalLM.from_pretrained(tiny_llama)(input_ids=ids).logits
            model = self.load(tiny_llama, bits).train()
            base = model(input_ids=ids).logits
            config = LoRAConfig(r=32, lora_alpha=32, init_lora_weights="loftq")
            add_lora(model, config, original_weights=tiny_llama)
            start = model(input_ids=ids).logits
            # bitsandbytes' 8-bit layers also round x, which no adapter compensates for.
            part = 0.8 if bits == 4 else 1.0
            assert (start - exact).norm() < part * (base - exact).norm()
            with disable_adapters(model):
                assert torch.equal(model(input_ids=ids).logits, base)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_loftq_from_floating_point_to_4_bits(self, dtype, tiny_llama, tmp_path):
        """The paper's procedure: make the base in floating point, save it, load it in 4 bits with
        its adapter, trained before or not. The model computes the same throughout.
        """
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
        ids = torch.randint(96, (2, 16))
        add_lora(model, LoRAConfig(r=8, lora_alpha=16, init_lora_weights="loftq"))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.sub_(0.1 * parameter.grad)
            want = model(input_ids=ids).logits
        with pytest.warns(UserWarning, match="LoftQ has given the model another base"):
            save_adapter(model, tmp_path / "adapter")
        model.save_pretrained(tmp_path / "base")
        quantized = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype=dtype,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            ),
        )
        load_adapter(quantized, tmp_path / "adapter")
        for name, layer in adapted_layers(quantized).items():
            base = base_of(layer.base_layer).weight().to(dtype)
            assert torch.equal(base, model.get_submodule(name).weight)
        with torch.no_grad():
            got = quantized(input_ids=ids).logits
        # The two round their bfloat16 sums in different orders.
        room = 1e-5 if dtype == torch.float32 else 2e-2
        assert (got - want).norm() <= room * want.norm()

    @pytest.mark.parametrize("bits", [4, 8])
    def test_trainer(self, bits, tiny_llama, tmp_path):
        """Training, evaluating, saving and resuming give the same bits; a model without adapters is
        still refused.
        """
        pytest.importorskip("accelerate")
        from transformers import Trainer

        rows = torch.randint(96, (16, 16))
        data = [{"input_ids": row, "labels": row} for row in rows]
        options = training_arguments(
            tmp_path, eval_steps=1, eval_strategy="steps", per_device_train_batch_size=4
        )
        with pytest.raises(ValueError, match="has no adapters: add_lora first"):
            accepted_by_trainer(self.load(tiny_llama, bits)).__enter__()
        runs = []
        for resume in (None, str(tmp_path / "checkpoint-2")):
            model = self.load(tiny_llama, bits)
            add_lora(model, LoRAConfig(r=8, lora_alpha=16))
            with pytest.raises(ValueError, match="purely quantized models"):
                Trainer(model, options, train_dataset=data)
            with accepted_by_trainer(model):
                trainer = Trainer(model, options, train_dataset=data, eval_dataset=data[:4])
            assert not model._hf_peft_config_loaded
            trainer.train(resume_from_checkpoint=resume)
            runs.append(adapted_layers(model))
        fresh = self.load(tiny_llama, bits)
        for name, one in runs[0].items():
            assert torch.equal(one.lora_A, runs[1][name].lora_A)
            assert torch.equal(one.lora_B, runs[1][name].lora_B)
            assert not torch.equal(one.lora_B, one.start_B)
            # After evaluations and checkpoints the base is still the one that was loaded.
            base = base_of(one.base_layer).weight()
            assert torch.equal(base, base_of(fresh.get_submodule(name)).weight())
