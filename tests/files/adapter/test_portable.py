"""The portable form: the same update from every loader, in 16 bits too; the same bits for us."""

from __future__ import annotations

import copy
import itertools
import json
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter
from lora_kernels._utils.peft_names import ADAPTER_FILE
from lora_kernels.files.adapter import portable
from lora_kernels.files.adapter.content import FolderContent
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
from lora_kernels.files.adapter.peft_format.writing import rank_fields
from lora_kernels.files.adapter.recipe import PEFT, layer_to_dict, recipe_to_json
from lora_kernels.init import get_initializer, initializer_names
from lora_kernels.model.config import AdapterState

from ...support.adapters import (
    IDS,
    LLAMA_LAYERS,
    adapt,
    adapt_model,
    assert_agree,
    assert_same,
    logits_64,
    one_layer,
    peft_config,
    peft_logits,
    tiny_model,
    train,
)
from ...support.exhaustive import EXHAUSTIVE
from ...support.oracle import to_numpy

safetensors = pytest.importorskip("safetensors.torch")

NAMES = [n for n in initializer_names() if not get_initializer(n).rewrites_base]
LAYERS = {"a.0.q": (40, 48), "a.0.k": (24, 48), "a.1.q": (40, 48), "b.up": (33, 20)}


def stored_updates(folder, cast=None) -> dict[str, np.ndarray]:
    """What every loader computes from the files: one s = α / r, no pattern, after a cast."""
    config = peft_config(folder)
    assert config["use_rslora"] is False and isinstance(config["target_modules"], list)
    assert config["lora_alpha"] == config["r"] and isinstance(config["lora_alpha"], int)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = safetensors.load_file(folder / ADAPTER_FILE)
    updates = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            B = tensors[key.replace("lora_A", "lora_B")]
            assert A.shape[0] == B.shape[1] == config["r"]
            if cast is not None:
                A, B = A.to(cast), B.to(cast)
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            updates[name] = to_numpy(B) @ to_numpy(A)
    return updates


def nudge(state: AdapterState, size: float) -> dict[str, np.ndarray]:
    """Moves every trained factor by about `size` an entry away from its start; the updates."""
    updates = {}
    for name, layer in state.layers.items():
        start = layer.start_factors()
        A, B = start if start is not None else (layer.lora_A, layer.lora_B)
        moved = {
            "lora_A": A + size * torch.randn_like(A),
            "lora_B": B + size * torch.randn_like(B),
        }
        state.layers[name] = layer = replace(layer, **moved)
        delta = to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
        if start is not None:
            delta = delta - to_numpy(start[1]) @ to_numpy(start[0])
        updates[name] = layer.scaling * delta
    return updates


@settings(max_examples=60 if EXHAUSTIVE else 25)
@given(
    name=st.sampled_from(NAMES),
    rule=st.sampled_from(["lora", "rslora", "alpha_sqrt"]),
    alpha=st.one_of(st.sampled_from([1, 8, 16, 32]), st.floats(0.3, 70)),
    ranks=st.dictionaries(st.sampled_from([r"0\.q", "k", "b.up"]), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from(["q", r"1\.q", "b.up"]), st.floats(0.5, 40)),
    residual=st.sampled_from(["absorb", "implicit"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_every_start_rule_pattern_and_dtype(
    tmp_path_factory, name, rule, alpha, ranks, alphas, residual, dtype, seed
):
    torch.manual_seed(seed)
    random.seed(seed)
    initializer = get_initializer(name)
    if rule == "alpha_sqrt" and initializer.grows_with_scaling:
        rule = "rslora"
    if name == "orthogonal":
        ranks = {layer: 2 * r for layer, r in ranks.items()}
    config = LoRAConfig(
        r=4, lora_alpha=alpha, scaling=rule, init_lora_weights=name, rank_pattern=ranks,
        alpha_pattern=alphas, residual=residual,
    )  # fmt: skip
    layers, deltas = {}, {}
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for layer, (rows, cols) in LAYERS.items():
        linear = nn.Linear(cols, rows, dtype=kind)
        layers[layer], deltas[layer] = adapt(linear, config, layer, residual)
    state = AdapterState(config, layers)
    folder = tmp_path_factory.mktemp("portable")
    write_adapter(folder, state)
    for cast, bound in ((None, 3e-6), (torch.bfloat16, 5e-3)):
        for layer, update in stored_updates(folder, cast).items():
            error = np.linalg.norm(update - deltas[layer])
            assert error <= bound * np.linalg.norm(deltas[layer]), (layer, cast)
    if not any(layer.middle() is not None for layer in layers.values()):
        assert_same(read_adapter(folder), state)


@pytest.mark.parametrize("size", [1e-4, 3e-4, 1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("name", ["loram", "pissa", "milora", "olora", "init_ab"])
def test_small_and_large_updates(name, size, tmp_path):
    """The former [A; A₀], [B, −B₀] lost all of the smallest of them in bfloat16."""
    torch.manual_seed(0)
    config = LoRAConfig(r=16, lora_alpha=16, init_lora_weights=name)
    layer, _ = adapt(nn.Linear(256, 192), config)
    state = AdapterState(config, {"a.q": layer})
    delta = nudge(state, size)["a.q"]
    write_adapter(tmp_path, state)
    for cast in (torch.bfloat16, torch.float16):
        error = np.linalg.norm(stored_updates(tmp_path, cast)["a.q"] - delta)
        assert error <= 5e-3 * np.linalg.norm(delta)
    assert_same(read_adapter(tmp_path), state)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"])
def test_dtype(dtype, tmp_path):
    config = LoRAConfig(r=4, lora_alpha=6, use_rslora=True, modules_to_save=["norm"])
    state, deltas = adapt_model(tiny_model("llama"), LLAMA_LAYERS, config)
    state.extra = {"model.norm.weight": torch.rand(64)}
    report = write_adapter(tmp_path, state, dtype=dtype)
    stored = safetensors.load_file(tmp_path / ADAPTER_FILE)
    name = str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, name)}
    if name == "float32":
        assert report.errors is None
        assert_same(read_adapter(tmp_path), state)
        return
    assert f"rounded to {name} with a relative error of" in str(report)
    for layer, update in stored_updates(tmp_path).items():
        error = np.linalg.norm(update - deltas[layer]) / np.linalg.norm(deltas[layer])
        assert error == pytest.approx(report.errors[layer], rel=1e-3) and error < 5e-3
    got = read_adapter(tmp_path)
    assert not any(layer.changes_base for layer in got.layers.values())
    want = logits_64(tiny_model("llama"), stored_updates(tmp_path), IDS, got.extra)
    assert_agree(peft_logits(tiny_model("llama"), tmp_path)[1], want)


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("name", ["loram", "pissa", "lora"])
def test_small_updates_in_float16(name, size, tmp_path):
    """A − A₀ alone would have entries below float16's smallest normal number, 6e-5."""
    torch.manual_seed(0)
    layer, _ = adapt(nn.Linear(96, 80), LoRAConfig(r=8, init_lora_weights=name))
    state = AdapterState(LoRAConfig(r=8, init_lora_weights=name), {"a.q": layer})
    delta = nudge(state, size)["a.q"]
    report = write_adapter(tmp_path, state, dtype="float16")
    error = np.linalg.norm(stored_updates(tmp_path)["a.q"] - delta) / np.linalg.norm(delta)
    assert error <= 1e-3 and report.error == pytest.approx(error, rel=1e-3)


def test_truncated_and_rounded(tmp_path):
    state, deltas = adapt_model(tiny_model("llama"), LLAMA_LAYERS, LoRAConfig(r=6))
    report = write_adapter(tmp_path, state, compress_to=5, dtype="bfloat16")
    assert report.rank == 5 and "truncated in rank and rounded to bfloat16" in str(report)
    for layer, update in stored_updates(tmp_path).items():
        error = np.linalg.norm(update - deltas[layer]) / np.linalg.norm(deltas[layer])
        assert error == pytest.approx(report.errors[layer], rel=1e-3)


def test_bad_dtypes(tmp_path):
    state, _ = one_layer()
    for dtype in ("bfloat8", torch.int8, "torch.bfloat16 "):
        with pytest.raises(ValueError, match=r"unknown dtype .*: expected one of float32, bfl"):
            write_adapter(tmp_path, state, dtype=dtype)
    with pytest.raises(ValueError, match="dtype makes a plain adapter: it needs format='peft'"):
        write_adapter(tmp_path, state, dtype="bfloat16", format="native")
    state.layers["block.1.q"].lora_B[0, 0] = 1e12
    with pytest.raises(ValueError, match="too large for float16: use dtype='bfloat16'"):
        write_adapter(tmp_path, state, dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("r, flag", [(8, None), (9, "32"), (16, "32"), (17, "64"), (160, "320")])
def test_the_limit_of_vllm(r, flag, tmp_path):
    model = nn.Sequential(nn.Linear(200, 180))
    add_lora(model, LoRAConfig(r=r, target_modules=["0"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = save_adapter(model, tmp_path)
        save_adapter(model, tmp_path / "native", format="native")
    found = [str(w.message) for w in caught]
    if flag is None:
        assert not found and report.warning is None
    else:
        assert found == [report.warning] and f"--max-lora-rank {flag}," in found[0]
        assert "compress_to=16" in found[0] and report.warning in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_adapter(model, tmp_path, compress_to=16).rank <= 16


@pytest.mark.parametrize("rule", ["lora", "rslora"])
@pytest.mark.parametrize("name", ["loram", "pissa", "lora"])
def test_folders_of_version_1(name, rule, tmp_path):
    """[A; A₀], [B, −B₀] with s in the configuration, as earlier versions wrote them."""
    config = LoRAConfig(
        r=4, lora_alpha=6, scaling=rule, init_lora_weights=name, rank_pattern={"v_proj": 3}
    )
    state, deltas = adapt_model(tiny_model("llama"), LLAMA_LAYERS, config)
    state.base_model = "some/base"
    tensors, ranks = {}, {}
    for layer, own in state.layers.items():
        A, B = own.lora_A, own.lora_B
        start = own.start_factors()
        if start is not None:
            A, B = torch.cat([A, start[0]]), torch.cat([B, -start[1]], 1)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B
        ranks[layer] = len(A)
    scalings = {layer: own.scaling for layer, own in state.layers.items()}
    written = {
        "peft_type": "LORA",
        "bias": "none",
        "target_modules": LLAMA_LAYERS,
        "base_model_name_or_path": "some/base",
        **rank_fields(scalings, ranks, rslora=rule == "rslora"),
    }
    fields = rank_fields(scalings, {n: own.r for n, own in state.layers.items()}, rule == "rslora")
    recipes = {layer: layer_to_dict(own) for layer, own in state.layers.items()}
    recipe = json.loads(recipe_to_json(recipes, PEFT, config, "some/base",
                                       peft_config=written, rank_fields=fields))  # fmt: skip
    text = json.dumps(recipe | {"version": 1})
    FolderContent(ADAPTER_FILE, written, tensors, text).write(tmp_path)
    assert_same(read_adapter(tmp_path), state)
    want = logits_64(tiny_model("llama"), deltas, IDS)
    fresh = copy.deepcopy(tiny_model("llama"))
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert_agree(fresh(IDS).logits, want)
    assert_agree(peft_logits(tiny_model("llama"), tmp_path, strict=False)[1], want)
    peft = pytest.importorskip("peft")
    from lora_kernels.peft import initialize

    model = peft.get_peft_model(
        copy.deepcopy(tiny_model("llama")), peft.LoraConfig(r=4, target_modules=["v_proj"])
    )
    initialize(model, "loram")
    model.load_adapter(tmp_path, "old")
    model.set_adapter("old")
    with torch.no_grad():
        assert_agree(model.eval()(IDS).logits, want)


@pytest.mark.parametrize("options", [{"lora_alpha": 8}, {"use_rslora": True, "lora_alpha": 7}])
@pytest.mark.parametrize("name", ["loram", "pissa", "lora"])
def test_trained_far_away(name, options, tmp_path):
    """B leaves the factor of two within which B − B₀ is exact, and s is no power of two."""
    through = copy.deepcopy(tiny_model("llama"))
    add_lora(through, LoRAConfig(r=5, init_lora_weights=name, **options))
    optimizer = train(through, 30)
    save_adapter(through, tmp_path)
    assert '\\"bits\\"' in (tmp_path / ADAPTER_FILE).read_bytes()[:200_000].decode("latin-1") or (
        name == "lora" and "use_rslora" not in options
    )
    resumed = copy.deepcopy(tiny_model("llama"))
    load_adapter(resumed, tmp_path)
    for model in (through, resumed):
        train(model, 2, optimizer)
    with torch.no_grad():
        assert torch.equal(resumed(IDS).logits, through(IDS).logits)


def test_too_many_bits_for_a_header(tmp_path, monkeypatch):
    state, _ = one_layer(use_rslora=True, lora_alpha=7, r=5)
    monkeypatch.setattr(portable, "_LIMIT", 10)
    with pytest.warns(UserWarning, match="format='native'.* keeps them exactly"):
        write_adapter(tmp_path, state)
    got, want = read_adapter(tmp_path).layers["block.1.q"], state.layers["block.1.q"]
    assert torch.equal(got.lora_A, want.lora_A)
    assert torch.allclose(got.lora_B, want.lora_B, rtol=1e-6, atol=1e-7)


def test_damaged_bits(tmp_path):
    state, _ = one_layer(use_rslora=True, lora_alpha=7, r=5)
    write_adapter(tmp_path, state)
    file = tmp_path / ADAPTER_FILE
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    recipe = json.loads(metadata["lora_kernels"])
    bits = recipe["layers"]["block.1.q"]["bits"]
    for change in ({"lora_B": "x"}, {"lora_C": bits["lora_B"]}, {"lora_B": 3}, ["lora_B"], "x"):
        recipe["layers"]["block.1.q"]["bits"] = change
        text = {"lora_kernels": json.dumps(recipe)}
        safetensors.save_file(safetensors.load_file(file), file, text)
        with pytest.raises(ValueError, match=r"recipe of 'block\.1\.q' is damaged"):
            read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["loram", "pissa", "lora", "init_ab"])
@pytest.mark.parametrize("c", [1.02, 1.1, 1.5, 3, 10])
def test_factors_that_move_against_each_other(name, c, tmp_path):
    """A grows as B shrinks: the parts (B − B₀)A and B₀(A − A₀) cancel, so an SVD is written."""
    torch.manual_seed(0)
    config = LoRAConfig(r=16, lora_alpha=12, init_lora_weights=name)
    layer, _ = adapt(nn.Linear(96, 80), config)
    state = AdapterState(config, {"a.q": layer})
    nudge(state, 1e-3)
    layer = state.layers["a.q"]
    layer = replace(layer, lora_A=layer.lora_A * c, lora_B=layer.lora_B / c)
    state.layers["a.q"] = layer
    start = layer.start_factors()
    delta = to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
    if start is not None:
        delta -= to_numpy(start[1]) @ to_numpy(start[0])
    delta *= layer.scaling
    write_adapter(tmp_path, state)
    for cast in (torch.float32, torch.bfloat16):
        error = np.linalg.norm(stored_updates(tmp_path, cast)["a.q"] - delta)
        assert error <= 5e-3 * np.linalg.norm(delta)
    assert_same(read_adapter(tmp_path), state)


@pytest.mark.parametrize("kinds", itertools.product(["float32", "float64", "bfloat16"], repeat=3))
def test_factors_of_different_dtypes(kinds, tmp_path):
    A, B, start = (getattr(torch, kind) for kind in kinds)
    state, _ = one_layer(init_lora_weights="pissa", lora_alpha=7)
    layer = state.layers["block.1.q"]
    layer = replace(
        layer,
        lora_A=layer.lora_A.to(A),
        lora_B=layer.lora_B.to(B),
        start_A=layer.start_A.to(start),
        start_B=layer.start_B.to(start),
    )
    state.layers["block.1.q"] = layer
    write_adapter(tmp_path, state)
    assert_same(read_adapter(tmp_path), state)
    delta = to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
    delta = layer.scaling * (delta - to_numpy(layer.start_B) @ to_numpy(layer.start_A))
    error = np.linalg.norm(stored_updates(tmp_path)["block.1.q"] - delta)
    assert error <= 1e-6 * np.linalg.norm(delta)


def test_numbers_that_overflow(tmp_path):
    """s·B may be infinite where B is not; the old adapter stays."""
    good, _ = one_layer(init_lora_weights="lora")
    write_adapter(tmp_path, good)
    bad, _ = one_layer(init_lora_weights="lora", scaling="alpha_sqrt", lora_alpha=256)
    bad.layers["block.1.q"].lora_B.fill_(1e37)
    with pytest.raises(ValueError, match=r"exceeds the range of torch\.float32; nothing"):
        write_adapter(tmp_path, bad)
    assert_same(read_adapter(tmp_path), good)


def test_tensors_that_another_program_has_changed(tmp_path):
    """It has kept the metadata: the start and the bits of the recipe belong to other tensors."""
    state, delta = one_layer(use_rslora=True, lora_alpha=7, r=5)
    write_adapter(tmp_path, state)
    file = tmp_path / ADAPTER_FILE
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {k: v.bfloat16() for k, v in safetensors.load_file(file).items()}
    safetensors.save_file(tensors, file, metadata)
    with pytest.warns(UserWarning, match="another program has changed the tensors"):
        got = read_adapter(tmp_path).layers["block.1.q"]
    right, left = got.portable_factors()
    error = np.linalg.norm(to_numpy(left) @ to_numpy(right) - delta)
    assert error <= 5e-3 * np.linalg.norm(delta)


@pytest.mark.parametrize(
    "change",
    [
        {"scaling": "2"}, {"scaling": None}, {"scaling": 0}, {"scaling": -1.0}, {"r": -1},
        {"r": 2.0}, {"start": "xyz"}, {"beta": None}, {"beta": "x"}, {"residual": "none"},
        {"lora_alpha": True},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_recipes(change, tmp_path):
    state, _ = one_layer()
    write_adapter(tmp_path, state)
    file = tmp_path / ADAPTER_FILE
    with safetensors.safe_open(file, "pt") as opened:
        recipe = json.loads(opened.metadata()["lora_kernels"])
    recipe["layers"]["block.1.q"] |= change
    text = {"lora_kernels": json.dumps(recipe)}
    safetensors.save_file(safetensors.load_file(file), file, text)
    with pytest.raises(ValueError, match=ADAPTER_FILE):
        read_adapter(tmp_path)
