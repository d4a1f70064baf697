"""Trained adapters of single layers and of tiny models, with their true ΔW in float64."""

from __future__ import annotations

import copy
import functools
import json
import random
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.layers.kinds import is_conv1d
from lora_kernels.layers.state import LayerState
from lora_kernels.model.config import AdapterState, LoRAConfig

from .oracle import to_numpy
from .running import layer_data
from .tiny_models import bert, gpt2, llama

safetensors = pytest.importorskip("safetensors.torch")

FACTORS = ("lora_A", "lora_B", "lora_R", "start_A", "start_B")
LLAMA_LAYERS = [
    f"model.layers.{block}.{end}"
    for block in (0, 1)
    for end in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]
GPT2_LAYERS = [
    f"transformer.h.{block}.{end}" for block in (0, 1) for end in ("attn.c_attn", "mlp.c_fc")
]
IDS = torch.arange(24).reshape(2, 12) * 5 % 64


def adapt(linear: nn.Linear, config: LoRAConfig, name: str = "", residual: str = "absorb"):
    """The trained state of a layer over a copy of `linear`, and its true ΔW in float64."""
    initializer = config.initializer
    layer = LoRALinear.from_linear(
        copy.deepcopy(linear),
        r=config.layer_rank(name),
        lora_alpha=config.layer_alpha(name),
        scaling=config.scaling_rule,
        init_lora_weights=initializer,
        residual=residual,
        **layer_data(initializer, linear.weight.detach()),
    )
    adapter = layer.active()

    def product():
        B, A = to_numpy(adapter.lora_B), to_numpy(adapter.lora_A)
        if adapter.lora_diag is not None:
            return B * to_numpy(adapter.lora_diag) @ A
        return B @ A if adapter.lora_R is None else B @ to_numpy(adapter.lora_R) @ A

    if initializer.has_diag:  # the product of the factors is not what is subtracted
        start = to_numpy(adapter.start_B) @ to_numpy(adapter.start_A)
    else:
        start = product() if initializer.changes_base else 0.0
    with torch.no_grad():
        for factor in (p for p in adapter.parameters() if p.requires_grad):
            spread = factor.square().mean().sqrt()
            factor.add_(0.1 * spread + 0.05, alpha=random.uniform(0.5, 1.5))
            factor.add_(0.05 * torch.randn_like(factor))
    return layer.layer_state(), layer.scaling * (product() - start)


def one_layer(rows=40, cols=48, **options):
    options = {"r": 4, "lora_alpha": 8, **options}
    residual = options.pop("residual", "absorb")
    config = LoRAConfig(**options)
    layer, delta = adapt(nn.Linear(cols, rows), config, "block.1.q", residual)
    return AdapterState(config, {"block.1.q": layer}, base_model="some/base"), delta


def assert_same(got: AdapterState, want: AdapterState) -> None:
    """Asserts that both states are equal bit for bit, including dtypes."""
    assert got.config == want.config and got.base_model == want.base_model
    assert list(got.layers) == list(want.layers) and got.extra.keys() == want.extra.keys()
    for name, tensor in want.extra.items():
        assert got.extra[name].dtype == tensor.dtype and torch.equal(got.extra[name], tensor)
    for name, layer in want.layers.items():
        for field in fields(LayerState):
            a, b = getattr(got.layers[name], field.name), getattr(layer, field.name)
            if isinstance(b, torch.Tensor):
                assert a.dtype == b.dtype and torch.equal(a, b), (name, field.name)
            else:
                assert a == b, (name, field.name)


def peft_config(folder) -> dict:
    return json.loads((folder / ADAPTER_CONFIG).read_text())


def logits_64(model, deltas: dict[str, np.ndarray], ids, extra=None):
    """The logits of the model with W + ΔW, in float64."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            module = model.get_submodule(name)
            delta = torch.from_numpy(delta)
            module.weight.add_(delta.T if is_conv1d(module) else delta)
        tensors = dict(model.named_parameters())
        for name, tensor in (extra or {}).items():
            tensors[name].copy_(tensor)
        return model(ids).logits


def plain_linear(module) -> nn.Linear:
    if not is_conv1d(module):
        return module
    weight = module.weight.detach().T
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), module.bias
    return linear


def adapt_model(model, names, config):
    layers, deltas = {}, {}
    for name in names:
        layers[name], deltas[name] = adapt(plain_linear(model.get_submodule(name)), config, name)
    return AdapterState(config, layers), deltas


def peft_logits(model, folder, strict=True):
    """(the model as loaded by PEFT, its logits); `strict` turns warnings into errors."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # PEFT warns about keys and options that it ignores.
        warnings.simplefilter("error" if strict else "ignore")
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    with torch.no_grad():
        return adapted, adapted.eval()(IDS).logits


def assert_agree(got, want) -> None:
    # Two blocks in float32 and in float64 differ by some roundings of the largest logit.
    assert (got.double() - want).abs().max() <= 3e-5 * want.abs().max()


def train(model, steps, optimizer=None):
    """Trains for some steps, continuing from the state `optimizer`; returns the new state."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fresh = torch.optim.AdamW(parameters, lr=1e-2)
    if optimizer is not None:
        fresh.load_state_dict(copy.deepcopy(optimizer))  # AdamW would use these very tensors
    model.train()
    for _ in range(steps):
        fresh.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        fresh.step()
    model.eval()
    return copy.deepcopy(fresh.state_dict())


@functools.cache
def tiny_model(kind: str):
    """A shared model that tests must not change; logits depend on all of its weights."""
    pytest.importorskip("transformers")
    if kind == "gpt2":
        return gpt2(seed=1, n_embd=64, initializer_range=0.1)
    make = {"llama": llama, "bert": bert}[kind]
    return make(seed=1, hidden_size=64, intermediate_size=96, initializer_range=0.1)


def write_plain(folder, tensors=None, **options) -> None:
    """Writes an adapter of one layer, as PEFT does."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q"], **options}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    if tensors is None:
        tensors = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
    tensors = {f"base_model.model.a.q.{k}.weight": v for k, v in tensors.items()}
    safetensors.save_file(tensors, folder / ADAPTER_FILE)
