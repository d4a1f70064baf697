"""Run, train and compare whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    adapter_names,
    add_lora,
    capture_activations,
    capture_gradients,
)
from lora_kernels.init import Activations, Initializer
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.report import LoRAReport

from .tiny_models import VOCABULARY

# For float64 models: the rounding of some ten layers, on logits of size 1.
TIGHT = 1e-11


def token_ids(rows: int = 3, length: int = 12, seed: int = 1) -> Tensor:
    """Random token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None, **options) -> Tensor:
    """The logits, in the model's current mode."""
    ids = (token_ids() if ids is None else ids).to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False, **options).logits


def quiet(model: nn.Module, config: LoRAConfig | None = None, **options) -> LoRAReport:
    """`add_lora` without a progress bar."""
    return add_lora(model, config, progress=False, **options)


def start_data(model: nn.Module, config: LoRAConfig, **options: Any) -> dict[str, Any]:
    """The arguments of `add_lora` that the start of `config` needs, captured from one batch of
    random tokens; `options` go to the function that captures them.
    """
    ids = token_ids().to(next(model.parameters()).device)
    batches = [{"input_ids": ids, "labels": ids}]
    if config.initializer.needs_gradient:
        return {"gradients": capture_gradients(model, batches, progress=False, **options)}
    if config.initializer.needs_activations:
        return {"activations": capture_activations(model, batches, progress=False, **options)}
    return {}


def layer_data(initializer: Initializer, weight: Tensor) -> dict[str, Any]:
    """Random data for one weight [out, in]: the arguments that the initializer, or a layer with
    that start, needs.
    """
    if initializer.needs_gradient:
        return {"gradient": torch.randn_like(weight)}
    if initializer.needs_activations:
        rows = weight.new_empty(3 * weight.shape[1], weight.shape[1]).normal_()
        return {"activations": Activations.of(rows)}
    return {}


def trained(model: nn.Module) -> nn.Module:
    """Changes all trainable parameters at random; returns the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2, seed: int = 2) -> list[float]:
    """The losses of a few steps of AdamW on random tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        ids = token_ids(seed=seed + step).to(parameters[0].device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def move(model: nn.Module, size: float = 0.02, seed: int = 0) -> None:
    """Adds noise to all trainable parameters, in place of training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise.to(parameter.dtype))


def training_arguments(folder, **options):
    """Arguments of transformers' Trainer: four steps on the CPU, a checkpoint every second step."""
    from transformers import TrainingArguments

    defaults = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    defaults |= {"learning_rate": 1e-2, "use_cpu": True, "dataloader_pin_memory": False}
    defaults |= {"report_to": [], "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **defaults | options)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state_dicts are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Returns a check that the model is still the same, bit for bit."""
    modules = {name: (module, set(vars(module))) for name, module in model.named_modules()}
    parameters = {n: (p, p.requires_grad, p.grad) for n, p in model.named_parameters()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = adapter_names(model)
    modes = {name: layer.adapter_enabled for name, layer in adapted_layers(model).items()}

    def check() -> None:
        after = dict(model.named_modules())
        assert after.keys() == modules.keys()
        for name, (module, attributes) in modules.items():
            assert after[name] is module and set(vars(module)) == attributes
        found = dict(model.named_parameters())
        assert found.keys() == parameters.keys()
        for name, (parameter, trains, grad) in parameters.items():
            assert found[name] is parameter
            assert parameter.requires_grad == trains and parameter.grad is grad
        state = model.state_dict()
        assert state.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert adapter_names(model) == adapters
        assert {n: lay.adapter_enabled for n, lay in adapted_layers(model).items()} == modes

    return check


@torch.no_grad()
def close(got: Tensor, want: Tensor, roundings: float = 64) -> bool:
    """Whether the two agree to `roundings` float32 roundings of the largest entry.

    A few layers sum a hundred terms each, in a different order.
    """
    tolerance = roundings * torch.finfo(torch.float32).eps * float(want.abs().max())
    return float((got - want).abs().max()) <= tolerance
