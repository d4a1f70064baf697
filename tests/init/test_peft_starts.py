"""The starts that PEFT has too, beside PEFT's own: products, subspaces and ranks, not signs."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, capture_activations, optim
from lora_kernels.init import EVA, CorDA, get_initializer

from ..support.oracle import to_numpy
from ..support.packages import needs_peft

pytestmark = needs_peft
R = 4
LAYERS = ("q", "k", "v", "o")


class Block(nn.Module):
    """q, k and v share an input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(size, size), nn.Linear(size, size)
        self.k, self.v = nn.Linear(size, size // 2), nn.Linear(size, size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x)) + torch.cat([self.k(x), self.v(x)], -1)) + x


class Model(nn.Module):
    """A language model without attention."""

    def __init__(self, size: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(depth))

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def batch_of(count: int = 16, length: int = 40) -> dict[str, torch.Tensor]:
    ids = torch.randint(50, (count, length))
    mask = (torch.arange(length) < torch.randint(20, length, (count, 1))).long()
    return {"input_ids": ids, "attention_mask": mask}


def peft_model(model: nn.Module, **options):
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(LAYERS), **options)
    return peft.get_peft_model(model, config)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def factors(model, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and the base's weight of a layer of a PEFT model."""
    layer = model.get_submodule(f"base_model.model.{name}")
    weight = layer.get_base_layer().weight
    tensors = layer.lora_A["default"].weight, layer.lora_B["default"].weight, weight
    return tuple(map(to_numpy, tensors))


def test_orthogonal():
    """Both products are zero, and all four factors have the norms of the formula."""
    model = Model(size=128, depth=1)
    theirs = peft_model(copy.deepcopy(model), init_lora_weights="orthogonal")
    A, B, _ = factors(theirs, "blocks.0.q")
    own = get_initializer("orthogonal")(model.blocks[0].q.weight, R)
    mine = to_numpy(own.lora_A), to_numpy(own.lora_B)
    for one, other in ((A, B), mine):
        assert np.abs(other @ one).max() <= 1e-6
        # ‖A‖² = ‖X₁‖² / 100, with m r / 2 numbers in X₁.
        for factor in (one, other):
            assert np.linalg.norm(factor) == pytest.approx((128 * R / 2) ** 0.5 / 10, rel=0.2)
    assert np.linalg.matrix_rank(mine[0], 1e-4) == np.linalg.matrix_rank(A, 1e-4) == R // 2


def test_mica():
    model = Model()
    theirs = peft_model(copy.deepcopy(model), init_lora_weights="mica")
    for name, linear in linears(model).items():
        A, B, _ = factors(theirs, name)
        own = get_initializer("mica")(linear.weight, R)
        assert not A.any() and not own.lora_A.any()
        mine = to_numpy(own.lora_B)
        sign = np.sign((mine * B).sum(0))
        assert np.abs(mine * sign - B).max() <= 1e-3  # PEFT's SVD is in float32


def test_kasa():
    import peft

    model = Model()
    theirs = peft_model(copy.deepcopy(model), kasa_config=peft.tuners.lora.KasaConfig())
    mine = copy.deepcopy(model)
    config = LoRAConfig(r=R, lora_alpha=2 * R, target_modules=LAYERS, init_lora_weights="kasa")
    add_lora(mine, config, progress=False)
    for name in linears(model):
        _, _, W = factors(theirs, name)
        layer = mine.get_submodule(name)
        assert np.abs(to_numpy(layer.weight) - W).max() <= 1e-5
        other = theirs.get_submodule(f"base_model.model.{name}")
        pairs = [
            (layer.lora_A, other.lora_A["default"].weight),
            (layer.lora_B, other.lora_B["default"].weight),
            (layer.lora_diag, other.lora_diag["default"]),
        ]
        for own, its in pairs:
            own.data.copy_(torch.randn_like(own) / 8)
            its.data.copy_(own.data)
    batch = {"input_ids": torch.randint(50, (3, 10))}
    assert (mine(**batch) - theirs(**batch)).abs().max() <= 1e-3
    penalty, loss = optim.kasa_penalty(mine), theirs.base_model._get_kasa_loss()
    assert float(penalty) == pytest.approx(float(loss), rel=1e-5)
    penalty.backward()
    loss.backward()
    for name in linears(model):
        layer = mine.get_submodule(name)
        other = theirs.get_submodule(f"base_model.model.{name}")
        for own, its in (
            (layer.lora_A, other.lora_A["default"].weight),
            (layer.lora_B, other.lora_B["default"].weight),
            (layer.lora_diag, other.lora_diag["default"]),
        ):
            assert (own.grad - its.grad).norm() <= 1e-4 * its.grad.norm()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(mode, monkeypatch):
    """With one batch, PEFT's covariance is ours times a number, which BA does not depend on."""
    if find_spec("attr") is None:  # of which PEFT takes this decorator alone
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    import peft
    from peft.tuners.lora.corda import preprocess_corda

    model = Model()
    ids = {"input_ids": torch.randint(50, (1, 400))}
    prepared = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=2 * R,
        target_modules=list(LAYERS),
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
    )
    preprocess_corda(prepared, config, run_model=lambda: prepared(**ids))
    theirs = peft.get_peft_model(prepared, config)
    activations = capture_activations(model, [ids], LAYERS, progress=False)
    for name, linear in linears(model).items():
        A, B, W = factors(theirs, name)
        own = CorDA(mode)(linear.weight, R, 2.0, activations=activations[name])
        mine = to_numpy(own.lora_B) @ to_numpy(own.lora_A)
        assert np.linalg.norm(mine - B @ A) <= 2e-3 * np.linalg.norm(B @ A)
        assert np.abs(to_numpy(linear.weight) - 2 * mine - W).max() <= 1e-3


@pytest.mark.parametrize("options", [{}, {"rho": 1.0}, {"whiten": True}, {"labels": True}], ids=str)
def test_eva(options):
    """PEFT's estimate with one batch that it gets again and again, and ours of that batch: ranks,
    α and axes.
    """
    import peft
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    model = Model()
    batch = batch_of()
    options = dict(options)
    masked = options.pop("labels", False)
    if masked:
        batch["labels"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.5, -100, 1)
    config = peft.tuners.lora.EvaConfig(tau=0.999999, **options)
    theirs = peft_model(copy.deepcopy(model), init_lora_weights="eva", eva_config=config)
    initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    activations = capture_activations(model, [batch], LAYERS, use_label_mask=masked, progress=False)
    mine = copy.deepcopy(model)
    report = add_lora(
        mine,
        LoRAConfig(r=R, lora_alpha=2 * R, target_modules=LAYERS, init_lora_weights=EVA(**options)),
        activations=activations,
        progress=False,
    )
    rows = {row.name: row for row in report.adapted}
    ranks: dict[int, list[list[int]]] = defaultdict(lambda: [[], []])
    for name in linears(model):
        layer = theirs.get_submodule(f"base_model.model.{name}")
        ranks[id(activations[name])][0].append(rows[name].r if name in rows else 0)
        ranks[id(activations[name])][1].append(layer.r["default"] if hasattr(layer, "r") else 0)
        if name not in rows:
            assert report.skipped[name] == "EVA gave it rank 0"
        if name not in rows or not hasattr(layer, "r"):
            continue
        assert rows[name].lora_alpha == 2 * rows[name].r
        assert layer.lora_alpha["default"] == 2 * layer.r["default"]
        A = to_numpy(layer.lora_A["default"].weight)
        own = to_numpy(mine.get_submodule(name).lora_A)
        if options.get("whiten"):  # PEFT's σ grows with each time that it gets the batch
            A, own = (part / np.linalg.norm(part, axis=1)[:, None] for part in (A, own))
        cosines = [abs(one @ other) for one, other in zip(A, own, strict=False)]
        assert min(cosines) >= 0.99  # PEFT's SVD is an estimate
    # Among layers that share an input it is an accident which one gets the last rank.
    assert all(sorted(own) == sorted(other) for own, other in ranks.values())
    assert sum(row.r for row in rows.values()) == R * len(linears(model))


def test_given_to_peft_models():
    """Their layers get A and B of the same inputs; the ranks stay, and what they do not train is
    refused.
    """
    from lora_kernels.peft import initialize

    model, batch = Model(), batch_of()
    activations = capture_activations(model, [batch], LAYERS, progress=False)
    want = model(**batch)
    theirs = peft_model(copy.deepcopy(model))
    for name in ("eva", "corda", "lora_null"):
        report = initialize(theirs, name, activations=activations, progress=False)
        assert len(report.layers) == len(linears(model))
        for layer, linear in linears(model).items():
            start = get_initializer(name)(linear.weight, R, 2.0, activations=activations[layer])
            A, B, _ = factors(theirs, layer)
            assert np.abs(A - to_numpy(start.lora_A)).max() <= 1e-6
            assert np.abs(B - to_numpy(start.lora_B)).max() <= 1e-6
        assert (theirs(**batch) - want).abs().max() <= 1e-4
        report.undo()
    for name, text in (
        ("kasa", "trains a λ between A and B"),
        ("mica", "trains only A"),
        ("eva", "pass activations="),
    ):
        with pytest.raises(ValueError, match=text):
            initialize(theirs, name, progress=False)
