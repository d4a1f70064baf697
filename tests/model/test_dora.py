"""Whole models with DoRA adapters (`use_dora=True`)."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    disable_adapters,
    load_adapter,
    lora_plus_groups,
    merge_lora,
    rescaling,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.layers.adapter import Adapter
from lora_kernels.layers.wrapper import LoRAWrapper
from lora_kernels.model.install import adapted_layers

from ..support.exhaustive import paired, thinned
from ..support.packages import needs_bitsandbytes, needs_safetensors, needs_transformers
from ..support.quantized import linear_4bit, linear_8bit
from ..support.ranks import RankFailed, needs_ranks, on_ranks
from ..support.running import close, logits, move, quiet, same_bits, train, weights_of
from ..support.sharded import fully_sharded, trained
from ..support.sharded import logits as logits_of_batch
from ..support.tiny_models import gpt2, llama

MODELS = {"llama": llama, "gpt2": gpt2}


def config(**options):
    return LoRAConfig(**{"r": 4, "use_dora": True} | options)


@needs_transformers
@pytest.mark.parametrize(
    "start,kind",
    paired(["loram", "lora", "lora_xs"], [("llama", "absorb"), ("gpt2", "implicit")]),
)
def test_the_life_of_an_adapter(kind, start):
    """Each step computes what the same adapter without DoRA would at its start."""
    family, residual = kind
    base = MODELS[family]()
    model, plain = copy.deepcopy(base), copy.deepcopy(base)
    report = quiet(model, config(init_lora_weights=start, residual=residual))
    quiet(plain, config(init_lora_weights=start, residual=residual, use_dora=False))
    assert f"{residual}, DoRA" in str(report) and all(row.use_dora for row in report.adapted)
    began = logits(model)
    assert close(began, logits(plain))
    losses = train(model.train(), lr=2e-2)
    model.eval()
    assert losses[-1] != losses[0] and not close(logits(model), began, 1e4)
    trained_logits = logits(model)
    for layer in adapted_layers(model).values():
        norms = layer.to_linear().weight.norm(dim=0 if layer.transposed else 1)
        assert torch.allclose(norms, layer.lora_magnitude.abs(), rtol=1e-5, atol=1e-6)
    with disable_adapters(model):
        assert close(logits(model), logits(base))
    assert close(logits(merge_lora(copy.deepcopy(model))), trained_logits)
    unload_lora(model), unload_lora(plain)
    assert same_bits(weights_of(model), weights_of(plain))


@needs_transformers
def test_embeddings_and_a_second_adapter():
    base = llama()
    model = copy.deepcopy(base)
    found = {}
    for name, targets in (("one", ["embed_tokens", "q_proj"]), ("two", ["q_proj", "up_proj"])):
        quiet(model, config(target_modules=targets, residual="implicit"), adapter_name=name)
        assert close(logits(model), logits(base))
        move(model, 0.05)
        found[name] = logits(model)
    for name, want in found.items():
        set_adapter(model, name)
        assert torch.equal(logits(model), want)
    set_adapter(model, "one")
    assert close(logits(merge_lora(model)), found["one"])


@needs_bitsandbytes
@needs_safetensors
@pytest.mark.parametrize("quantize", thinned([linear_4bit, linear_8bit]))
def test_quantized_layers(quantize, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(quantize(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 32))
    model, x = copy.deepcopy(base), torch.randn(4, 64)
    quiet(model, config(target_modules=["0", "2"], init_lora_weights="lora"))
    assert isinstance(model[0], LoRAWrapper)
    assert torch.equal(model[0](x), base[0](x))  # g is 1 exactly
    want = model[0].base_weight().norm(dim=1)
    assert torch.allclose(model[0].lora_magnitude, want, rtol=1e-6)
    move(model, 0.05)
    y = model(x)
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():  # the weight is dequantized in the graph
        assert close(torch.compile(model, fullgraph=True, backend="eager")(x), y)
    save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path, progress=False)
    assert torch.equal(other(x), y)
    assert close(merge_lora(other, dequantize=True)(x), y, 256)


@needs_transformers
def test_checkpointing_and_autocast():
    model = llama()
    quiet(model, config())
    move(model, 0.05)
    want = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model) - want).norm() < 2e-2 * want.norm()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))


def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))


def test_parameter_groups():
    """Magnitudes have A's learning rate."""
    model = plain()
    quiet(model, config(r=2, target_modules=["0", "1"]))
    rest, of_B = lora_plus_groups(model, 1e-3, ratio=4.0)
    assert {id(model[0].lora_magnitude), id(model[0].lora_A)} < {id(p) for p in rest["params"]}
    assert {id(p) for p in of_B["params"]} == {id(layer.lora_B) for layer in model}
    with pytest.raises(ValueError, match="a layer trains magnitudes"):
        rescaling.Setup("adam", 8.0, 1e-3, 1e-3).groups(model)


def test_an_error_undoes_all(monkeypatch):
    """Also of the layers that were finished already."""
    model = plain()
    before, measure_ = weights_of(copy.deepcopy(model)), Adapter.measure_

    def fails_later(adapter, weight):
        if len(weight) == 6:
            raise MemoryError
        measure_(adapter, weight)

    monkeypatch.setattr(Adapter, "measure_", fails_later)
    with pytest.raises(MemoryError):
        add_lora(model, config(r=2, target_modules=["0", "1"]), progress=False)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(torch.allclose(w, before[n], atol=1e-6) for n, w in weights_of(model).items())


def refused(model, match, targets, **options):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        quiet(model, config(r=2, target_modules=targets, **options))
    if not next(model.parameters()).is_meta:
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_what_is_refused():
    with pytest.raises(ValueError, match="not implemented for target_parameters"):
        config(target_parameters=["experts.down_proj"])
    with pytest.raises(TypeError, match="use_dora must be True or False, got 'yes'"):
        config(use_dora="yes")
    with torch.device("meta"):
        waiting = plain()
    refused(waiting, "use_dora=True is not possible: 0 is on the meta device", ["0"])
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    refused(grouped, "0 is a convolution with groups", ["0"])
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    refused(attention, r"a is an nn\.MultiheadAttention", ["a"])
    infinite = plain()
    infinite[0].weight.data[1, 1] = torch.inf
    match = "0: use_dora needs the norms of the weight's rows, and one is not finite"
    refused(infinite, match, ["0"], init_lora_weights="lora")
    assert type(infinite[0]) is nn.Linear


@needs_ranks
@needs_transformers
@needs_safetensors
def test_sharded_after_it_was_adapted():
    """FSDP2 gathers W, A, B and m for each forward: training is that of one process."""
    base, alone = logits_of_batch(llama()), llama()
    quiet(alone, config())
    want = trained(alone, steps=2)

    def work(rank):
        model = llama()
        quiet(model, config())
        fully_sharded(model)
        start = float((logits_of_batch(model) - base).abs().max())
        losses = trained(model, steps=2)
        with pytest.raises(ValueError, match=r"a DoRA one .* is not merged into a sharded weight"):
            merge_lora(model)
        unload_lora(model)
        end = float((logits_of_batch(model) - base).abs().max())
        with pytest.raises(ValueError, match=r"q_proj is sharded: adapt the model before it is"):
            quiet(model, config())
        return start, losses, end

    start, losses, end = on_ranks(2, work)[0]
    assert max(start, end) < 1e-5
    assert max(abs(a - b) for a, b in zip(losses, want, strict=True)) < 1e-5


@needs_ranks
@needs_transformers
def test_data_parallel_and_tensor_parallel():
    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = llama()
        quiet(model, config(target_modules=["up_proj"]))
        losses = trained(nn.parallel.DistributedDataParallel(model), steps=2)
        plan = {"model.layers.*.mlp.up_proj": ColwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        if rank == 0:
            logits_of_batch(model)
        return losses

    first, second = on_ranks(2, work, check=False)
    assert isinstance(first, RankFailed) and "a DoRA adapter (use_dora) cannot run" in first.text
    model = llama()
    quiet(model, config(target_modules=["up_proj"]))
    want = trained(model, steps=2)
    assert max(abs(a - b) for a, b in zip(second, want, strict=True)) < 1e-5


@needs_ranks
@needs_transformers
def test_weights_of_the_first_rank_only():
    """accelerate's FSDP copies the first process's parameters, magnitudes with them, to the others,
    which have no weights while the adapters start.
    """
    base = logits(llama())

    def work(rank):
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        model = llama()
        if rank:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
        quiet(model, config())
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        return logits(model), model.model.layers[0].mlp.up_proj.lora_magnitude.requires_grad

    for found, trains in on_ranks(2, work):
        assert close(found, base) and trains
