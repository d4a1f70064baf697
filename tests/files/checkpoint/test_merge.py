"""`merge`: weights against float64, and a merged model against the adapted one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lora_kernels._utils.model_files import is_unfinished
from lora_kernels.files.adapter.folder import write_adapter
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.layers.state import LayerState, dst_start
from lora_kernels.model.config import AdapterState, LoRAConfig

from ...support.oracle import ROUNDING, to_numpy
from .conftest import SHAPES
from .folders import TORCH, as_float64, fingerprint, read_file

R = 4
NAMES = [f"model.layers.{block}.{layer}" for block in range(3) for layer in SHAPES]


def make_state(start: str | None = None, has_R: bool = False, names=NAMES) -> AdapterState:
    """An adapter of the odd model that has been trained away from its start."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in names:
        n, m = SHAPES[name.rpartition(".")[2]]
        A, B = (torch.randn(s, generator=generator) * 0.1 for s in ((R, m), (n, R)))
        factors: dict = {"beta": 0.2} if start == "dst" else {}
        if start == "kept":
            factors = {"start_A": A + 0.01, "start_B": B - 0.01}
        if has_R:
            factors["lora_R"] = torch.randn(R, R, generator=generator)
        layers[name] = LayerState(A, B, scaling=3.0, lora_alpha=12, **factors)
    return AdapterState(LoRAConfig(r=R, lora_alpha=12, target_modules=tuple(names)), layers)


def update(layer: LayerState) -> tuple[np.ndarray, np.ndarray]:
    """s(BA − B₀A₀), and the size of what is added up, in float64."""
    A, B = to_numpy(layer.lora_A), to_numpy(layer.lora_B)
    if layer.lora_R is not None:
        A = to_numpy(layer.lora_R) @ A
    delta, size = B @ A, np.abs(B) @ np.abs(A)
    if layer.beta is not None:
        A0, B0 = (to_numpy(f) for f in dst_start(layer.lora_A, layer.lora_B, layer.beta))
    elif layer.start_A is not None:
        A0, B0 = to_numpy(layer.start_A), to_numpy(layer.start_B)
    else:
        return layer.scaling * delta, layer.scaling * size
    size += np.abs(B0) @ np.abs(A0)
    return layer.scaling * (delta - B0 @ A0), layer.scaling * size


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize(
    "start,has_R,format",
    [
        ("dst", False, "peft"),
        ("kept", False, "native"),
        (None, False, "peft"),
        (None, True, "native"),
    ],
)
def test_weights(start, has_R, format, dtype, odd_model, tmp_path):
    state = make_state(start, has_R)
    write_adapter(tmp_path / "adapter", state, format=format)
    kind = None if dtype is None else getattr(torch, dtype)
    done = merge(odd_model, tmp_path / "adapter", tmp_path / "out", dtype=kind)
    assert (done.layers, done.replaced) == (9, 0)
    for file in odd_model.glob("*.safetensors"):
        before, after = read_file(file)[0], read_file(tmp_path / "out" / file.name)[0]
        assert list(before) == list(after)
        for name, stored in before.items():
            new = after[name]
            layer = state.layers.get(name.removesuffix(".weight"))
            if layer is None:
                if dtype is None or stored[0] not in TORCH:
                    assert new == stored
                continue
            W, (delta, size) = as_float64(stored), update(layer)
            # One rounding to the file's dtype, 2r + 3 of float32 before; an R adds r and one.
            bound = ROUNDING[TORCH[new[0]]] + (3 * R + 4) * ROUNDING[torch.float32]
            error = np.abs(as_float64(new) - (W + delta))
            assert (error <= bound * (np.abs(W) + size) + 2.0**-25).all(), name


def test_trained_in_full(odd_model, tmp_path):
    """Tensors of modules_to_save replace those of the base, in its dtype."""
    state = make_state(names=NAMES[:1])
    norm, embedding = torch.arange(16.0), torch.randn(50, 16)
    state.extra = {"model.layers.0.norm.weight": norm, "model.embed_tokens.weight": embedding}
    state.config = LoRAConfig(
        r=R, target_modules=tuple(NAMES[:1]), modules_to_save=("norm", "embed_tokens")
    )
    write_adapter(tmp_path / "adapter", state)
    (odd_model / "config.json").write_text('{"tie_word_embeddings": false}')
    assert merge(odd_model, tmp_path / "adapter", tmp_path / "out").replaced == 2
    tensors = read_file(tmp_path / "out" / "part-1-of-3.safetensors")[0]
    got = as_float64(tensors["model.layers.0.norm.weight"])
    assert np.array_equal(got, to_numpy(norm))
    got = as_float64(tensors["model.embed_tokens.weight"])
    assert np.array_equal(got, to_numpy(embedding.bfloat16()))
    for tied in ('{"tie_word_embeddings": true}', "{}"):  # no head is stored
        (odd_model / "config.json").write_text(tied)
        with pytest.raises(ValueError, match=r"'model\.embed_tokens', which .* ties to its output"):
            merge(odd_model, tmp_path / "adapter", tmp_path / "tied")


class TestErrors:
    def refused(self, state, odd_model, tmp_path, match) -> None:
        write_adapter(tmp_path / "adapter", state)
        with pytest.raises(ValueError, match=match):
            merge(odd_model, tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_unknown_layer(self, odd_model, tmp_path):
        state = make_state()
        state.layers["model.layers.7.q_proj"] = state.layers.pop(NAMES[0])
        match = r"'model\.layers\.7\.q_proj\.weight', which .*odd does not have"
        self.refused(state, odd_model, tmp_path, match)

    def test_other_shape(self, odd_model, tmp_path):
        state = make_state()
        state.layers[NAMES[0]] = state.layers[NAMES[1]]
        self.refused(state, odd_model, tmp_path, r"is \[40, 16\], of .* \[24, 16\]")

    def test_quantized(self, odd_model, tmp_path):
        state = make_state(names=NAMES[:1])
        A, B = torch.ones(R, 7), torch.ones(5, R)
        state.layers = {"model.layers.0.fp8": LayerState(A, B, 1.0, R)}
        self.refused(state, odd_model, tmp_path, "is stored as F8_E4M3")

    def test_overflow(self, odd_model, tmp_path):
        """Block 2 is float16."""
        state = make_state()
        layer = state.layers["model.layers.2.q_proj"]
        layer.lora_B = layer.lora_B * 1e6
        match = (
            r"model\.layers\.2\.q_proj\.weight: the merged weight is not finite in torch\.float16"
        )
        self.refused(state, odd_model, tmp_path, match)


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_adapter_in_the_output(inside, odd_model, tmp_path):
    """--overwrite would have removed it."""
    adapter = tmp_path / "out" / inside
    write_adapter(adapter, make_state())
    before = fingerprint(adapter)
    with pytest.raises(ValueError, match="which is to be written: use another folder"):
        merge(odd_model, adapter, tmp_path / "out", overwrite=True)
    assert fingerprint(adapter) == before


def test_goes_on(odd_model, tmp_path, monkeypatch):
    """A stopped merge continues, but not with another adapter."""
    from .test_resume import stop_after

    write_adapter(tmp_path / "adapter", make_state())
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        merge(odd_model, tmp_path / "adapter", out)
    assert is_unfinished(out)
    done = merge(odd_model, tmp_path / "adapter", out)
    whole = merge(odd_model, tmp_path / "adapter", tmp_path / "whole")
    assert 0 < done.size < whole.size
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


@pytest.mark.parametrize("name,bare", [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_logits(name, bare, request, tmp_path):
    """An adapter that PEFT made, merged on disk, in a model that transformers loads. `bare`: the
    files of GPT-2 as they are published, whose names lack the first part.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = request.getfixturevalue(name)
    if bare:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        folder = tmp_path / "bare"
        model.transformer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["GPT2LMHeadModel"]
        (folder / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    options = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, "lora_alpha": 8}
    if name == "llama":
        options |= {"modules_to_save": ["norm"], "use_rslora": True}
    else:
        options |= {"bias": "lora_only", "fan_in_fan_out": True}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
        ids = torch.arange(20).view(2, 10)
        want = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    got = merged(ids).logits
    # Two orders of summing in float32, in two layers.
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
