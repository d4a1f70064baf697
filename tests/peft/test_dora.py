"""PEFT's DoRA layers (`use_dora`), accelerated and with the starts of this package."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import load_adapter
from lora_kernels.layers.base import base_of
from lora_kernels.model.lora import adapter_state

from ..support.exhaustive import paired
from ..support.packages import needs_bitsandbytes
from ..support.peft_models import MODELS, accelerate, adapted, initialize, linear_layers
from ..support.quantized import linear_4bit
from ..support.running import close, logits, move, token_ids, train
from ..support.tiny_models import llama

peft = pytest.importorskip("peft")
DTYPES = [torch.float32, torch.bfloat16]


def dora(base, **options):
    return adapted(base, use_dora=True, **options)


def magnitudes(model, adapter="default"):
    layers = linear_layers(model).items()
    return {n: layer.lora_magnitude_vector[adapter].weight for n, layer in layers}


def loss_and_grads(model):
    model.zero_grad()
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family,dtype", paired(sorted(MODELS), DTYPES))
def test_fused_layers_compute_as_peft_s(family, dtype):
    """Outputs and all gradients; exactly PEFT's after `undo`."""
    model = dora(MODELS[family](dtype=dtype))
    move(model, 0.05)
    loss, grads = loss_and_grads(model)
    report = accelerate(model)
    assert report.layers and not report.left
    fused, fused_grads = loss_and_grads(model)
    allowed = 2e-5 if dtype == torch.float32 else 3e-2
    assert abs(fused - loss) <= allowed and fused_grads.keys() == grads.keys()
    assert any("lora_magnitude_vector" in name for name in grads)
    for name, grad in grads.items():
        assert (fused_grads[name] - grad).norm() <= allowed * grad.norm(), name
    report.undo()
    assert torch.equal(loss_and_grads(model)[0], loss)


def test_dropout_is_left_to_peft():
    """PEFT drops parts of x for the base's product too."""
    model = dora(llama(), lora_dropout=0.5)
    move(model, 0.05)
    x = torch.randn(3, 32)
    layer = next(iter(linear_layers(model).values()))
    accelerate(model)

    def both():
        found = []
        for run in (layer, lambda x: type(layer).forward(layer, x)):
            torch.manual_seed(0)
            found.append(run(x))
        return found

    assert torch.equal(*both()) is False  # fused: another order of sums
    layer.train()
    assert torch.equal(*both())


def test_training_accelerated():
    base = llama()
    models = [dora(base), dora(base)]
    accelerate(models[1])
    losses = [train(model.train(), steps=4) for model in models]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 2e-5


def test_a_hooked_magnitude_is_left_to_peft():
    model = dora(llama(), target_modules=["layers.0.mlp.up_proj"])
    layer = next(iter(linear_layers(model).values()))
    calls = []
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: calls.append(1))
    report = accelerate(model)
    assert list(report.left.values()) == ["its lora_magnitude_vector has hooks or is wrapped"]
    logits(model)
    assert calls


@pytest.mark.parametrize(
    "kind,start",
    paired([("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", ["embed_tokens", "q_proj"])],
           ["loram", "lora", "pissa"]),
)  # fmt: skip
def test_starts(kind, start, tmp_path):
    """The magnitudes are those of the started layer: at first the model computes what its base
    computes. Files, merging and `undo` are right.
    """
    base = MODELS[kind[0]]()
    want = logits(base)
    model = dora(base, target_modules=kind[1])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    report = initialize(model, start)
    assert not report.left
    assert close(logits(model), want)
    fused = accelerate(model)
    assert close(logits(model), want)
    train(model.train(), steps=2)
    model.eval()
    after = logits(model)
    fused.undo()
    assert close(logits(model), after)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert close(logits(plain), after, 256)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path, progress=False)
    assert close(logits(ours), after, 256)
    for name, layer in adapter_state(ours).layers.items():
        assert torch.equal(layer.lora_magnitude, magnitudes(model)[name])
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert close(logits(model), after)
    model.delete_adapter("again")
    model.set_adapter("default")
    model.merge_adapter()
    assert close(logits(model), after, 256)
    model.unmerge_adapter()
    assert close(logits(copy.deepcopy(model).merge_and_unload(safe_merge=True)), after, 256)
    with model.disable_adapter():
        assert close(logits(model), want, 256)  # unmerged, to some roundings
    report.undo()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name]), name


def test_dropout_of_a_start_is_that_of_peft():
    """As PEFT computes DoRA over a base W − s·B₀A₀."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10))
    model = adapted(base, use_dora=True, target_modules=["0"], lora_dropout=0.5)
    initialize(model, "pissa")
    residual = copy.deepcopy(base)
    layer = model.base_model.model[0]
    start_A, start_B = layer.lora_start_A["default"], layer.lora_start_B["default"]
    with torch.no_grad():
        residual[0].weight -= layer.scaling["default"] * start_B @ start_A
    other = adapted(residual, use_dora=True, target_modules=["0"], lora_dropout=0.5)
    move(model.train(), 0.1)
    own = {n: p for n, p in model.state_dict().items() if "lora_" in n and "start" not in n}
    other.load_state_dict(own, strict=False)
    x = torch.randn(4, 12)
    found = []
    for run in (model, other.train()):
        torch.manual_seed(3)
        found.append(run(x))
    assert close(*found, 64)


def test_the_same_configuration_for_a_second_adapter():
    """As TRL makes a reference model: the start and magnitudes of the base."""
    base = llama()
    model = dora(base)
    initialize(model, "pissa")
    train(model.train(), steps=1)
    model.eval().add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert close(logits(model), logits(base))


def test_magnitudes_in_16_bits_are_the_nearest():
    base = llama(dtype=torch.bfloat16)
    model = dora(base, autocast_adapter_dtype=False)
    initialize(model, "lora")
    for name, magnitude in magnitudes(model).items():
        norms = base.get_submodule(name).weight.double().norm(dim=1)
        assert torch.equal(magnitude, norms.to(torch.bfloat16))


@needs_bitsandbytes
def test_quantized_layers():
    torch.manual_seed(0)
    base = nn.Sequential(linear_4bit(nn.Linear(64, 64)))
    x = torch.randn(4, 64)
    model = adapted(base, use_dora=True, target_modules=["0"]).train()
    initialize(model, "loram")
    norms = base_of(base[0]).weight().norm(dim=1)
    assert torch.allclose(magnitudes(model)["0"], norms, rtol=1e-6)
    want = base.train()(x)  # in evaluation bitsandbytes has another kernel for CPUs
    assert torch.equal(model(x), want)
    move(model, 0.05)
    y = model(x)
    y.square().sum().backward()
    assert not close(y, want) and not accelerate(model).layers
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


class Mixed(nn.Module):
    """A convolution before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def test_files_with_convolutions(tmp_path):
    """`initialize` starts the linear layer alone; the file has the magnitudes of both."""
    torch.manual_seed(0)
    base, x = Mixed(), torch.randn(2, 3, 5, 5)
    model = adapted(base, use_dora=True, target_modules=["conv", "head"])
    assert initialize(model, "pissa").layers == ["head"]
    move(model, 0.1)
    want = model(x)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path, progress=False)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    for other in (plain, ours, model.eval()):
        assert close(other(x), want)
