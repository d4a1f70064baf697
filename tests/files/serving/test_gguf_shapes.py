"""An adapter of another base than the one that is given: every layer's [out, in] is compared."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels.files.checkpoint import architecture
from lora_kernels.files.serving.gguf import write_gguf
from lora_kernels.files.serving.gguf_names import ARCHITECTURES, OWN_HEAD_SIZE, BaseModel
from lora_kernels.layers.state import LayerState
from lora_kernels.model.config import AdapterState, LoRAConfig

from .gguf_models import NAMES, linear_layers, make_model, save_config

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

LLAMA = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
LLAMA += [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.fixture(params=["transformers", "numbers"])
def source(request, monkeypatch) -> str:
    """Where the shapes come from: a model of transformers, or the configuration alone."""
    if request.param == "numbers":
        monkeypatch.setattr(architecture, "find_spec", lambda name: None)
    return request.param


def shapes_of(model, kind: str) -> dict[str, tuple[int, int]]:
    """(out, in) of all layers that can be adapted, by the model's own weights."""
    head = ARCHITECTURES[kind].head and not model.config.tie_word_embeddings
    found = {}
    for name in [*linear_layers(model), *(["lm_head"] if head else [])]:
        module = model.get_submodule(name)
        rows, cols = module.weight.shape
        found[name] = (rows, cols) if isinstance(module, torch.nn.Linear) else (cols, rows)
    return found


def state_of(shapes: dict[str, tuple[int, int]]) -> AdapterState:
    layers = {
        name: LayerState(torch.randn(2, cols), torch.randn(rows, 2), 1.0, 2.0)
        for name, (rows, cols) in shapes.items()
    }
    return AdapterState(LoRAConfig(r=2, lora_alpha=2, target_modules=tuple(shapes)), layers, {})


def change(file: Path, **values) -> Path:
    """Changes values of a configuration in place; None takes one out."""
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if values.get(k, 0) is not None}))
    return file


@pytest.mark.parametrize("kind", NAMES)
def test_every_size_of_every_layer(kind, source, tmp_path):
    model = make_model(kind)
    shapes = shapes_of(model, kind)
    base = BaseModel(save_config(model, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert base.targets(gguf, shapes).keys() == shapes.keys()
    for name, (out, cols) in shapes.items():
        for wrong in ((2 * out, cols), (out, cols + 2), (cols + 1, out)):
            with pytest.raises(ValueError) as caught:
                base.targets(gguf, shapes | {name: wrong})
            text = str(caught.value)
            assert f"{name!r} is [{wrong[0]}, {wrong[1]}]" in text and f"[{out}, {cols}]" in text
            assert str(tmp_path / "config.json") in text and "(--base)" in text


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("whole", [True, False], ids=["built", "not built"])
@pytest.mark.parametrize(
    ("outer", "text", "head"),
    [
        ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM", None),
        ("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM", "lm_head"),
    ],
)
def test_text_models_inside_another_one(outer, text, head, whole, prefix, tmp_path):
    inner = make_model(text, tie_word_embeddings=head is None)
    shapes = {n.replace("model.", prefix, 1): shape for n, shape in shapes_of(inner, text).items()}
    assert (head in shapes) is (head is not None)
    cls = getattr(transformers, outer)
    config = cls.config_class(text_config=inner.config.to_dict()).to_dict()
    config |= {"architectures": [outer], "tie_word_embeddings": head is None}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in config.items() if whole or k != "model_type"}))
    if not whole:  # it is not nested in the text model's own values
        change(file, text_config=inner.config.to_dict())
    base = BaseModel(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.targets(gguf, shapes)
    for name, (out, cols) in shapes.items():
        for wrong in ((out + 2, cols), (out, 2 * cols)):
            with pytest.raises(ValueError, match="it is another base model"):
                base.targets(gguf, shapes | {name: wrong})


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("size", ["width", "inner", "heads", "head size"])
def test_nothing_is_written_for_another_base(kind, size, source, tmp_path):
    """Of another width, intermediate size, number or size of heads; the old file is untouched."""
    model = make_model(kind)
    gpt2 = kind == "GPT2LMHeadModel"
    options = {
        "width": {"n_embd": 128} if gpt2 else {"hidden_size": 128},
        "inner": {"n_inner": 128} if gpt2 else {"intermediate_size": 128},
        "heads": {} if gpt2 else {"num_key_value_heads": 4},
        "head size": {} if gpt2 or kind.startswith("Qwen2") else {"head_dim": 32},
    }[size]
    if not options:
        pytest.skip("it has no such number")
    other = save_config(make_model(kind, **options), tmp_path / "other")
    out = tmp_path / "x.gguf"
    state = state_of(shapes_of(model, kind))
    for before in (None, "old"):
        if before is not None:
            out.write_text(before)
        with pytest.raises(ValueError, match="it is another base model"):
            write_gguf(state, other, out)
        assert {path.name for path in tmp_path.iterdir()} == {"other", *([out.name] * bool(before))}
    assert out.read_text() == "old"
    write_gguf(state, save_config(model, tmp_path / "base"), out)
    assert len(gguf.GGUFReader(out).tensors) == 2 * len(state.layers)


def test_layers_that_the_base_does_not_have(tmp_path):
    """Known by name, but not in this block."""
    model = make_model("Qwen2MoeForCausalLM", mlp_only_layers=[1])
    folder = save_config(model, tmp_path)
    shapes = shapes_of(make_model("Qwen2MoeForCausalLM"), "Qwen2MoeForCausalLM")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.shared_expert.*no such linear layer"):
        BaseModel(folder).targets(gguf, shapes)


class TestConfigurations:
    @pytest.fixture
    def llama(self, tmp_path):
        """(`config.json`, the shapes)"""
        model = make_model("LlamaForCausalLM")
        shapes = shapes_of(model, "LlamaForCausalLM")
        shapes = {name: shape for name, shape in shapes.items() if ".1." not in name}
        return save_config(model, tmp_path / "base") / "config.json", shapes

    @pytest.mark.parametrize(
        "values",
        [
            {"model_type": None},
            {"model_type": "no_such_type"},
            {"model_type": "gpt2"},
            {"rms_norm_eps": "small"},  # transformers' own kind of error
        ],
        ids=str,
    )
    def test_that_transformers_cannot_build(self, values, llama, tmp_path):
        file, shapes = llama
        base = BaseModel(change(file, **values))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            base.targets(gguf, shapes)
        wrong = shapes | {LLAMA[4]: (100, 64)}
        with pytest.raises(ValueError, match=r"gate_proj' is \[100, 64\].*\[96, 64\]"):
            base.targets(gguf, wrong)

    @pytest.mark.parametrize(
        ("key", "unknown"), [("intermediate_size", 3), ("num_key_value_heads", 0)]
    )
    def test_sizes_that_they_do_not_say(self, key, unknown, llama, tmp_path, monkeypatch):
        """A warning, unless transformers knows its default; the other sizes are compared."""
        monkeypatch.setattr(architecture, "find_spec", lambda name: None)
        file, shapes = llama
        shapes.pop(LLAMA[1])  # q and k need the number of heads for their order
        if key == "num_key_value_heads":
            shapes[LLAMA[2]], unknown = (32, 64), 1
        base = BaseModel(change(file, **{key: None}))
        with pytest.warns(UserWarning, match=f"of {unknown} layers.*transformers is not installed"):
            assert base.targets(gguf, shapes).keys() == shapes.keys()
        name = LLAMA[6] if key == "intermediate_size" else LLAMA[2]
        rows, cols = shapes[name]
        wrong = (rows + 2, cols) if key == "intermediate_size" else (rows, cols + 2)
        with pytest.raises(ValueError, match=rf"{name}.*\?.*another base model"):
            base.targets(gguf, shapes | {name: wrong})

    @pytest.mark.parametrize("value", ["many", 0, -4, 1.5, True])
    def test_sizes_that_are_no_numbers(self, value, llama, tmp_path):
        file, shapes = llama
        change(file, intermediate_size=value, rms_norm_eps="small")
        with pytest.raises(ValueError, match=f"intermediate_size is {value!r}"):
            write_gguf(state_of(shapes), file, tmp_path / "x.gguf")
        assert not list(tmp_path.glob("*gguf*"))

    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_the_default_size_of_heads_is_transformers(self, kind):
        config = getattr(transformers, kind).config_class().get_text_config()
        cls = type(config) if "mistral" not in ARCHITECTURES[kind].nested else None
        cls = cls or transformers.Ministral3Config  # the other one that it can contain
        narrow = cls(**{"n_embd" if kind.startswith("GPT2") else "hidden_size": 64})
        size = getattr(narrow, "head_dim", None)
        usual = narrow.hidden_size // narrow.num_attention_heads
        assert (size not in (None, usual)) is (kind in OWN_HEAD_SIZE)


def test_a_layer_alone(tmp_path):
    """One of another width is refused without the others."""
    model = make_model("Qwen2ForCausalLM")
    folder = save_config(model, tmp_path / "base")
    for name, (out, cols) in shapes_of(model, "Qwen2ForCausalLM").items():
        state = state_of({name: (out, cols)})
        write_gguf(state, folder / "config.json", tmp_path / "x.gguf")
        layer = state.layers[name]
        wider = replace(layer, lora_A=torch.randn(2, cols + 1))
        with pytest.raises(ValueError, match=rf"{name}.*{cols + 1}\].*{cols}\]"):
            write_gguf(replace(state, layers={name: wider}), folder, tmp_path / "x.gguf")
