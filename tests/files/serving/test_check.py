"""What is read, what is refused by which rule, and what is compared with a base."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lora_kernels import LoRAConfig, add_lora, save_adapter
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.files.serving.check import REFUSED, RIGHT, WRONG, check
from lora_kernels.files.serving.convert import convert
from lora_kernels.files.serving.stored import DIFFUSERS, NATIVE, PEFT, read_stored
from lora_kernels.files.serving.updates import Update, relative_error

from ...support.packages import needs_transformers
from ...support.tiny_models import gpt2, llama, mixtral

safetensors = pytest.importorskip("safetensors.torch")

PREFIX = "base_model.model."
TEXT_ENGINES = ["vllm", "sglang", "llama.cpp", "peft"]
QV = tuple(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv")


def pair(r: int = 4, out: int = 32, features: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(r, features), torch.randn(out, r)


def factors(names) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: pair(out=16 if name.endswith("v_proj") else 32) for name in names}


def named(layers, prefix: str = PREFIX, adapter: str = "") -> dict[str, torch.Tensor]:
    """Tensors of linear layers; {name: (A, B)} or names."""
    layers = layers if isinstance(layers, dict) else factors(layers)
    tensors = {}
    for name, (A, B) in layers.items():
        tensors[f"{prefix}{name}.lora_A.{adapter}weight"] = A
        tensors[f"{prefix}{name}.lora_B.{adapter}weight"] = B
    return tensors


def write(folder: Path, tensors=None, metadata=None, **options) -> Path:
    """A folder of PEFT."""
    folder.mkdir(exist_ok=True, parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "some/base"}
    config |= {"target_modules": ["q_proj", "v_proj"], "bias": "none"} | options
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    tensors = named(QV) if tensors is None else tensors
    safetensors.save_file(tensors, folder / ADAPTER_FILE, metadata)
    return folder


def write_base(folder: Path, model=None, **options) -> Path:
    folder.mkdir(exist_ok=True)
    model = model or llama()
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"} | options
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gemma3(folder: Path) -> Path:
    """A model whose text model is inside another one."""
    folder.mkdir(exist_ok=True)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8}
    vision = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {**sizes, **text, "model_type": "gemma3_text"},
        "vision_config": {**sizes, **vision, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def one(adapter: Path, engine: str, base: Path | None = None):
    (result,) = check(adapter, base, [engine])
    return result


def rules(result) -> str:
    return " | ".join(refusal.rule for refusal in result.verdict.refusals)


# Files


def test_plain_folder_is_right_everywhere(tmp_path):
    results = check(write(tmp_path / "a"), write_base(tmp_path / "base"))
    assert [result.engine for result in results] == [
        "vllm",
        "sglang",
        "llama.cpp",
        "ollama",
        "peft",
    ]
    assert {r.engine for r in results if r.outcome == RIGHT} == set(TEXT_ENGINES)
    assert all(result.names_compared for result in results)
    assert all(layer.strength == 1 for result in results for layer in result.layers)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_FILE])
def test_a_file_of_the_folder_is_the_folder(name, tmp_path):
    stored = read_stored(write(tmp_path / "a") / name)
    assert stored.kind == PEFT and stored.path == tmp_path / "a" and list(stored.layers)


def test_native_folder_is_refused_everywhere(tmp_path):
    model = llama()
    add_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path, format="native")
    assert read_stored(tmp_path).kind == NATIVE
    for result in check(tmp_path):
        assert result.outcome == REFUSED and not result.layers
        assert "--to peft" in result.verdict.refusals[0].remedy


@pytest.mark.parametrize(
    "files,match",
    [
        ((), "neither adapter_config.json nor a .safetensors file"),
        (("adapter_model.bin",), "pickled files are not read.*save_pretrained"),
        (("adapter_config.json", "adapter_model.bin"), "pickled files are not read"),
        (("pytorch_lora_weights.bin",), "pickled files are not read"),
        (("adapter_config.json",), "no adapter_model.safetensors, which belongs to"),
        (("a.safetensors", "b.safetensors"), "several .safetensors files .* give one of them"),
        (("adapter_model.safetensors",), "has no adapter_config.json, which has the scaling"),
        (("checkpoint-1/adapter_config.json",), "its subfolders do: checkpoint-1"),
    ],
)
def test_folders_without_an_adapter(files, match, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises((FileNotFoundError, ValueError), match=match):
        check(tmp_path)


@pytest.mark.parametrize(
    "tensors,options,match",
    [
        ({"a.lora_A.weight": torch.ones(2, 3)}, {}, "lora_B of 'a' is missing"),
        ({"a.weight": torch.ones(2, 3)}, {}, "has no lora_A and lora_B"),
        (named({"a": (torch.ones(2, 3), torch.ones(4, 3))}), {}, "do not fit each other"),
        (named({"a": (torch.ones(2), torch.ones(4))}), {}, "are not those of a linear layer"),
        (named(["a"], adapter="x.") | named(["b"], adapter="y."), {}, "adapters x, y: keep one"),
        (named(["a"], adapter="x.") | named(["a"]), {}, "are there more than once"),
        (None, {"peft_type": "LOHA"}, "only 'LORA' adapters are checked"),
        (None, {"lora_alpha": "8"}, "lora_alpha = '8' is not a number"),
        (None, {"r": 0}, "r = 0 .* is not a positive whole number"),
        (None, {"rank_pattern": {"(": 2}}, "not a regular expression"),
        (None, {"alpha_pattern": [1]}, "not an object of patterns"),
    ],
)
def test_damaged_adapters(tensors, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        check(write(tmp_path / "a", tensors, **options))


def test_truncated_file(tmp_path):
    file = write(tmp_path / "a") / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        check(tmp_path / "a")


def test_unknown_engine_and_base(tmp_path):
    adapter = write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"unknown engine 'vlm'.*did you mean 'vllm'"):
        check(adapter, engines=["vlm"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        check(adapter, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        check(adapter, tmp_path / "nothing")


def test_only_headers_are_read(tmp_path, monkeypatch):
    from lora_kernels._utils import model_files

    adapter = write(tmp_path / "a")
    monkeypatch.setattr(model_files, "load_tensor", lambda *_: pytest.fail("a tensor was loaded"))
    assert len(read_stored(adapter).layers) == len(QV)


# Refusals

ALL = (*TEXT_ENGINES, "ollama")
REGEX = "(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj))"  # as Unsloth writes it
EXTRA = torch.ones(32)


@pytest.mark.parametrize(
    "engine,options,extra,match",
    [
        ("vllm", {"modules_to_save": ["embed_tokens"]}, (), "modules_to_save"),
        ("vllm", {"bias": "all"}, ("self_attn.q_proj.bias",), "bias must be 'none'"),
        ("vllm", {"use_dora": True}, ("self_attn.q_proj.lora_magnitude_vector",), "DoRA"),
        ("vllm", {"lora_bias": True}, ("self_attn.q_proj.lora_B.bias",), "bias of lora_B"),
        ("vllm", {"trainable_token_indices": [1]}, ("token_adapter.trainable_tokens_delta",),
         "must be lora_A or lora_B"),
        ("vllm", {"layer_replication": [[0, 2], [1, 2]]}, (), "layer_replication"),
        ("vllm", {"alora_invocation_tokens": [1]}, (), "activated LoRA"),
        ("vllm", {"use_qalora": True}, (), "QA-LoRA"),
        ("vllm", {"init_lora_weights": "pissa_niter_4"}, (), "PEFT changes the base"),
        ("vllm", {"lora_alpha": "absent"}, (), "must have lora_alpha"),
        ("vllm", {"target_modules": "absent"}, (), "must have target_modules"),
        ("sglang", {"use_dora": True}, (), "DoRA"),
        ("sglang", {"target_modules": REGEX}, (), "regular expression is not understood"),
        ("sglang", {"target_modules": None}, (), "must be a list"),
        ("sglang", {"rank_pattern": {"q_proj": 2}}, (), "rank_pattern is refused"),
        ("sglang", {"alpha_pattern": {"q_proj": 2.5}}, (), "alpha_pattern is refused"),
        ("sglang", {"target_modules": ["o_proj"]}, (), "must name the modules of all layers"),
        ("sglang", {"r": 8}, (), "must have the configuration's rank, r = 8"),
        ("sglang", {"lora_bias": True}, ("self_attn.q_proj.lora_B.bias",), "is taken for lora_B"),
        ("sglang", {"layer_replication": [[0, 2], [1, 2]]}, (), "layer_replication"),
        ("llama.cpp", {"lora_bias": True}, ("self_attn.q_proj.lora_B.bias",), "must be lora_A"),
        ("llama.cpp", {"modules_to_save": ["score"]}, ("score.weight",), "must be lora_A"),
        ("llama.cpp", {"use_dora": True}, ("self_attn.q_proj.lora_magnitude_vector",), "must be"),
        ("llama.cpp", {"fan_in_fan_out": True}, (), "stored transposed"),
        ("llama.cpp", {"lora_alpha": "absent"}, (), "must have lora_alpha"),
        ("ollama", {"lora_alpha": 8.5}, (), "whole number, it is 8.5"),
        ("ollama", {"lora_alpha": 8.0}, (), "whole number, it is 8.0"),
        ("ollama", {}, ("self_attn.q_proj.bias",), "fail when the model is loaded"),
        ("peft", {"r": 8}, (), "must have the ranks of the configuration"),
        ("peft", {"init_lora_weights": "corda"}, (), "needs the data"),
    ],
)  # fmt: skip
def test_refusals(engine, options, extra, match, tmp_path):
    tensors = named(QV) | {f"{PREFIX}model.layers.0.{name}": EXTRA for name in extra}
    result = one(write(tmp_path / "a", tensors, **options), engine)
    assert result.outcome == REFUSED and match in rules(result)
    assert all(refusal.remedy for refusal in result.verdict.refusals)


@pytest.mark.parametrize(
    "engine,tensors,match",
    [
        ("vllm", named(QV, adapter="default."), "must end in lora_A.weight"),
        ("llama.cpp", named(QV, adapter="default."), "must contain .lora_A.weight"),
        ("ollama", named(QV, adapter="default."), "must end in lora_A.weight"),
        ("vllm", named(QV) | {"base_model.model.model.embed_tokens.weight": EXTRA}, "every tensor"),
        ("sglang", named([QV[0]]), "q_proj and v_proj must both be adapted"),
        ("sglang", named(["model.layers.0.self_attn.k_proj"]), "q_proj and v_proj must both"),
        ("sglang", named(["model.layers.0.mlp.up_proj"]), "up_proj without gate_proj"),
        ("ollama", named(["lm_head"]), "fail when the model is loaded"),
        ("ollama", named(["model.layers.0.mlp.experts.0.up_proj"]), "fail when"),
        ("ollama", named({QV[0]: pair(40)}), "must not be above a layer's sizes"),
        ("ollama", {k: v.double() for k, v in named(QV).items()}, "must be float32"),
    ],
)
def test_names_and_shapes_that_are_refused(engine, tensors, match, tmp_path):
    r = next(t.shape[0] for k, t in tensors.items() if "lora_A" in k)
    result = one(write(tmp_path / "a", tensors, r=r), engine)
    assert result.outcome == REFUSED and match in rules(result)


@pytest.mark.parametrize(
    "rank,flag", [(1, None), (16, None), (17, 32), (24, 32), (300, 320), (512, 512), (513, None)]
)
def test_ranks_of_vllm(rank, flag, tmp_path):
    tensors = named({name: pair(rank, 16, 16) for name in QV})
    result = one(write(tmp_path / "a", tensors, r=rank, lora_alpha=rank), "vllm")
    assert result.verdict.rank == rank and result.verdict.limit == 512
    assert result.verdict.flags == ([] if flag is None else [f"--max-lora-rank {flag}"])
    assert ("--compress-to" in str(result.verdict.refusals)) == (rank > 512)


def test_the_largest_pattern_counts_for_vllm(tmp_path):
    result = one(write(tmp_path / "a", rank_pattern={"nothing": 64}), "vllm")
    assert result.verdict.flags == ["--max-lora-rank 64"] and result.outcome == RIGHT


# What loads, and is wrong


def test_rslora_is_ignored(tmp_path):
    adapter = write(tmp_path / "a", use_rslora=True)
    found = {result.engine: result for result in check(adapter, engines=list(ALL))}
    assert found["vllm"].outcome == found["peft"].outcome == RIGHT
    for engine in ("sglang", "llama.cpp", "ollama"):
        assert found[engine].outcome == WRONG
        assert all(math.isclose(layer.strength, 0.5) for layer in found[engine].layers)
    assert all(math.isclose(layer.error, 0.5, rel_tol=1e-2) for layer in found["sglang"].layers)


def test_a_start_is_wrong_on_the_original_base(tmp_path):
    recipe = json.dumps({"format": "start", "base_model": "out/residual"})
    adapter = write(tmp_path / "a", metadata={"lora_kernels": recipe})
    for result in check(adapter):
        assert result.outcome == WRONG and result.layers
        for layer in result.layers:
            assert "out/residual" in layer.reason and "--start" in layer.remedy
            assert layer.error is None


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_starts_of_a_changed_base(start, tmp_path):
    adapter = write(tmp_path / "a", init_lora_weights=start)
    for result in check(adapter, engines=["sglang", "llama.cpp", "ollama"]):
        helps = "LoftQ made" if start == "loftq" else "--start"
        assert all(helps in layer.remedy for layer in result.layers)
        assert result.outcome != RIGHT
    assert one(adapter, "vllm").outcome == (WRONG if start == "lora_ga" else REFUSED)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_harmless_starts(start, tmp_path):
    results = check(write(tmp_path / "a", init_lora_weights=start))
    assert all(result.outcome == RIGHT for result in results)


def test_variants_that_are_ignored(tmp_path):
    adapter = write(tmp_path / "a", alora_invocation_tokens=[5])
    assert one(adapter, "sglang").outcome == one(adapter, "ollama").outcome == WRONG
    assert one(adapter, "llama.cpp").outcome == RIGHT  # it knows them


def test_saved_modules_are_dropped(tmp_path):
    tensors = named(QV) | {f"{PREFIX}score.weight": torch.ones(2, 32)}
    adapter = write(tmp_path / "a", tensors, modules_to_save=["score"])
    result = one(adapter, "sglang")
    assert result.outcome == WRONG and list(result.verdict.dropped) == [f"{PREFIX}score.weight"]
    assert "lora-kernels merge" in result.remedies[0]
    result = one(adapter, "vllm")  # a classifier's head, which some releases take
    assert result.outcome == REFUSED and "0.33.0 takes classifier and score" in rules(result)
    norm = named(QV) | {f"{PREFIX}model.layers.0.input_layernorm.weight": EXTRA}
    result = one(write(tmp_path / "b", norm), "llama.cpp")
    assert result.outcome == WRONG and len(result.verdict.dropped) == 1


def test_copies_of_the_base_are_no_loss(tmp_path):
    """PEFT writes an embedding's weight beside its factors."""
    name = f"{PREFIX}model.embed_tokens"
    tensors = named(QV) | {
        f"{name}.lora_embedding_A": torch.randn(4, 96),
        f"{name}.lora_embedding_B": torch.randn(32, 4),
        f"{name}.base_layer.weight": torch.randn(96, 32),
    }
    adapter = write(tmp_path / "a", tensors, target_modules=["q_proj", "v_proj", "embed_tokens"])
    results = check(adapter, write_base(tmp_path / "base"), TEXT_ENGINES)
    assert [result.outcome for result in results] == [RIGHT] * 4
    named_not = write(tmp_path / "b", tensors)
    result = one(named_not, "sglang")
    assert [la.name for la in result.layers if not la.effect] == ["model.embed_tokens"]


def test_cancelling_factors(tmp_path):
    """The old doubled form, whose update cancels in 16 bits."""
    layers = {}
    for name in QV:
        A, B = pair()
        A1, B1 = A + 1e-3 * torch.randn_like(A), B + 1e-3 * torch.randn_like(B)
        layers[name] = (torch.cat([A1, A]), torch.cat([B1, -B], 1))
    adapter = write(tmp_path / "a", named(layers), r=8, lora_alpha=16)
    found = {result.engine: result for result in check(adapter)}
    assert found["vllm"].outcome == found["sglang"].outcome == WRONG
    assert all(layer.error > 0.05 and not layer.reason for layer in found["vllm"].layers)
    assert found["llama.cpp"].outcome == found["peft"].outcome == RIGHT  # in float32


def test_untrained_and_infinite(tmp_path):
    zero = {name: (A, 0 * B) for name, (A, B) in factors(QV).items()}
    assert all(result.outcome == RIGHT for result in check(write(tmp_path / "a", named(zero))))
    huge = {name: (1e30 * A, B) for name, (A, B) in factors(QV).items()}
    adapter = write(tmp_path / "b", named(huge))
    (result,) = check(adapter, write_base(tmp_path / "base", dtype="float16"), ["vllm"])
    assert result.outcome == WRONG and result.worst_error == math.inf


# With a base


def test_dtype_of_the_base(tmp_path):
    adapter = write(tmp_path / "a")
    errors = {}
    for dtype in ("bfloat16", "float16", "float32"):
        base = write_base(tmp_path / dtype, dtype=dtype)
        for engine in TEXT_ENGINES:
            layer = one(adapter, engine, base).layers[0]
            errors[engine, dtype] = (str(layer.dtype).removeprefix("torch."), layer.error)
    assert [errors["vllm", d][0] for d in ("bfloat16", "float16", "float32")] == [
        "bfloat16", "float16", "bfloat16"]  # fmt: skip
    assert [errors["sglang", d][0] for d in ("bfloat16", "float16", "float32")] == [
        "bfloat16", "float16", "float16"]  # fmt: skip
    assert {errors[e, "bfloat16"][0] for e in ("llama.cpp", "peft")} == {"float32"}
    assert errors["vllm", "float16"][1] < 1e-3 < errors["vllm", "bfloat16"][1] < 5e-3


def test_names_that_match_nothing(tmp_path):
    """A wrong beginning is silent in vLLM; llama.cpp's script fails; SGLang goes by the number."""
    tensors = named([name.replace("model.", "decoder.", 1) for name in QV])
    adapter, base = write(tmp_path / "a", tensors), write_base(tmp_path / "base")
    found = {result.engine: result for result in check(adapter, base, TEXT_ENGINES)}
    assert {engine: result.outcome for engine, result in found.items()} == {
        "vllm": WRONG, "sglang": RIGHT, "llama.cpp": REFUSED, "peft": WRONG}  # fmt: skip
    for layer in found["vllm"].layers:
        assert not layer.effect and layer.strength == 0 and layer.error == 1
        assert layer.matching_name == layer.name.replace("decoder.", "model.", 1)
    without = one(adapter, "vllm")
    assert without.outcome == RIGHT and not without.names_compared
    assert any("names were not compared" in note for note in without.verdict.notes)


def test_last_parts_that_match_nothing(tmp_path):
    adapter = write(tmp_path / "a", named(["model.layers.0.mlp.gate_up"]))
    result = one(adapter, "vllm", write_base(tmp_path / "base"))
    assert "no linear layer of the base is called gate_up" in rules(result)


def test_other_base(tmp_path):
    adapter = write(tmp_path / "a", named([n.replace("layers.1", "layers.7") for n in QV]))
    base = write_base(tmp_path / "base")
    found = {result.engine: result for result in check(adapter, base, TEXT_ENGINES)}
    assert "the base has 2 blocks" in rules(found["sglang"])
    assert sum(not layer.effect for layer in found["vllm"].layers) == 2
    wider = write_base(tmp_path / "wider", llama(hidden_size=64))
    for result in check(adapter, wider, list(ALL)):
        assert "[32, 32] instead of [64, 64]" in rules(result)


def test_tied_head(tmp_path):
    tensors = named({**{n: pair(out=16 if "v_" in n else 32) for n in QV}, "lm_head": pair(4, 96)})
    adapter = write(tmp_path / "a", tensors, target_modules=["q_proj", "v_proj", "lm_head"])
    tied = write_base(tmp_path / "tied", llama(tied=True), tie_word_embeddings=True)
    assert "tied to the embedding" in rules(one(adapter, "llama.cpp", tied))
    for engine in ("vllm", "sglang", "peft"):
        assert one(adapter, engine, tied).outcome == RIGHT
    assert one(adapter, "llama.cpp", write_base(tmp_path / "untied")).outcome == RIGHT


def test_gpt2_blocks_have_no_number_for_sglang(tmp_path):
    tensors = named({"transformer.h.0.attn.c_attn": pair(4, 96)})
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = write(tmp_path / "a", tensors, **options)
    base = write_base(tmp_path / "base", gpt2())
    found = {result.engine: result for result in check(adapter, base, TEXT_ENGINES)}
    assert not found["sglang"].layers[0].effect and found["llama.cpp"].outcome == REFUSED
    assert found["peft"].outcome == RIGHT and found["vllm"].outcome == RIGHT


@needs_transformers
@pytest.mark.parametrize(
    "start,outcomes",
    [
        # the text model alone; as vLLM and older versions of transformers call it; as it is
        ("model.", (WRONG, RIGHT, RIGHT, WRONG)),
        ("language_model.model.", (RIGHT, RIGHT, RIGHT, RIGHT)),
        ("model.language_model.", (RIGHT, RIGHT, RIGHT, RIGHT)),
        ("text.", (WRONG, RIGHT, REFUSED, WRONG)),
    ],
)
def test_text_adapters_on_multimodal_models(start, outcomes, tmp_path):
    tensors = named([name.replace("model.", start, 1) for name in QV])
    base = gemma3(tmp_path / "base")
    results = check(write(tmp_path / "a", tensors), base, TEXT_ENGINES)
    assert tuple(result.outcome for result in results) == outcomes
    notes = str(results[0].verdict.notes)
    assert ("earlier releases silently leave these layers out" in notes) == (start == "model.")
    if start == "model.":
        names = {layer.matching_name for layer in results[0].layers}
        assert names == {name.replace("model.", "model.language_model.", 1) for name in QV}


@needs_transformers
def test_vision_towers(tmp_path):
    names = [f"model.vision_tower.encoder.layers.0.self_attn.{p}_proj" for p in "qv"]
    adapter = write(tmp_path / "a", named({name: pair() for name in names}))
    base = gemma3(tmp_path / "base")
    found = {result.engine: result for result in check(adapter, base, TEXT_ENGINES)}
    assert "--enable-tower-connector-lora" in found["vllm"].layers[0].reason
    assert "applied to the text model" in found["sglang"].layers[0].reason
    assert "text model only" in found["llama.cpp"].layers[0].reason
    assert [found[e].outcome for e in TEXT_ENGINES] == [WRONG, WRONG, WRONG, RIGHT]


def test_ollama_takes_llama_and_gemma2(tmp_path):
    names = [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")]
    layers = {name: pair(4, 48) for name in names}
    adapter = write(tmp_path / "a", named(layers), target_modules=["gate_proj", "up_proj"])
    base = write_base(tmp_path / "base")
    assert one(adapter, "ollama", base).outcome == RIGHT
    other = write_base(tmp_path / "other", architectures=["Qwen2ForCausalLM"])
    assert "adapters of Qwen2ForCausalLM are not converted" in rules(one(adapter, "ollama", other))
    assert "ollama" not in [result.engine for result in check(adapter, other)]


def test_added_tokens(tmp_path):
    adapter, base = write(tmp_path / "a"), write_base(tmp_path / "base")
    (adapter / "added_tokens.json").write_text(json.dumps({"<new>": 96}))
    assert "adds tokens" in rules(one(adapter, "sglang", base))
    assert one(adapter, "sglang").outcome == RIGHT  # perhaps: a note says so
    assert "added_tokens" in str(one(adapter, "sglang").verdict.notes)
    (adapter / "added_tokens.json").write_text(json.dumps({"<old>": 95}))
    assert one(adapter, "sglang", base).outcome == RIGHT


def test_other_files_of_the_folder(tmp_path):
    adapter = write(tmp_path / "a")
    (adapter / "optimizer.safetensors").write_bytes(b"")
    for engine, noted in {"sglang": True, "ollama": True, "vllm": False}.items():
        assert ("optimizer.safetensors" in str(one(adapter, engine).verdict.notes)) == noted


def test_bases_that_are_not_known(tmp_path):
    adapter = write(tmp_path / "a")
    base = write_base(tmp_path / "base", architectures=["Mystery"], model_type="mystery")
    result = one(adapter, "vllm", base)
    assert not result.names_compared and "mystery" in str(result.verdict.notes)
    unnamed = write_base(tmp_path / "unnamed", architectures=None)
    result = one(adapter, "vllm", unnamed / "config.json")
    assert result.outcome == RIGHT and "LlamaForCausalLM is assumed" in str(result.verdict.notes)


def test_experts_of_older_names(tmp_path):
    """transformers 5 keeps all experts of Mixtral in one parameter, under another name."""
    base = write_base(tmp_path / "base", mixtral(), architectures=["MixtralForCausalLM"])
    start = "model.layers.0.block_sparse_moe.experts"
    layers = {f"{start}.{i}.{w}": pair(4, 48 if w != "w2" else 32, 32 if w != "w2" else 48)
              for i in range(4) for w in ("w1", "w2", "w3")}  # fmt: skip
    adapter = write(tmp_path / "a", named(layers), target_modules=["w1", "w2", "w3"])
    found = {result.engine: result for result in check(adapter, base, TEXT_ENGINES)}
    assert found["vllm"].outcome == found["llama.cpp"].outcome == RIGHT
    assert "w1, w2 and w3 as gate_proj" in rules(found["sglang"])
    targets = ["gate_proj", "up_proj", "down_proj"]
    adapter = write(tmp_path / "c", named(layers), target_modules=targets)
    assert one(adapter, "sglang", base).outcome == RIGHT
    elsewhere = named({n.replace("block_sparse_moe", "moe"): f for n, f in layers.items()})
    found = check(write(tmp_path / "b", elsewhere, target_modules=["w1"]), base, ["vllm"])
    assert not any(layer.effect for layer in found[0].layers)


def test_headless_names(tmp_path):
    """An adapter of the model without its head lacks the first part of the names."""
    tensors = named([name.removeprefix("model.") for name in QV])
    base = write_base(tmp_path / "base")
    found = {r.engine: r for r in check(write(tmp_path / "a", tensors), base, TEXT_ENGINES)}
    assert [layer.matching_name for layer in found["vllm"].layers] == sorted(QV)
    assert found["vllm"].outcome == found["peft"].outcome == WRONG


@needs_transformers
def test_one_build_for_all_older_names(tmp_path, monkeypatch):
    """Building a large model takes seconds."""
    from lora_kernels.files.serving.engines import model

    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return read_architecture(*arguments)

    read_architecture = model.read_architecture
    monkeypatch.setattr(model, "read_architecture", counted)
    names = [f"vision_tower.vision_model.encoder.layers.0.self_attn.{p}_proj" for p in "qkv"]
    tensors = named({name: pair() for name in (*names, "nothing.here")})
    (result,) = check(write(tmp_path / "a", tensors), gemma3(tmp_path / "base"), ["vllm"])
    assert len(calls) == 2
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert "tower" in reasons[names[0]] and "no module" in reasons["nothing.here"]


# This package's own folders


def test_remedies(tmp_path):
    """What they say is done makes the adapter right."""
    base = write_base(tmp_path / "base")
    troubles = {
        "rslora": {"use_rslora": True},
        "patterns": {"alpha_pattern": {"q_proj": 3.5}, "use_rslora": True},
        "alpha": {"lora_alpha": 2.5},
        "regex": {"target_modules": r".*\.[qv]_proj"},
    }
    for name, options in troubles.items():
        convert(write(tmp_path / name, **options), tmp_path / f"{name}-out")
        results = check(tmp_path / f"{name}-out", base, TEXT_ENGINES)
        assert [result.outcome for result in results] == [RIGHT] * 4
        assert "whole number" not in rules(one(tmp_path / f"{name}-out", "ollama"))
    bare = write(tmp_path / "bare", named(QV, prefix=""))
    assert one(bare, "peft").outcome == WRONG
    convert(bare, tmp_path / "bare-out")
    assert one(tmp_path / "bare-out", "peft").outcome == RIGHT
    tensors = {name: pair(4, 600, 600) for name in QV}
    wide = {n: (torch.cat([A] * 130), torch.cat([B] * 130, 1)) for n, (A, B) in tensors.items()}
    adapter = write(tmp_path / "wide", named(wide), r=520)
    assert "--compress-to" in one(adapter, "vllm").verdict.refusals[0].remedy
    convert(adapter, tmp_path / "narrow", compress_to=8)
    assert one(tmp_path / "narrow", "vllm").outcome == RIGHT


@needs_transformers
def test_renaming_as_the_result_says(tmp_path):
    tensors = named([name.replace("model.", "text.", 1) for name in QV])
    adapter, base = write(tmp_path / "a", tensors), gemma3(tmp_path / "base")
    (layer, *_) = one(adapter, "vllm", base).layers
    # The tower has a layer of that number and name, too: that of the text model is meant.
    assert layer.matching_name == "model.language_model.layers.0.self_attn.q_proj"
    ends = named(["self_attn.q_proj", "self_attn.v_proj"])
    assert one(write(tmp_path / "b", ends), "vllm", base).layers[0].matching_name is None
    plain = write_base(tmp_path / "plain")
    (layer, *_) = one(adapter, "vllm", plain).layers
    assert layer.matching_name == "model.layers.0.self_attn.q_proj"
    convert(adapter, tmp_path / "renamed", rename=("text.", "model."))
    assert one(tmp_path / "renamed", "vllm", plain).outcome == RIGHT
    convert(adapter, tmp_path / "served", rename=("text.", "language_model.model."))
    results = check(tmp_path / "served", base, TEXT_ENGINES)
    assert [result.outcome for result in results] == [RIGHT] * 3 + [REFUSED]
    # PEFT compares target_modules, which are whole names now, with those of the base.
    old, new = "language_model.model.", "model.language_model."
    assert results[3].remedies == [f"lora-kernels convert ADAPTER OUT --rename {old} {new}"]
    convert(tmp_path / "served", tmp_path / "again", rename=(old, new))
    results = check(tmp_path / "again", base, TEXT_ENGINES)
    assert [result.outcome for result in results] == [RIGHT] * 4


def test_the_start_of_init_and_what_is_trained_from_it(tmp_path):
    """Wrong on the original base, right on the one from which the start was subtracted."""
    from lora_kernels.files.checkpoint.initialize import initialize

    original, residual = tmp_path / "original", tmp_path / "residual"
    llama(initializer_range=0.1).save_pretrained(original)
    targets = ["q_proj", "v_proj"]
    initialize(
        original, residual, LoRAConfig(r=4, target_modules=targets, init_lora_weights="pissa")
    )
    start = residual / "adapter"
    trained = tmp_path / "trained"
    trained.mkdir()
    tensors = safetensors.load_file(start / ADAPTER_FILE)
    safetensors.save_file({k: 1.01 * v for k, v in tensors.items()}, trained / ADAPTER_FILE)
    (trained / ADAPTER_CONFIG).write_bytes((start / ADAPTER_CONFIG).read_bytes())
    for folder in (start, trained):
        for result in check(folder, original, TEXT_ENGINES):
            assert result.outcome == WRONG
            assert all(f"--start {start}" in layer.remedy for layer in result.layers)
        assert one(folder, "peft", residual).outcome == RIGHT


@pytest.mark.parametrize(
    "start", ["lora", "gaussian", "loram", "pissa", "olora", "milora", "init_ab", "lora_xs"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 3, "lora_alpha": 5.5, "use_rslora": True},
        {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 7.3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_saved_adapters_are_right_in_all_engines(start, options, tmp_path):
    torch.manual_seed(0)
    ends = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoRAConfig(init_lora_weights=start, target_modules=ends, **options)
    model = llama(initializer_range=0.1)
    add_lora(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                spread = parameter.square().mean().sqrt() + 0.01
                parameter.add_(0.01 * spread * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "a")
    results = check(tmp_path / "a", write_base(tmp_path / "base"), TEXT_ENGINES)
    assert {result.engine: result.outcome for result in results} == dict.fromkeys(
        TEXT_ENGINES, RIGHT
    ), [(result.engine, rules(result), result.worst_error) for result in results]
    assert all(layer.strength == 1 for result in results for layer in result.layers)


# diffusers


UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write_diffusers(file: Path, tensors, metadata=None) -> Path:
    safetensors.save_file(tensors, file, metadata)
    return file


def test_diffusers_files(tmp_path):
    A, B = pair()
    styles = {
        "peft": {f"unet.{UNET}.lora_A.weight": A, f"unet.{UNET}.lora_B.weight": B},
        "old": {f"unet.{UNET}.lora.down.weight": A, f"unet.{UNET}.lora.up.weight": B},
        "oldest": {f"unet.{UNET}_lora.down.weight": A, f"unet.{UNET}_lora.up.weight": B},
    }
    for style, tensors in styles.items():
        file = write_diffusers(tmp_path / f"{style}.safetensors", tensors)
        stored = read_stored(file)
        assert stored.kind == DIFFUSERS and list(stored.layers) == [f"unet.{UNET}"]
        (result,) = check(file)
        assert result.engine == "diffusers" and result.outcome == RIGHT
        assert result.layers[0].trained_scale == result.layers[0].scale == 1
        for other in check(file, engines=["vllm", "peft"]):
            assert other.outcome == REFUSED and "needs a folder of PEFT" in rules(other)


def test_folder_of_diffusers(tmp_path):
    tensors = named([f"transformer.{UNET}"], prefix="")
    write_diffusers(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    write_diffusers(tmp_path / "other.safetensors", tensors)
    (result,) = check(tmp_path)
    assert result.engine == "diffusers" and result.outcome == RIGHT


def test_metadata_of_diffusers(tmp_path):
    """PEFT's options in the header, of each component."""
    tensors = named({f"unet.{UNET}": pair(4), f"unet.{UNET[:-1]}k": pair(2),
                     "text_encoder.layers.0.q_proj": pair(8)}, prefix="")  # fmt: skip
    options = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True,
               "unet.rank_pattern": {"to_k": 2}, "unet.alpha_pattern": {},
               "text_encoder.r": 8, "text_encoder.lora_alpha": 2}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps(options)}
    file = write_diffusers(tmp_path / "a.safetensors", tensors, metadata)
    (result,) = check(file)
    assert result.outcome == RIGHT
    assert {layer.name.rpartition(".")[2]: layer.scale for layer in result.layers} == {
        "to_q": 6 / 2, "to_k": 6 / math.sqrt(2), "q_proj": 0.25}  # fmt: skip


def kohya(name: str, alpha: float | None, r: int = 4) -> dict[str, torch.Tensor]:
    A, B = pair(r)
    found = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    return found if alpha is None else {**found, f"{name}.alpha": torch.tensor(alpha)}


def test_kohya(tmp_path):
    first, second = "lora_unet_down_blocks_0_attn1_to_q", "lora_te1_text_model_layers_0_mlp_fc1"
    tensors = kohya(first, 2.0) | kohya(second, 8.0, 8)
    (result,) = check(write_diffusers(tmp_path / "a.safetensors", tensors))
    assert result.outcome == RIGHT
    assert {layer.name: layer.scale for layer in result.layers} == {first: 0.5, second: 1.0}
    # A layer without alpha gets that of the others: its own was the rank.
    mixed = kohya(first, 1.0) | kohya(first.replace("to_q", "to_k"), None)
    (result,) = check(write_diffusers(tmp_path / "b.safetensors", mixed))
    assert [layer.strength for layer in result.layers] == [0.25, 1]
    assert result.outcome == WRONG
    strange = tensors | {f"{first}.lora_mid.weight": torch.ones(2, 2)}
    (result,) = check(write_diffusers(tmp_path / "c.safetensors", strange))
    assert "must be lora_down, lora_up or alpha" in rules(result)


def test_names_that_pipelines_do_not_know(tmp_path):
    file = write_diffusers(tmp_path / "a.safetensors", named([UNET], prefix=""))
    (result,) = check(file)
    assert result.outcome == WRONG and not result.layers[0].effect
    folder = write(tmp_path / "b", named({UNET: pair()}), target_modules=["to_q"])
    results = check(folder)
    assert [result.engine for result in results] == ["diffusers", "peft"]
    assert results[0].layers[0].matching_name == f"unet.{UNET}"
    assert results[0].outcome == WRONG and results[1].outcome == RIGHT
    foreign = named([f"unet.{UNET}"], prefix="") | {"unet.conv.weight": torch.ones(2)}
    (result,) = check(write_diffusers(tmp_path / "c.safetensors", foreign))
    assert "Invalid LoRA checkpoint" in rules(result)


# The error


def test_relative_error_of_updates_that_cancel():
    """Exact although the factors are 1e6 times the update."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = normal(4, 50), normal(40, 4)
    step = 1e-6 * normal(4, 50)
    want = Update(torch.cat([A + step, A]), torch.cat([B, -B], 1), 2.0)
    got = Update(torch.cat([A + 1.1 * step, A]), torch.cat([B, -B], 1), 2.0)
    assert math.isclose(relative_error(got, want), 0.1, rel_tol=1e-6)
    assert relative_error(want, want) == 0
    same = Update(step, 2 * B, 1.0)
    assert relative_error(same, want) < 1e-8
    assert relative_error(Update(A, 0 * B, 1.0), Update(A, 0 * B, 3.0)) == 0
    assert relative_error(Update(A, B, 1.0), Update(A, 0 * B, 1.0)) == math.inf
    assert relative_error(Update(A * math.inf, B, 1.0), want) == math.inf


def test_relative_error_of_experts():
    A, B = torch.randn(3, 2, 8), torch.randn(3, 6, 2)
    assert math.isclose(relative_error(Update(A, B, 1.5), Update(A, B, 1.0)), 0.5, rel_tol=1e-6)
