"""What `check` says of adapters that belong to another base or hold more than A and B, and that
every remedy that it names is one that works.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import torch

from lora_kernels import LoRAConfig, add_lora, save_adapter
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.cli import main
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.files.serving.check import REFUSED, RIGHT, WRONG, check
from lora_kernels.files.serving.engines import ENGINES

from ...support.tiny_models import gpt2, llama
from .test_check import PREFIX, QV, TEXT_ENGINES, named, one, pair, rules, write, write_base

safetensors = pytest.importorskip("safetensors.torch")

ALL = ["vllm", "sglang", "llama.cpp", "ollama", "peft"]
BIAS = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"


def outcomes(results) -> dict[str, str]:
    return {result.engine: result.outcome for result in results}


# Trained tensors


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_no_copies(bias, tmp_path):
    """PEFT's own files with trained biases: no server takes them."""
    peft = pytest.importorskip("peft")
    base = llama(attention_bias=True)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, bias=bias, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "a")
    assert BIAS in safetensors.load_file(tmp_path / "a" / ADAPTER_FILE)
    found = outcomes(check(tmp_path / "a", engines=ALL))
    assert found.pop("peft") == RIGHT and set(found.values()) == {REFUSED}


def test_biases_beside_a_copy_of_the_weight_are_copies(tmp_path):
    name = f"{PREFIX}lm_head.base_layer."
    tensors = named(QV) | {f"{name}weight": torch.ones(96, 32), f"{name}bias": torch.ones(96)}
    assert one(write(tmp_path / "a", tensors), "sglang").outcome == RIGHT
    trained = one(write(tmp_path / "b", tensors, bias="all"), "sglang")
    assert list(trained.verdict.dropped) == [f"{name}bias"] and trained.remedies
    alone = named(QV) | {f"{name}bias": torch.ones(96)}
    assert one(write(tmp_path / "c", alone), "sglang").outcome == WRONG


# The base


def test_loftq_belongs_to_the_base_that_it_made(tmp_path):
    torch.manual_seed(0)
    llama(initializer_range=0.1).save_pretrained(tmp_path / "original")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "original")
    targets = ["q_proj", "v_proj"]
    add_lora(model, LoRAConfig(r=4, target_modules=targets, init_lora_weights="loftq"))
    with pytest.warns(UserWarning, match="keep that base too"):
        save_adapter(model, tmp_path / "a")
    model.config.save_pretrained(tmp_path / "made")
    for base in (None, tmp_path / "original"):
        for result in check(tmp_path / "a", base, TEXT_ENGINES):
            assert result.outcome == WRONG
            assert all("loftq" in layer.reason for layer in result.layers)
            assert any("model.save_pretrained" in remedy for remedy in result.remedies)
    for result in check(tmp_path / "a", tmp_path / "made", TEXT_ENGINES):
        assert result.outcome == RIGHT
        assert any("right only on the base that it made" in note for note in result.verdict.notes)


@pytest.fixture(scope="module")
def residual(tmp_path_factory) -> Path:
    """A folder with "original", the "residual" base and an adapter "runs/trained" of it."""
    root = tmp_path_factory.mktemp("residual")
    llama(initializer_range=0.1).save_pretrained(root / "original")
    config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    initialize(root / "original", root / "residual", config)
    trained = root / "runs" / "trained"
    trained.mkdir(parents=True)
    start = root / "residual" / "adapter"
    tensors = safetensors.load_file(start / ADAPTER_FILE)
    safetensors.save_file({k: 1.01 * v for k, v in tensors.items()}, trained / ADAPTER_FILE)
    options = json.loads((start / ADAPTER_CONFIG).read_text())
    options["base_model_name_or_path"] = "residual"  # as named in the folder of the training
    (trained / ADAPTER_CONFIG).write_text(json.dumps(options))
    return root


@pytest.mark.parametrize("there", [".", "runs", "runs/trained", "/"])
def test_a_residual_base_is_found_from_any_folder(there, residual, monkeypatch, capsys):
    monkeypatch.chdir(residual / there)
    for adapter in (residual / "runs" / "trained", os.path.relpath(residual / "runs" / "trained")):
        adapter = Path(adapter)
        for base in (None, residual / "original"):
            for result in check(adapter, base, TEXT_ENGINES):
                assert result.outcome == WRONG
                (remedy,) = result.remedies
                assert remedy.startswith("lora-kernels convert ADAPTER OUT --start")
        for result in check(adapter, residual / "residual", TEXT_ENGINES):
            assert result.outcome == RIGHT and not result.remedies
        assert main(["convert", str(adapter), str(residual / "out")]) == 1
        assert "from whose weights a start was subtracted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name,noted",
    [
        ("/data/models/mine", True), ("./mine", True), ("../mine", True), ("~/mine", True),
        ("a/b/c", True), ("runs/mine", True), ("C:\\models\\mine", True),
        ("meta-llama/Llama-3-8B", False), ("gpt2", False), (None, False),
    ],
)  # fmt: skip
def test_bases_that_are_not_here(name, noted, tmp_path):
    (tmp_path / "runs").mkdir()
    result = one(write(tmp_path / "a", base_model_name_or_path=name), "peft")
    assert any("a folder that is not here" in n for n in result.verdict.notes) == noted
    assert result.outcome == RIGHT


# Rules


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_heads_that_are_tied_by_default(kind, tmp_path):
    """The configuration file need not say so."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    more = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 96}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, **more)) if kind == "gemma2" else None
    base = write_base(tmp_path / "base", gemma or gpt2())
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    tensors = named({"lm_head": pair(4, config["vocab_size"])})
    adapter = write(tmp_path / "a", tensors, target_modules=["lm_head"])
    assert "tied to the embedding" in rules(one(adapter, "llama.cpp", base))
    without = one(adapter, "llama.cpp")
    assert any("if it is tied" in note for note in without.verdict.notes)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_sglang_refuses_patterns_that_say_nothing_new(option, tmp_path):
    value = 4 if option == "rank_pattern" else 8
    assert one(write(tmp_path / "a", **{option: {}}), "sglang").outcome == RIGHT
    result = one(write(tmp_path / "b", **{option: {"q_proj": value}}), "sglang")
    assert result.outcome == REFUSED and f"{option} is refused" in rules(result)


@pytest.mark.parametrize("saved", [["score"], ["classifier", "score"], "score"])
def test_vllm_heads(saved, tmp_path):
    tensors = named(QV) | {f"{PREFIX}score.weight": torch.ones(2, 32)}
    result = one(write(tmp_path / "a", tensors, modules_to_save=saved), "vllm")
    assert result.outcome == REFUSED and "0.33.0 takes classifier and score" in rules(result)


@pytest.mark.parametrize("engine", ["vllm", "peft"])
def test_one_name_of_a_saved_module(engine, tmp_path):
    tensors = named(QV) | {f"{PREFIX}lm_head.weight": torch.ones(96, 32)}
    assert "l, m" not in rules(
        one(write(tmp_path / "a", tensors, modules_to_save="lm_head"), engine)
    )


# Diffusers


UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write_file(file: Path, layer: str, alpha: float | None, metadata=None) -> Path:
    A, B = pair()
    tensors = {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    if alpha is not None:
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    safetensors.save_file(tensors, file, metadata)
    return file


def test_stable_diffusion_drops_alpha(tmp_path):
    result = one(write_file(tmp_path / "a.safetensors", UNET, 2.0), "diffusers")
    assert result.outcome == WRONG and result.layers[0].strength == 2
    assert "multiply <layer>.lora_B.weight" in result.remedies[0]
    assert one(write_file(tmp_path / "b.safetensors", UNET, 4.0), "diffusers").outcome == RIGHT
    flux = UNET.replace("unet", "transformer")
    assert one(write_file(tmp_path / "c.safetensors", flux, 2.0), "diffusers").outcome == RIGHT


@pytest.mark.parametrize(
    "header,match",
    [("{", "is not JSON"), ('{"unet.r": 8, "unet.lora_alpha": 8}', "has 4 instead of 8")],
)
def test_headers_that_diffusers_refuses(header, match, tmp_path):
    metadata = {"lora_adapter_metadata": header}
    result = one(write_file(tmp_path / "a.safetensors", UNET, None, metadata), "diffusers")
    assert result.outcome == REFUSED and match in rules(result)


# Remedies


def embedding() -> dict[str, torch.Tensor]:
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    return {f"{name}A": torch.randn(4, 96), f"{name}B": torch.randn(32, 4)}


def doubles() -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in named(QV).items()}


def text_names() -> dict[str, torch.Tensor]:
    return named([n.replace("model.", "language_model.model.", 1) for n in QV])


TROUBLES = {
    "rslora": (None, {"use_rslora": True}),
    "alpha": (None, {"alpha_pattern": {"q_proj": 3}}),
    "half": (None, {"lora_alpha": 2.5}),
    "regex": (None, {"target_modules": r".*_proj"}),
    "narrow": (None, {"target_modules": ["q_proj"]}),
    "named": (lambda: named(QV, adapter="default."), {}),
    "bare": (lambda: named(QV, prefix=""), {}),
    "text": (text_names, {}),
    "doubles": (doubles, {}),
    "embedding": (
        lambda: named(QV) | embedding(),
        {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    ),
    "dora": (
        lambda: named(QV) | {f"{PREFIX}{n}.lora_magnitude_vector": torch.ones(4) for n in QV},
        {"use_dora": True},
    ),
    "bias": (
        lambda: named(QV) | {f"{PREFIX}{n}.lora_B.bias": torch.ones(4) for n in QV},
        {"lora_bias": True},
    ),
    "head": (
        lambda: named(QV) | {f"{PREFIX}lm_head.weight": torch.ones(96, 32)},
        {"modules_to_save": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_commands_that_are_named_work(trouble, with_base, tmp_path, capsys):
    """Run as they are printed, they make the adapter right."""
    make, options = TROUBLES[trouble]
    adapter = write(tmp_path / "a", make() if make else None, **options)
    base = write_base(tmp_path / "base")
    places = {"ADAPTER": adapter, "OUT": tmp_path / "out", "OUT.gguf": tmp_path / "out.gguf"}
    places["BASE"] = base
    given = base if with_base else None
    for result in check(adapter, given, ALL):
        texts = [*result.remedies, *(n for n in result.verdict.notes if "lora-kernels" in n)]
        assert bool(result.remedies) == (result.outcome != RIGHT)
        for layer in result.layers:
            assert layer.is_right or layer.remedy
        for text in texts:
            command = text[text.find("lora-kernels convert") :].partition(" writes")[0]
            if not command.startswith("lora-kernels convert"):
                assert "merge" in text
                continue
            words = shlex.split(command.partition(",")[0].partition(";")[0])[1:]
            gguf = "--to" in words
            if gguf:
                pytest.importorskip("gguf")
                assert "--base" in words
            assert main([str(places.get(word, word)) for word in words]) == 0, capsys.readouterr()
            if not gguf:
                assert one(tmp_path / "out", result.engine, given).outcome == RIGHT, text


@pytest.mark.parametrize("dtype,outcome", [("float16", WRONG), ("bfloat16", RIGHT)])
def test_another_dtype_helps(dtype, outcome, tmp_path):
    tensors = named(
        {name: (1e-7 * torch.randn(4, 32), 1e6 * torch.randn(32, 4)) for name in QV[:1]}
    )
    adapter = write(tmp_path / "a", tensors, target_modules=["q_proj"])
    result = one(adapter, "vllm", write_base(tmp_path / "base", dtype=dtype))
    assert result.outcome == outcome
    if outcome == WRONG:
        assert result.remedies[0].startswith("serve the model in bfloat16 (--dtype bfloat16")


def test_values_that_are_not_finite(tmp_path):
    tensors = {name: tensor * float("nan") for name, tensor in named(QV).items()}
    result = one(write(tmp_path / "a", tensors), "vllm")
    assert result.outcome == WRONG and "not finite" in result.remedies[0]


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "peft"])
def test_one_remedy_for_a_wrong_prefix(engine, tmp_path):
    tensors = named([n.replace("model.", "text.", 1) for n in QV])
    adapter, base = write(tmp_path / "a", tensors), write_base(tmp_path / "base")
    result = one(adapter, engine, base)
    assert result.remedies == ["lora-kernels convert ADAPTER OUT --rename text. model."]
    other = named([n.replace("layers.1", "layers.7") for n in QV])
    result = one(write(tmp_path / "b", other), engine, base)
    assert result.remedies == ["use the base that the adapter was trained on"]


def test_mixtral_experts_for_sglang(tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.0."
    tensors = named({f"{name}{end}": pair() for end in ("w1", "w2", "w3")})
    adapter = write(tmp_path / "a", tensors, target_modules=["w1", "w2", "w3"])
    result = one(adapter, "sglang")
    assert result.remedies == [
        "add gate_proj, down_proj and up_proj to target_modules in adapter_config.json"
    ]
    targets = ["w1", "w2", "w3", "gate_proj", "down_proj", "up_proj"]
    assert one(write(tmp_path / "b", tensors, target_modules=targets), "sglang").outcome == RIGHT


def test_every_engine_gives_remedies_of_its_own(tmp_path):
    """An engine's refusals and wrong layers are never without what to do."""
    for name in ENGINES:
        start = write(tmp_path / name, init_lora_weights="pissa", use_rslora=True)
        result = one(start, name)
        assert result.outcome == RIGHT or (result.remedies and all(result.remedies))
