"""PEFT's hot-swapping, which replaces A, B and s in place."""

from __future__ import annotations

import pytest
import torch

from ..support.exhaustive import EXHAUSTIVE
from ..support.packages import needs_peft
from ..support.peft_models import (
    MODELS,
    accelerate,
    adapted,
    initialize,
    linear_layers,
    update_of,
)
from ..support.running import close, logits, move, token_ids
from ..support.tiny_models import llama

pytestmark = needs_peft

TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}


def moved(kind: str = "llama", method: str | None = None, seed: int = 0, **options):
    """A trained adapter; of plain PEFT if `method` is None."""
    model = adapted(MODELS[kind](), **{"target_modules": TARGETS[kind]} | options)
    if method is not None:
        initialize(model, method)
    move(model, seed=seed)
    return model


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    "source, options",
    [
        (None, {}),
        (None, {"r": 2}),
        (None, {"r": 6, "lora_alpha": 3}),
        ("pissa", {}),  # a folder of rank 2r
        ("loram", {"r": 2}),  # of the rank that is there
        ("lora", {}),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_the_swapped_adapter_is_computed(tmp_path, kind, source, options, accelerated):
    """In place of one that subtracts a start: forward, and the update that would be merged."""
    from peft.utils.hotswap import hotswap_adapter

    other = moved(kind, source, seed=1, **options)
    model = moved(kind, "loram")
    if accelerated:
        accelerate(model)
    hotswap_adapter(model, saved(other, tmp_path), "default")
    assert close(logits(model), logits(other))
    for name, layer in linear_layers(model).items():
        want = update_of(linear_layers(other)[name])
        want = torch.tensor(want.T if layer.fan_in_fan_out else want)
        assert close(layer.get_delta_weight("default").detach(), want)


@pytest.mark.parametrize("target_rank", [None, 10])
@pytest.mark.parametrize("method", [None, "loram"])
def test_prepared_models_compute_and_train_the_same(method, target_rank):
    """A and B are padded with zeros, and s becomes a tensor."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    gradients = []
    for accelerated in (False, True):
        model = moved(method=method, lora_alpha=5)
        want = logits(model)
        if accelerated:
            accelerate(model)
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        assert close(logits(model), want)
        model(token_ids()).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(close(ours, theirs, 256) for theirs, ours in zip(*gradients, strict=True))
    initialize(model, "pissa")
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.lora_start_A["default"].shape == (target_rank or 4, layer.in_features)
    assert close(logits(model), logits(llama()))


@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 compiles")
@pytest.mark.parametrize("source", ["plain", "started"])
def test_compiled_once(tmp_path, source):
    """As PEFT's own layers: another rank and another s do not compile again."""
    import torch._dynamo as dynamo
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = moved(method=None if source == "plain" else "pissa", seed=1, r=3, lora_alpha=30)
    folder = saved(other, tmp_path)
    for method in (None, "loram"):
        graphs = []
        for accelerated in (False, True):
            model = moved(method=method)
            want = logits(model)
            if accelerated:
                accelerate(model)
            prepare_model_for_compiled_hotswap(model, target_rank=8)
            dynamo.reset()
            dynamo.utils.counters.clear()
            compiled = torch.compile(model, backend="aot_eager")
            with torch.inference_mode():
                assert close(logits(compiled), want)
                hotswap_adapter(compiled, folder, "default")
                assert close(logits(compiled), logits(other))
            graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1]


def test_another_rank_is_not_saved(tmp_path):
    """PEFT's configuration does not tell the rank, and the folder could not be read."""
    from peft.utils.hotswap import hotswap_adapter

    model = moved(method="loram")
    folder = saved(moved(method="pissa", seed=1), tmp_path / "other")
    hotswap_adapter(model, folder, "default")
    with pytest.raises(ValueError, match=r"q_proj' has rank 8, but 4 in the configuration"):
        model.save_pretrained(tmp_path / "again")
