"""GGUF adapters: what is in the file is ΔW in llama.cpp's layout; refusals; nothing left behind."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_kernels._utils.errors import MissingExtraError
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
from lora_kernels.files.serving.gguf import write_gguf
from lora_kernels.files.serving.gguf_names import ARCHITECTURES
from lora_kernels.init import get_initializer, initializer_names
from lora_kernels.model.config import AdapterState, LoRAConfig

from ...support.adapters import adapt_model
from ...support.exhaustive import paired
from ...support.oracle import ROUNDING, to_numpy
from .gguf_models import NAMES, PERMUTED, linear_layers, make_model, save_config

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

STARTS = [n for n in initializer_names() if not get_initializer(n).rewrites_base]
LLAMA = [f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"]
# llama.cpp's names (docs/development/HOWTO-add-model.md, and `LLM_TENSOR_NAMES`).
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


def adapter(model, layers, **options):
    """A trained adapter and its ΔW by layer, in float64."""
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": "loram", **options}
    return adapt_model(model, layers, LoRAConfig(**options))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama, its folder, an adapter of its attention, and the ΔW."""
    model = make_model("LlamaForCausalLM")
    folder = save_config(model, tmp_path_factory.mktemp("llama"))
    return model, folder, *adapter(model, LLAMA)


def contents(file: Path):
    """The fields and the tensors [ne1, ne0] of a file, by the package gguf alone."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = values.astype(np.float64)
    return fields, tensors


def applied(file: Path) -> dict[str, np.ndarray]:
    """ΔW of every tensor, as llama.cpp applies it: scale = alpha / rank, where alpha is not 0."""
    fields, tensors = contents(file)
    alpha = fields["adapter.lora.alpha"]
    names = {name.rpartition(".")[0] for name in tensors}
    assert tensors.keys() == {f"{name}.lora_{half}" for name in names for half in "ab"}
    found = {}
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = (alpha / b.shape[1] if alpha else 1.0) * b @ a
    return found


def transformers_rows(delta: np.ndarray, layer: str, model) -> np.ndarray:
    """The rows of q or k in transformers' order, by transformers."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    config = model.config
    if type(model).__name__ not in PERMUTED or not layer.endswith(("q_proj", "k_proj")):
        return delta
    queries = config.num_attention_heads
    heads = queries if layer.endswith("q_proj") else config.num_key_value_heads
    return LlamaTensorProcessor({})._reverse_permute_weights(delta, queries, heads)


def assert_close(got: np.ndarray, want: np.ndarray, dtype=torch.float32) -> None:
    # s·B' and A' are rounded once each; products may be a few times as large as their sum.
    assert np.linalg.norm(got - want) <= 8 * ROUNDING[dtype] * np.linalg.norm(want)


class TestContents:
    @pytest.mark.parametrize("kind", NAMES)
    def test_every_layer_of_every_architecture(self, kind, tmp_path):
        model = make_model(kind)
        layers = linear_layers(model)
        known = ARCHITECTURES[kind]
        assert {name.split(".", 3)[3] for name in layers} == set(known.linears)
        heads = ["lm_head"] if known.head and not model.config.tie_word_embeddings else []
        state, deltas = adapter(model, layers + heads, rank_pattern={"q_proj": 2, "c_fc": 6})
        report = write_gguf(state, save_config(model, tmp_path / "base"), tmp_path / "x.gguf")
        fields, _ = contents(tmp_path / "x.gguf")
        assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
        assert fields["general.architecture"] == NAMES[kind] == report.architecture
        assert fields["general.file_type"] == 0
        got = applied(tmp_path / "x.gguf")
        assert len(got) == len(deltas) == report.layers
        for layer, delta in deltas.items():
            block, end = layer.split(".", 3)[2:] if layer != "lm_head" else ("", "")
            name = f"blk.{block}.{TENSORS[end]}.weight" if end else "output.weight"
            assert_close(transformers_rows(got[name], layer, model), delta)

    @pytest.mark.parametrize(("start", "residual"), paired(STARTS, ["absorb", "implicit"]))
    def test_every_start_and_scaling(self, start, residual, llama, tmp_path):
        model, folder, *_ = llama
        for options in ({"use_rslora": True, "lora_alpha": 3.7}, {"lora_alpha": 0.3}):
            state, deltas = adapter(model, LLAMA, init_lora_weights=start, **options)
            for layer in state.layers.values():
                layer.residual = residual
            write_gguf(state, folder, tmp_path / "x.gguf")
            got = applied(tmp_path / "x.gguf")
            for layer, part in zip(LLAMA, ("q", "k", "v", "output"), strict=True):
                delta = transformers_rows(got[f"blk.1.attn_{part}.weight"], layer, model)
                assert_close(delta, deltas[layer])

    def test_layers_of_different_ranks_get_one_rank_and_one_alpha(self, llama, tmp_path):
        model, folder, *_ = llama
        state, deltas = adapter(
            model,
            LLAMA,
            rank_pattern={"q_proj": 2, "v_proj": 7},
            alpha_pattern={"k_proj": 0.5, "q_proj": 3},
        )
        report = write_gguf(state, folder, tmp_path / "x.gguf")
        fields, tensors = contents(tmp_path / "x.gguf")
        assert fields["adapter.lora.alpha"] == report.r == 14  # [B − B₀, B₀] of rank 7
        assert {t.shape[0] for n, t in tensors.items() if n.endswith("a")} == {14}
        assert {t.shape[1] for n, t in tensors.items() if n.endswith("b")} == {14}
        delta = applied(tmp_path / "x.gguf")["blk.1.attn_q.weight"]
        assert_close(transformers_rows(delta, LLAMA[0], model), deltas[LLAMA[0]])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_types(self, dtype, llama, tmp_path):
        model, folder, state, deltas = llama
        report = write_gguf(state, folder, tmp_path / "x.gguf", dtype=dtype)
        assert report.size == (tmp_path / "x.gguf").stat().st_size
        assert str(dtype).removeprefix("torch.") in str(report)
        name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        reader = gguf.GGUFReader(tmp_path / "x.gguf")
        assert {tensor.tensor_type.name for tensor in reader.tensors} == {name}
        file_type = gguf.LlamaFileType[f"MOSTLY_{name}"]
        assert reader.get_field("general.file_type").contents() == file_type
        got = applied(tmp_path / "x.gguf")["blk.1.attn_k.weight"]
        error = transformers_rows(got, LLAMA[1], model) - deltas[LLAMA[1]]
        assert np.linalg.norm(error) < 0.005 * np.linalg.norm(deltas[LLAMA[1]])

    def test_attention_scores_are_the_same_under_llama_cpp_s_rope(self, llama, tmp_path):
        """transformers rotates i and i + d/2, llama.cpp's Llama rotates 2i and 2i + 1."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        model, folder, state, deltas = llama
        write_gguf(state, folder, tmp_path / "x.gguf")
        got = applied(tmp_path / "x.gguf")
        config, steps = model.config, 5
        size = config.hidden_size // config.num_attention_heads
        x = np.random.default_rng(0).standard_normal((steps, config.hidden_size))
        angles = np.arange(steps)[:, None] * 10000.0 ** (-2 * np.arange(size // 2) / size)

        def rotated(delta):
            """[steps, heads, d / 2] complex numbers: the pairs of neighbors, rotated."""
            pairs = (x @ delta.T).reshape(steps, -1, size // 2, 2)
            return (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]

        def scores(q, k):
            k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
            return np.einsum("ihd,jhd->hij", q, k.conj()).real

        theirs = scores(*(rotated(got[f"blk.1.attn_{part}.weight"]) for part in "qk"))
        q, k = (
            torch.from_numpy(x @ deltas[layer].T).reshape(1, steps, -1, size).transpose(1, 2)
            for layer in LLAMA[:2]
        )
        doubled = torch.from_numpy(np.concatenate([angles, angles], axis=1))[None]
        q, k = (
            to_numpy(t[0].transpose(0, 1))
            for t in apply_rotary_pos_emb(q, k, doubled.cos(), doubled.sin())
        )
        ours = scores(q, k)
        assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max()

    def test_an_adapter_from_a_folder(self, llama, tmp_path):
        _, folder, state, _ = llama
        write_adapter(tmp_path / "adapter", state)
        write_gguf(read_adapter(tmp_path / "adapter"), folder / "config.json", tmp_path / "a.gguf")
        write_gguf(state, folder, tmp_path / "b.gguf")
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()

    @pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
    @pytest.mark.parametrize(
        ("outer", "text"),
        [
            ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
            ("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
        ],
    )
    def test_the_text_model_inside_another_one(self, outer, text, prefix, tmp_path):
        model = make_model(text)
        state, _ = adapter(model, linear_layers(model))
        outside = {"architectures": [outer], "text_config": model.config.to_dict()}
        (tmp_path / "outer.json").write_text(json.dumps(outside))
        write_gguf(state, save_config(model, tmp_path / "text"), tmp_path / "text.gguf")
        inner = {name.replace("model.", prefix, 1): s for name, s in state.layers.items()}
        nested = replace(state, layers=inner)
        write_gguf(nested, tmp_path / "outer.json", tmp_path / "outer.gguf")
        assert (tmp_path / "outer.gguf").read_bytes() == (tmp_path / "text.gguf").read_bytes()
        with pytest.raises(ValueError, match="it is not in the language model"):
            write_gguf(state, tmp_path / "outer.json", tmp_path / "outer.gguf")

    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_the_default_of_tied_heads_is_transformers(self, kind):
        default = getattr(transformers, kind).config_class().tie_word_embeddings
        assert default is ARCHITECTURES[kind].tied


def with_layers(state: AdapterState, *names: str) -> AdapterState:
    """The first layer under other names."""
    first = next(iter(state.layers.values()))
    return replace(state, layers=dict.fromkeys(names, first))


class TestRefusals:
    def refused(self, state, base, tmp_path, match, error=ValueError, **options):
        out = tmp_path / "x.gguf"
        with pytest.raises(error, match=match):
            write_gguf(state, base, out, **options)
        assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))

    def config(self, tmp_path, llama, **changes) -> Path:
        values = json.loads((llama[1] / "config.json").read_text()) | changes
        file = tmp_path / "config.json"
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        return file

    @pytest.mark.parametrize(
        "kind", ["FalconForCausalLM", "BloomForCausalLM", "MambaForCausalLM", "LlamaModel", 7]
    )
    def test_architectures_by_name_with_those_that_are_known(self, kind, llama, tmp_path):
        file = self.config(tmp_path, llama, architectures=[kind])
        self.refused(llama[2], file, tmp_path, rf"{kind}.*LlamaForCausalLM.*Starcoder2ForCausalLM")

    def test_configurations(self, llama, tmp_path):
        state = llama[2]
        file = self.config(tmp_path, llama, architectures=None)
        self.refused(state, file, tmp_path, "'architectures'")
        file = self.config(tmp_path, llama, num_hidden_layers="two")
        self.refused(state, file, tmp_path, "num_hidden_layers is 'two'")
        self.refused(state, tmp_path / "no", tmp_path, "does not exist", FileNotFoundError)
        for text in (None, {"model_type": "mistral4"}):
            values = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
            file = self.config(tmp_path, llama, **values)
            self.refused(state, file, tmp_path, "mistral, ministral3")

    def test_another_base(self, llama, tmp_path):
        file = self.config(tmp_path, llama, num_hidden_layers=1)
        self.refused(llama[2], file, tmp_path, r"layers\.1.*has 1 blocks.*another base")
        file = self.config(tmp_path, llama, num_key_value_heads=1)
        self.refused(llama[2], file, tmp_path, r"k_proj.*\[32, 64\].*\[16, 64\].*another base")

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("model.embed_tokens", "no tensor"),
            ("model.layers.0.mlp.gate_up_proj", "no tensor"),  # gguf has a name for it
            ("model.layers.0.block_sparse_moe.experts.3.w1", "experts of a block are one tensor"),
            ("language_model.model.layers.0.mlp.up_proj", "no tensor"),
            ("score", "no tensor"),
        ],
    )
    def test_layers_without_a_tensor(self, name, why, llama, tmp_path):
        state = with_layers(llama[2], name)
        self.refused(state, llama[1], tmp_path, rf"{name}.*{why}.*q_proj.*lora-kernels merge")

    def test_tied_heads(self, llama, tmp_path):
        state = with_layers(llama[2], "lm_head")
        file = self.config(tmp_path, llama, tie_word_embeddings=True)
        self.refused(state, file, tmp_path, "tied to the embedding.*target_modules.*merge")
        # The configurations of Gemma models do not say it.
        for kind in ("GPT2LMHeadModel", "GemmaForCausalLM", "CohereForCausalLM"):
            file = self.config(tmp_path, llama, architectures=[kind], tie_word_embeddings=None)
            self.refused(state, file, tmp_path, "tied to the embedding")
        file = self.config(
            tmp_path, llama, architectures=["Gemma2ForCausalLM"], tie_word_embeddings=False
        )
        self.refused(state, file, tmp_path, "tied to the embedding")

    @pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.norm.weight"])
    def test_tensors_beside_the_factors(self, name, llama, tmp_path):
        state = replace(llama[2], extra={name: torch.ones(64)})
        self.refused(state, llama[1], tmp_path, rf"1 tensors.*{name}.*lora-kernels merge")

    def test_numbers(self, llama, tmp_path):
        state, _ = adapter(llama[0], LLAMA[:1])
        state.layers[LLAMA[0]].scaling = 1e8
        self.refused(state, llama[1], tmp_path, "too large for torch.f", dtype=torch.float16)
        state.layers[LLAMA[0]].lora_A[0, 0] = torch.nan
        self.refused(state, llama[1], tmp_path, "NaN")
        self.refused(llama[2], llama[1], tmp_path, "float32, float16", dtype=torch.int8)

    def test_places(self, llama, tmp_path):
        with pytest.raises(ValueError, match="is a folder"):
            write_gguf(llama[2], llama[1], tmp_path)
        with pytest.raises(FileNotFoundError, match="make it first"):
            write_gguf(llama[2], llama[1], tmp_path / "no" / "x.gguf")

    def test_packages(self, llama, tmp_path, monkeypatch):
        old = type("MODEL_ARCH", (), {})
        monkeypatch.setattr(gguf, "MODEL_ARCH", old)
        self.refused(llama[2], llama[1], tmp_path, "does not know LlamaForCausalLM.*upgrade")
        monkeypatch.setitem(sys.modules, "gguf", None)
        self.refused(llama[2], llama[1], tmp_path, r"lora-kernels\[gguf\]", MissingExtraError)


class TestReplacement:
    def test_a_file_is_replaced(self, llama, tmp_path):
        out = tmp_path / "x.gguf"
        out.write_text("old")
        write_gguf(llama[2], llama[1], out)
        assert list(tmp_path.iterdir()) == [out] and applied(out)

    @pytest.mark.parametrize("when", ["written", "flipped", "read", "renamed"])
    def test_after_an_error_the_folder_is_as_it_was(self, when, llama, tmp_path, monkeypatch):
        out = tmp_path / "x.gguf"
        out.write_text("old")
        write = gguf.GGUFWriter.write_tensors_to_file

        def flip(writer, **options):
            write(writer, **options)
            writer.flush()
            (file,) = tmp_path.glob(".x.gguf.*")
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)

        def fail(*_, **__):
            raise OSError("disk is full")

        target, name, replacement = {
            "written": (gguf.GGUFWriter, "write_tensors_to_file", fail),
            "flipped": (gguf.GGUFWriter, "write_tensors_to_file", flip),
            "read": (gguf, "GGUFReader", fail),
            "renamed": (Path, "replace", fail),
        }[when]
        monkeypatch.setattr(target, name, replacement)
        wanted = "is not what was written" if when == "flipped" else "disk is full"
        with pytest.raises(OSError, match=wanted):
            write_gguf(llama[2], llama[1], out)
        assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
        assert out.read_text() == "old"

    @pytest.mark.parametrize("what", ["field", "tensor", "more"])
    def test_the_reading_notices_any_difference(self, what, llama, tmp_path, monkeypatch):
        add_string, add_tensor = gguf.GGUFWriter.add_string, gguf.GGUFWriter.add_tensor

        def string(writer, key, value):
            add_string(writer, key, "loha" if value == "lora" else value)

        def tensor(writer, name, values, **options):
            if "attn_k.weight.lora_b" not in name:
                return add_tensor(writer, name, values, **options)
            if what == "more":
                add_tensor(writer, name, values, **options)
                return add_tensor(writer, "another", values, **options)
            return add_tensor(writer, name, np.ascontiguousarray(values.T), **options)

        name, replacement = ("add_string", string) if what == "field" else ("add_tensor", tensor)
        monkeypatch.setattr(gguf.GGUFWriter, name, replacement)
        wrong = {"field": "adapter.type", "tensor": "blk.1.attn_k", "more": "another"}[what]
        with pytest.raises(OSError, match=wrong):
            write_gguf(llama[2], llama[1], tmp_path / "x.gguf")
        assert not list(tmp_path.iterdir())
