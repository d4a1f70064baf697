"""Files of DoRA adapters: PEFT's in both directions, our own, and what commands make of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
)
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.adapter.recipe import METADATA
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.files.serving.convert import convert
from lora_kernels.model.lora import adapter_state

from ...support.adapters import assert_same
from ...support.exhaustive import thinned
from ...support.oracle import to_numpy as f64
from ...support.peft_folders import in_peft, loaded, merged_files, verified, with_config
from ...support.peft_models import adapted
from ...support.running import close, logits, move, quiet, train
from ...support.tiny_models import gpt2, llama

pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

PREFIX = "base_model.model."


def ours(base, size=0.05, **options):
    """A copy of the base with a DoRA adapter that was moved."""
    model = copy.deepcopy(base)
    quiet(model, LoRAConfig(**{"r": 4, "use_dora": True} | options))
    move(model, size)
    return model.eval()


def by_peft(folder: Path, base, **options):
    """A DoRA model of PEFT whose adapter was moved and saved."""
    model = adapted(base, use_dora=True, **options)
    move(model, 0.05)
    model.save_pretrained(folder)
    return model


def tensors_of(folder: Path) -> dict:
    return safetensors.load_file(folder / ADAPTER_FILE)


def rewrite(folder: Path, tensors: dict, keep_recipe: bool = False) -> None:
    with safetensors.safe_open(folder / ADAPTER_FILE, "pt") as file:
        metadata = file.metadata() if keep_recipe else {}
    safetensors.save_file(tensors, folder / ADAPTER_FILE, metadata)


@pytest.mark.parametrize(
    "family,options",
    [
        (llama, {"init_lora_weights": "loram"}),
        (llama, {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]}),
        (gpt2, {"init_lora_weights": "lora_xs", "residual": "implicit"}),
    ],
)
def test_ours_in_peft_and_back(family, options, tmp_path):
    """The file holds factors for the original base and m, for plain PEFT; and all bits of ours."""
    base = family()
    model = ours(base, **options)
    want = logits(model)
    save_adapter(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / ADAPTER_CONFIG).read_text())
    stored = tensors_of(tmp_path / "peft")
    names = {k.removesuffix(".lora_magnitude_vector") for k in stored if "magnitude" in k}
    assert config["use_dora"] is True and len(names) == len(adapter_state(model).layers)
    assert all(t.dim() == 1 for k, t in stored.items() if k.endswith("lora_magnitude_vector"))
    assert close(logits(in_peft(base, tmp_path / "peft")), want, 256)
    folded = options["init_lora_weights"] == "lora_xs"
    for file_format in ("peft", "native"):
        folder = tmp_path / file_format
        save_adapter(model, folder, format=file_format)
        other = loaded(base, folder)
        if file_format == "native" or not folded:
            assert_same(adapter_state(other), adapter_state(model))
            assert torch.equal(logits(other), want)
        assert close(logits(other), want)


@pytest.mark.parametrize("family", thinned([gpt2, llama]))
def test_peft_s_here_and_back(family, tmp_path):
    base = family()
    model = by_peft(tmp_path / "peft", base)
    other = loaded(base, tmp_path / "peft")
    assert close(logits(other), logits(model))
    for name, layer in adapter_state(other).layers.items():
        there = model.get_submodule(PREFIX + name).lora_magnitude_vector["default"].weight
        assert torch.equal(layer.lora_magnitude, there)
    save_adapter(other, tmp_path / "ours")
    assert close(logits(in_peft(base, tmp_path / "ours")), logits(model))
    # A model's own state_dict has the adapter's name and ".weight" in the names.
    named = {k.replace("_vector", "_vector.default.weight"): t
             for k, t in tensors_of(tmp_path / "peft").items()}  # fmt: skip
    rewrite(tmp_path / "peft", named)
    assert torch.equal(logits(loaded(base, tmp_path / "peft")), logits(other))


def test_training_goes_on_as_in_peft(tmp_path):
    """Five steps of AdamW from one file, here and in PEFT, without dropout."""
    import peft

    base = llama()
    by_peft(tmp_path, base)
    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path, progress=False)
    losses = [train(model.train(), steps=5, lr=5e-3) for model in (there, here)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 2e-5
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3
    for name, layer in adapter_state(here).layers.items():
        magnitude = there.get_submodule(PREFIX + name).lora_magnitude_vector["default"].weight
        assert torch.allclose(layer.lora_magnitude, magnitude, atol=1e-3)


@pytest.mark.parametrize("conv", thinned([nn.Conv2d, nn.Conv1d, nn.Conv3d]))
def test_convolutions(conv, tmp_path):
    """PEFT's magnitudes of convolutions are [1, out, 1 ...]."""
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(conv(4, 6, 3, padding=1), conv(6, 5, 1, bias=False))
    dims = base[0].weight.dim() - 2
    x = torch.randn(2, 4, *(4,) * dims)
    model = ours(base, target_modules=["0", "1"], init_lora_weights="pissa")
    save_adapter(model, tmp_path)
    stored = tensors_of(tmp_path)[f"{PREFIX}0.lora_magnitude_vector"]
    assert stored.shape == (1, 6, *(1,) * dims)
    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert close(there(x), model(x), 256)
    assert torch.equal(loaded(base, tmp_path)(x), model(x))
    move(there.train(), 0.05)
    for parameter in (p for n, p in there.named_parameters() if "lora_" in n):
        parameter.data.mul_(1.1)
    there.eval().save_pretrained(tmp_path / "again")
    assert close(loaded(base, tmp_path / "again")(x), there(x), 256)


@pytest.mark.parametrize("dtype", thinned(["bfloat16", "float16"]))
def test_rounded_files_keep_magnitudes(dtype, tmp_path):
    """What their rounding loses would be a part of the whole weight."""
    base = llama()
    model = ours(base)
    saved = save_adapter(model, tmp_path, dtype=dtype)
    assert 0 < saved.error < 0.01
    kinds = {"magnitude" in k: t.dtype for k, t in tensors_of(tmp_path).items()}
    assert kinds == {True: torch.float32, False: getattr(torch, dtype)}
    for other in (loaded(base, tmp_path), in_peft(base, tmp_path)):
        error = (logits(other) - logits(model)).norm() / (logits(base) - logits(model)).norm()
        assert error < 0.01
    wide = save_adapter(ours(base.double()), tmp_path, dtype="float32")
    assert {t.dtype for t in tensors_of(tmp_path).values()} == {torch.float32} and wide.error < 1e-6


def test_compressed_rows_keep_their_norms(tmp_path):
    base = llama()
    model = ours(base, size=0.1)
    save_adapter(model, tmp_path / "a", format="native")
    converted = convert(tmp_path / "a", tmp_path / "b", compress_to=2)
    assert converted.rank == 2 and 0 < converted.error < 1
    other = merge_lora(loaded(base, tmp_path / "b"))
    for name, layer in adapter_state(model).layers.items():
        norms = np.linalg.norm(f64(other.get_submodule(name).weight), axis=1)
        assert np.allclose(norms, abs(f64(layer.lora_magnitude)), rtol=1e-5)


@pytest.mark.parametrize("family,targets", [(llama, ["embed_tokens", "up_proj"]), (gpt2, "c_fc")])
def test_commands(family, targets, tmp_path):
    """merge writes the bits that `merge_lora` makes, and verify agrees with PEFT."""
    base = family()
    targets = [targets] if isinstance(targets, str) else targets
    model = ours(base, target_modules=targets, residual="implicit")
    save_adapter(model, tmp_path / "adapter")
    want = logits(model)
    written = merged_files(base, tmp_path / "adapter", tmp_path)
    assert close(logits(written), want)
    merged = merge_lora(model)
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name)), name
    checks = verified(tmp_path / "adapter", tmp_path / "base")
    assert len(checks) == 5 and all(checks.values())


def test_hotswap(tmp_path):
    base = llama()
    first, second = ours(base, residual="implicit"), ours(base, size=0.1, residual="implicit")
    save_adapter(second, tmp_path / "second")
    hotswap_adapter(first, tmp_path / "second")
    assert torch.equal(logits(first), logits(second))
    save_adapter(ours(base, use_dora=False, residual="implicit"), tmp_path / "plain")
    with pytest.raises(ValueError, match="this one has lora_magnitude, the new one does not"):
        hotswap_adapter(first, tmp_path / "plain")


def test_wrong_magnitudes(tmp_path):
    base = llama()
    by_peft(tmp_path, base, target_modules=["q_proj"])
    right = tensors_of(tmp_path)
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"

    def refused(match, **changes):
        rewrite(tmp_path, {k: t for k, t in (right | changes).items() if t is not None})
        with pytest.raises(ValueError, match=match):
            read_adapter(tmp_path)

    refused("use_dora is true, but the lora_magnitude_vector of .*0.* is missing", **{key: None})
    refused(r"0.*q_proj' is \[31\] of torch\.float32, expected \[32\]", **{key: torch.ones(31)})
    refused(r"is \[32, 1\] of torch\.float32, expected \[32\]", **{key: torch.ones(32, 1)})
    refused(r"is \[32\] of torch\.int64, expected \[32\]", **{key: torch.ones(32).long()})
    refused("holds NaN or Inf", **{key: torch.full((32,), torch.nan)})
    other = key.replace("q_proj", "k_proj")
    refused("'.*k_proj' has a lora_magnitude_vector, but no", **{other: torch.ones(16)})
    rewrite(tmp_path, right)
    with_config(tmp_path, use_dora=False)
    with pytest.raises(ValueError, match=r"belongs to DoRA, .* does not say use_dora = true"):
        read_adapter(tmp_path)
    with_config(tmp_path, use_dora="yes")
    with pytest.raises(ValueError, match="use_dora must be true or false, got 'yes'"):
        read_adapter(tmp_path)
    with_config(tmp_path, use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="use_dora and lora_bias exclude each other"):
        read_adapter(tmp_path)


def test_our_file_without_magnitudes(tmp_path):
    """The recipe says that there are some."""
    save_adapter(ours(llama(), target_modules=["q_proj"]), tmp_path)
    stored = tensors_of(tmp_path)
    key = next(k for k in stored if "magnitude" in k)
    with safetensors.safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        assert METADATA in file.metadata()
    with_config(tmp_path, use_dora=False)
    with pytest.raises(ValueError, match="says use_dora = False, but this was saved with True"):
        read_adapter(tmp_path)
    with_config(tmp_path, use_dora=True)
    rewrite(tmp_path, {k: t for k, t in stored.items() if k != key}, keep_recipe=True)
    with pytest.raises(ValueError, match=r"the lora_magnitude_vector of .*q_proj' is missing"):
        read_adapter(tmp_path)


def test_magnitudes_in_some_layers_only(tmp_path):
    from lora_kernels.files.adapter.folder import write_adapter

    state = adapter_state(ours(llama(), target_modules=["q_proj"]))
    next(iter(state.layers.values())).lora_magnitude = None
    with pytest.raises(ValueError, match="an adapter has them in all layers or in none"):
        write_adapter(tmp_path, state)
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_for_magnitudes(tmp_path):
    pytest.importorskip("gguf")
    base = llama()
    base.save_pretrained(tmp_path / "base")
    save_adapter(ours(base, target_modules=["q_proj"]), tmp_path / "a")
    with pytest.raises(ValueError, match="whose magnitudes a GGUF adapter cannot hold: merge it"):
        convert(tmp_path / "a", tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    with pytest.raises(ValueError, match="use_dora=True measures the rows of the weights"):
        initialize(tmp_path / "base", tmp_path / "out", LoRAConfig(use_dora=True))
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.gguf").exists()
