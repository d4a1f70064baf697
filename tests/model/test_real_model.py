"""A real pretrained model from end to end: adapt, initialize, train, disable, merge, reload."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from benchmarks.common import smollm2
from lora_kernels import LoRALinear

from ..support import ROOT
from ..support.exhaustive import EXHAUSTIVE
from ..support.packages import needs_demo, needs_real_model
from ..support.running import logits

pytestmark = needs_real_model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = smollm2.load_tokenizer()
    training, _ = smollm2.load_texts()
    return smollm2.tokenize(tokenizer, training[:1])[0][None, :48]


def adapt(model, blocks=None, **kwargs) -> list[LoRALinear]:
    model.requires_grad_(False)
    layers = []
    for name, linear in smollm2.target_projections(model, blocks).items():
        layers.append(LoRALinear.from_linear(linear, r=16, lora_alpha=16, **kwargs))
        model.set_submodule(name, layers[-1])
    return layers


@pytest.mark.parametrize("residual", ["absorb", "implicit"] if EXHAUSTIVE else ["absorb"])
def test_life_on_a_model(real_model, ids, residual, device):
    model, ids = copy.deepcopy(real_model).to(device), ids.to(device)
    want = logits(model, ids)
    layers = adapt(model, residual=residual)
    assert len(layers) == 210
    # 210 layers, each off by a few roundings of float32, on logits of size 20: a noise of 1e-5 of
    # the largest is what reordering any of the GEMMs gives as well.
    size = want.abs().max()
    assert (logits(model, ids) - want).abs().max() <= 3e-5 * size

    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 420
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    trained = logits(model, ids)
    assert (trained - want).abs().max() > 1e-2 * size
    for layer in layers:
        layer.adapter_enabled = False
    off = logits(model, ids)
    if residual == "implicit":
        assert torch.equal(off, want)
    else:
        assert (off - want).abs().max() <= 3e-5 * size
    for name in smollm2.target_projections(model):
        model.set_submodule(name, model.get_submodule(name).to_linear())
    assert (logits(model, ids) - trained).abs().max() <= 3e-5 * trained.abs().max()


def test_bf16_model_with_fp32_adapters(real_model, ids, device):
    model, ids = copy.deepcopy(real_model).to(device, torch.bfloat16), ids.to(device)
    want = logits(model, ids)
    adapt(model, residual="implicit")
    got = logits(model, ids)
    assert got.dtype == torch.bfloat16
    # Start and adapter cancel inside one product, so that even bfloat16 starts where it was, up to
    # the few outputs that round the other way.
    assert (got.float() - want.float()).norm() <= 1e-2 * want.float().norm()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1; `make demo` runs it")
@needs_demo
def test_the_demo_runs(tmp_path):
    """`make demo` in small: two blocks, two steps; the reloaded logits agree, and nothing warns."""
    command = [sys.executable, "-m", "examples.demo", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert {p.name for p in tmp_path.iterdir()} == {"demo.csv", "demo_curve.csv", "demo_loss.png"}
