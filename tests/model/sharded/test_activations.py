"""`capture_activations`, and the starts that are made from it, on models that FSDP2 or tensor
parallelism has sharded: one process, which sees all batches, is the oracle.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import LoRAConfig, add_lora, capture_activations
from lora_kernels.init import CorDA

from ...support.exhaustive import thinned
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded
from ...support.tiny_models import llama
from .test_gradients import BATCHES, REAL, mesh, state, tensor_parallel

pytestmark = needs_ranks

IN_STEP = [f"{name}_proj" for name in ("q", "k", "v", "gate", "up")]
STARTS = ["eva", "corda", CorDA("kpm"), "lora_null", "mica", "orthogonal", "kasa"]


def captured(model: nn.Module, parts: int = 1, **options):
    """With this rank's share of the batches."""
    share = BATCHES.tensor_split(parts)[dist.get_rank() * parts // dist.get_world_size()]
    return capture_activations(model, list(share), progress=False, **options)


def error(found, wanted) -> float:
    assert list(found) == list(wanted)
    assert all(found[name].count == wanted[name].count for name in wanted)
    return max(
        float((found[name].gram - wanted[name].gram).norm() / wanted[name].gram.norm())
        for name in wanted
    )


def on_one(**options):
    return capture_activations(llama(dtype=REAL), list(BATCHES), progress=False, **options)


def test_sums_are_those_of_one_process():
    wanted = on_one()

    def work(rank: int) -> dict[str, float]:
        model = fully_sharded(llama(dtype=REAL))
        before = state(model)
        errors = {"never run": error(captured(model, 2), wanted)}
        assert state(model) == before
        model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
        errors["after a step"] = error(captured(model, 2), wanted)
        text = ""
        try:
            captured(model, 2, forward=lambda m, b: None)
        except ValueError as failed:
            text = str(failed)
        assert "no input reached" in text
        with pytest.raises(ValueError, match="have only"):
            capture_activations(model, list(BATCHES)[rank:], progress=False)
        return errors

    for errors in on_ranks(2, work):
        assert max(errors.values()) < 1e-12, errors


def test_tensor_parallelism():
    """Inputs that are replicated count once; those that are sharded are refused by name."""
    wanted = on_one(targets=IN_STEP)

    def work(rank: int) -> tuple[float, str]:
        model = tensor_parallel(llama(dtype=REAL), mesh(2, names=("tensor",)))
        found = error(captured(model, targets=IN_STEP), wanted)
        try:
            captured(model)
        except ValueError as failed:
            return found, str(failed)
        return found, ""

    for found, text in on_ranks(2, work):
        assert found < 1e-12
        assert "o_proj' is sharded" in text and "before the model is parallelized" in text


def starts(model: nn.Module, start, activations) -> dict[str, Tensor]:
    """A and B, seeded or not drawn, of the adapted model."""
    torch.manual_seed(0)
    given = activations if hasattr(start, "corda_method") or start in STARTS[:4] else None
    config = LoRAConfig(r=4, init_lora_weights=start, residual="implicit")
    add_lora(model, config, activations=given, progress=False)
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in found.items()}


def test_starts_are_those_of_one_process():
    activations = on_one()
    kinds = thinned(STARTS)
    wanted = [starts(llama(dtype=REAL), start, activations) for start in kinds]

    def work(rank: int) -> list[float]:
        errors = []
        for start, want in zip(kinds, wanted, strict=True):
            found = starts(fully_sharded(llama(dtype=REAL)), start, activations)
            assert list(found) == list(want)
            drawn = start in ("orthogonal", "kasa")
            pairs = zip(found.values(), want.values(), strict=True)
            errors.append(
                0.0 if drawn else max(float((own - other).norm()) for own, other in pairs)
            )
            assert all(own.isfinite().all() for own in found.values())
        return errors

    for errors in on_ranks(2, work):
        assert max(errors) < 1e-8, errors


def test_qera_is_refused():
    activations = on_one()

    def work(rank: int) -> str:
        try:
            add_lora(
                fully_sharded(llama(dtype=REAL)),
                LoRAConfig(r=4, init_lora_weights="qera"),
                activations=activations,
                progress=False,
            )
        except ValueError as failed:
            return str(failed)
        return ""

    assert all("rewrites the whole weight" in text for text in on_ranks(2, work))
