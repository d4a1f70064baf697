"""Which layers PEFT adapts: what `check --for peft` says, against PEFT itself."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from lora_kernels.files.serving.check import REFUSED, RIGHT, WRONG
from lora_kernels.files.serving.convert import convert

from ...support.tiny_models import llama, mixtral
from .test_check import PREFIX, named, one, pair, rules, write, write_base

peft = pytest.importorskip("peft")

SIZES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
}  # fmt: skip
NAMES = [f"model.layers.{i}.{end}" for i in (0, 1) for end in SIZES]
ENDS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tensors() -> dict[str, torch.Tensor]:
    return named({n: pair(4, *SIZES[n.split(".", 3)[3]]) for n in NAMES})


def adapted(folder, model) -> set[str] | str:
    """The layers with the factors of the file; the error of PEFT if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = peft.PeftModel.from_pretrained(model, folder).base_model.model
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return {n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
            and any(bool(B.weight.any()) for B in m.lora_B.values())}  # fmt: skip


SELECTIONS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": [*ENDS, "gate_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": ["self_attn.q_proj", "layers.1.self_attn.v_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["query"]},
    {"target_modules": []},
    {"target_modules": "q_proj"},
    {"target_modules": r".*layers\.0\..*_proj"},
    {"target_modules": r"layers\.0\..*_proj"},
    {"target_modules": "("},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear"},
    {"exclude_modules": ["k_proj"]},
    {"exclude_modules": ["model.layers.1.self_attn.v_proj"]},
    {"exclude_modules": r".*\.1\..*"},
    {"exclude_modules": ENDS},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": []},
    {"layers_to_transform": [7]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"layers_to_transform": [1], "layers_pattern": "blocks"},
    {"layers_pattern": "layers"},
    {"layers_to_transform": [0], "target_modules": ["model.layers.1.self_attn.q_proj", "k_proj"]},
    {"layers_to_transform": [0], "target_modules": "all-linear"},
]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("options", SELECTIONS, ids=json.dumps)
def test_selected_layers_are_those_of_peft(options, with_base, tmp_path):
    folder = write(tmp_path / "a", tensors(), **{"target_modules": ENDS} | options)
    base = write_base(tmp_path / "base") if with_base else None
    result, real = one(folder, "peft", base), adapted(folder, llama())
    if isinstance(real, str):
        refused = result.outcome == REFUSED
        assert refused if with_base else refused or not any(x.effect for x in result.layers), real
    else:
        assert not result.verdict.refusals
        assert {layer.name for layer in result.layers if layer.is_right} == real
        assert result.outcome == (RIGHT if real == set(NAMES) else WRONG)
    for layer in result.layers:
        if not layer.effect:
            assert "does not select it" in layer.reason and layer.remedy.startswith("lora-kernels")
    if result.outcome == RIGHT:
        assert not result.remedies
        return
    assert any("lora-kernels convert ADAPTER OUT" in remedy for remedy in result.remedies)
    convert(folder, tmp_path / "out")
    assert one(tmp_path / "out", "peft", base).outcome == RIGHT
    assert adapted(tmp_path / "out", llama()) == set(NAMES)


def test_null_targets_are_those_of_the_type(tmp_path):
    folder = write(tmp_path / "a", tensors(), target_modules=None)
    result = one(folder, "peft", write_base(tmp_path / "base"))
    assert {layer.name for layer in result.layers if layer.is_right} == adapted(folder, llama())
    assert result.outcome == WRONG
    without = one(folder, "peft")
    assert any("target_modules is null" in note for note in without.verdict.notes)
    strange = write_base(tmp_path / "other", llama())
    config = json.loads((strange / "config.json").read_text()) | {"model_type": "olmo"}
    config |= {"architectures": ["OlmoForCausalLM"]}
    (strange / "config.json").write_text(json.dumps(config))
    result = one(folder, "peft", strange)
    table = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert ("olmo" in table) or "has no targets for the type 'olmo'" in rules(result)


def test_modules_to_save_are_never_adapted(tmp_path):
    extra = {f"{PREFIX}model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}
    saved = ["model.layers.0.self_attn.q_proj"]
    folder = write(tmp_path / "a", tensors() | extra, target_modules=ENDS, modules_to_save=saved)
    result = one(folder, "peft", write_base(tmp_path / "base"))
    assert {layer.name for layer in result.layers if layer.is_right} == set(NAMES) - set(saved)
    assert set(NAMES) - set(saved) == adapted(folder, llama())


def test_all_linear_leaves_out_the_head_and_embeddings(tmp_path):
    layers = named({NAMES[0]: pair(), "lm_head": pair(4, 96)})
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    layers |= {f"{name}A": torch.randn(4, 96), f"{name}B": torch.randn(32, 4)}
    folder = write(tmp_path / "a", layers, target_modules="all-linear")
    for base in (None, write_base(tmp_path / "base")):
        result = one(folder, "peft", base)
        assert {layer.name for layer in result.layers if layer.is_right} == {NAMES[0]}
    assert NAMES[0] in adapted(folder, llama())


def test_parameters_have_to_be_selected(tmp_path):
    model = mixtral()
    name = next(n for n, _ in model.named_modules() if n.endswith("experts"))
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters)
    trained = peft.get_peft_model(model, config)
    with torch.no_grad():
        for n, parameter in trained.named_parameters():
            if "lora_" in n:
                parameter.normal_()
    trained.save_pretrained(tmp_path)
    base = write_base(tmp_path / "base", mixtral())
    assert one(tmp_path, "peft", base).outcome == RIGHT
    file = tmp_path / "adapter_config.json"
    options = json.loads(file.read_text())
    file.write_text(json.dumps(options | {"target_parameters": None}))
    for where in (None, base):
        result = one(tmp_path, "peft", where)
        bare = {layer.name for layer in result.layers if not layer.effect}
        assert name in bare and all("experts" in n for n in bare)
        assert all("target_parameters" in x.reason for x in result.layers if not x.effect)
        assert {x.remedy for x in result.layers if not x.effect} == {
            f"add {target!r} to target_parameters in adapter_config.json" for target in parameters
        }


REFUSALS = [
    ({"lora_alpha": None}, "must have lora_alpha"),
    ({"r": None}, "must have r,"),
    ({"r": 4.0}, "r must be written as a whole number"),
    ({"peft_type": "lora"}, "peft_type must be 'LORA'"),
    ({"init_lora_weights": "PiSSA"}, "in lower case"),
    ({"init_lora_weights": "EVA"}, "in lower case"),
    ({"init_lora_weights": "nonsense"}, "none of PEFT's starts"),
    ({"init_lora_weights": "loftq"}, "needs loftq_config"),
    ({"modules_to_save": ["lm_head"]}, "no tensors of lm_head"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
    ({"trainable_token_indices": [1, 2]}, "rows of an embedding"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias needs"),
]


@pytest.mark.parametrize("options,match", REFUSALS, ids=[json.dumps(o) for o, _ in REFUSALS])
def test_configurations_that_peft_cannot_load(options, match, tmp_path):
    folder = write(tmp_path / "a", tensors(), **{"target_modules": ENDS} | options)
    assert isinstance(adapted(folder, llama()), str)
    for base in (None, write_base(tmp_path / "base")):
        result = one(folder, "peft", base)
        assert result.outcome == REFUSED and match in rules(result)
        assert all(result.remedies)


@pytest.mark.parametrize("start", ["GAUSSIAN", "OLoRA", "MiCA", "eva", "orthogonal"])
def test_starts_that_peft_knows(start, tmp_path):
    folder = write(tmp_path / "a", tensors(), target_modules=ENDS, init_lora_weights=start)
    assert adapted(folder, llama()) == set(NAMES)
    assert one(folder, "peft").outcome == RIGHT


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_promised_tensors_that_are_missing(option, tmp_path):
    folder = write(tmp_path / "a", tensors(), target_modules=ENDS, **{option: True})
    result = one(folder, "peft")
    assert result.outcome == WRONG
    assert all("is not in the file" in layer.reason and layer.remedy for layer in result.layers)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_null_is_no_default(engine, tmp_path):
    result = one(write(tmp_path / "a", lora_alpha=None), engine)
    assert result.outcome == REFUSED and "missing or null" in rules(result)
    if engine != "llama.cpp":
        assert one(write(tmp_path / "b", r=None), engine).outcome == REFUSED
