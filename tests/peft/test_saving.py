"""Adapters of `initialize` in PEFT's folders: plain PEFT loads them, and training continues."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from torch import nn

from ..support.packages import needs_peft
from ..support.peft_models import MODELS, adapted, float64, initialize, linear_layers, update_of
from ..support.running import close, logits, move, same_bits, weights_of
from ..support.tiny_models import gpt2, llama, mixtral

pytestmark = needs_peft


def plain(base: nn.Module, folder, **options) -> nn.Module:
    """The folder's adapter, loaded by PEFT alone onto a copy of the untouched base."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder), **options)
    assert "save_pretrained" not in vars(model)
    return model.eval()


@pytest.mark.parametrize("method", ["loram", "pissa"])
@pytest.mark.parametrize("kind", MODELS)
def test_plain_peft_loads_it_on_the_original_base(tmp_path, kind, method):
    base = MODELS[kind]()
    model = adapted(base)
    initialize(model, method)
    move(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = plain(base, tmp_path)
    assert close(logits(loaded), logits(model))
    for name, layer in linear_layers(loaded).items():
        want = torch.tensor(update_of(linear_layers(model)[name]))
        assert layer.r["default"] == 8 and layer.scaling["default"] == 1.0
        assert close(torch.tensor(update_of(layer)), want)
    assert close(logits(loaded.merge_and_unload()), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_modules(tmp_path, rslora):
    """All layers get one rank and s = 1; `modules_to_save` and biases are saved too."""
    base = llama()
    model = adapted(
        base,
        target_modules=["embed_tokens", "q_proj", "k_proj", "up_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"k_proj": 3},
        alpha_pattern={"up_proj": 5},
        use_rslora=rslora,
    )
    report = initialize(model, "loram")
    assert "model.embed_tokens" in report.layers and not report.left
    move(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = plain(base, tmp_path)
    ranks = {n.rpartition(".")[2]: m.r["default"] for n, m in linear_layers(loaded).items()}
    assert ranks == {"embed_tokens": 8, "q_proj": 8, "k_proj": 8, "up_proj": 8}
    config = loaded.peft_config["default"]
    assert not config.use_rslora and not config.rank_pattern and not config.alpha_pattern
    assert {layer.scaling["default"] for layer in linear_layers(loaded).values()} == {1.0}
    assert close(logits(loaded), logits(model))

    other = adapted(base, target_modules=["q_proj"])
    initialize(other, "loram")
    other.load_adapter(tmp_path, "again", is_trainable=True)
    other.set_adapter("again")
    assert other.peft_config["again"].rank_pattern == {"k_proj": 3}
    assert torch.equal(logits(other), logits(model))


def gpt_oss() -> nn.Module:
    """Two blocks with four experts, whose parameters have biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96}
    config = GptOssConfig(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return GptOssForCausalLM(config).eval()


EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]  # of one module


@pytest.mark.parametrize(
    "make, options",
    [
        (mixtral, {"target_parameters": EXPERTS}),
        (mixtral, {"target_parameters": ["gate.weight"], "rank_pattern": {r".*gate\.weight": 2}}),
        # PEFT targets parameters instead, with patterns of its own.
        (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        (gpt_oss, {"target_parameters": ["mlp.router.weight", "mlp.experts.down_proj"]}),
        (
            gpt_oss,
            {
                "target_parameters": EXPERTS,
                "rank_pattern": {"gate_up_proj": 2, "q_proj": 3},
                "alpha_pattern": {"experts.down_proj": 5, r".*\.v_proj": 7},
                "use_rslora": True,
            },
        ),
    ],
)
def test_beside_targeted_parameters(tmp_path, make, options):
    """Those of experts have a start, others none; their rank and s become those of all layers."""
    base = make()
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    model = adapted(base, **options)
    report = initialize(model, "loram")
    matrices = [n for n in options.get("target_parameters", ()) if n.endswith(".weight")]
    assert bool(report.left) == bool(matrices)
    move(model)
    model.save_pretrained(tmp_path)
    loaded = plain(base, tmp_path)
    assert close(logits(loaded), logits(model))
    rank = 2 * max(linear_layers(model)[name].r["default"] for name in report.layers)
    for layer in linear_layers(loaded).values():
        assert layer.r["default"] == rank and layer.scaling["default"] == 1.0
    for name in ("default", "again"):
        other = adapted(base, **options)
        initialize(other, "pissa")
        result = other.load_adapter(tmp_path, name, is_trainable=True)
        assert not result.missing_keys and not result.unexpected_keys
        other.set_adapter(name)
        assert torch.equal(logits(other.eval()), logits(model))


def test_patterns_keep_their_order(tmp_path):
    """PEFT sorts them; the first that matches is used."""
    base = llama()
    options = {
        "target_modules": ["embed_tokens", "q_proj", "k_proj"],
        "rank_pattern": {".*embed_tokens": 2, "1.self_attn.k_proj": 3, "(.*)k_proj": 5},
    }
    model = adapted(base, **options)
    initialize(model, "loram")
    move(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert close(logits(plain(base, tmp_path)), logits(model))


@pytest.mark.parametrize("given", [False, True])
def test_factors_that_are_not_gathered(tmp_path, given):
    """DeepSpeed ZeRO-3 leaves empty tensors: PEFT warns, and the file cannot be read."""
    from peft.utils.warning import PeftWarning

    model = adapted(llama(), target_modules=["q_proj", "up_proj"])
    initialize(model, "loram")
    move(model)
    want, gathered = logits(model), weights_of(model)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    for factor in (layer.lora_A, layer.lora_B):
        factor["default"].weight.data = torch.empty(0)
    options = {"state_dict": model.state_dict()} if given else {}
    with pytest.warns(PeftWarning, match="invalid shape"):
        model.save_pretrained(tmp_path / "shards", **options)
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain(llama(), tmp_path / "shards")
    again = adapted(llama(), target_modules=["q_proj", "up_proj"])
    initialize(again)
    with pytest.raises(ValueError, match="not those of a linear layer"):
        again.load_adapter(tmp_path / "shards", "default")
    # With the state_dict that DeepSpeed gathered, the folder is complete.
    model.save_pretrained(tmp_path / "whole", state_dict=gathered)
    other = adapted(llama(), target_modules=["q_proj", "up_proj"])
    initialize(other, "pissa")
    other.load_adapter(tmp_path / "whole", "default")
    assert torch.equal(logits(other), want)
    assert close(logits(plain(llama(), tmp_path / "whole")), want)
    # The other processes have no state_dict, and write nothing.
    model.save_pretrained(tmp_path / "none", state_dict={}, is_main_process=False)
    assert not list((tmp_path / "none").glob("*.*"))


@pytest.mark.parametrize("method", ["loram", "lora"])
@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2], ids=["", "tied", "gpt2"])
def test_resized_embeddings(tmp_path, make, method):
    """PEFT saves them beside the adapter: loading sets their values, and they stay frozen."""
    make().save_pretrained(tmp_path / "base")

    def base(seed: int) -> nn.Module:
        model = type(make()).from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(100)
        return model

    options = {"target_modules": ["q_proj", "c_attn"], "task_type": "CAUSAL_LM"}
    model = adapted(base(1), **options)
    initialize(model, method)
    move(model)
    model.get_input_embeddings().weight.data[-4:] += 1
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 96, 99, 98]])
    want = logits(model, ids)
    loaded = [plain(base(2), tmp_path / "adapter")]
    for name in ("default", "again"):
        loaded.append(adapted(base(2), **options))
        initialize(loaded[-1], "pissa")
        result = loaded[-1].load_adapter(tmp_path / "adapter", name, is_trainable=True)
        assert not result.missing_keys and not result.unexpected_keys
        loaded[-1].set_adapter(name)
    for other in loaded:
        assert close(logits(other.eval(), ids), want)
        assert not [n for n, p in other.named_parameters() if p.requires_grad and "lora" not in n]


def test_a_start_of_zero_keeps_its_rank(tmp_path):
    base = llama()
    model = adapted(base, use_rslora=True, r=5)
    initialize(model, "lora")
    move(model)
    model.save_pretrained(tmp_path)
    loaded = plain(base, tmp_path)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (5, 5, False)
    assert close(logits(loaded), logits(model))
    again = adapted(base, use_rslora=True, r=5)
    initialize(again, "loram")
    again.load_adapter(tmp_path, "default", is_trainable=True)
    config = again.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (5, 8, True)
    assert torch.equal(logits(again), logits(model))


def test_several_adapters_and_selection(tmp_path):
    from peft import LoraConfig

    base = llama()
    model = adapted(base)
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["up_proj"]))
    initialize(model)
    initialize(model, "pissa", adapter_name="third")
    want = {}
    for seed, name in enumerate(("default", "second", "third")):
        model.set_adapter(name)
        move(model, seed=seed)
        want[name] = logits(model)
    before = weights_of(model)
    model.save_pretrained(tmp_path / "all")
    for name, folder in (("default", "."), ("second", "second"), ("third", "third")):
        assert close(logits(plain(base, tmp_path / "all" / folder)), want[name])
    model.save_pretrained(tmp_path / "one", selected_adapters=["third"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    assert close(logits(plain(base, tmp_path / "one" / "third")), want["third"])
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["fourth"])
    assert model.peft_config["default"].r == 4 and model.peft_config["third"].r == 2
    assert same_bits(weights_of(model), before)


def test_a_given_state_dict_is_what_is_written(tmp_path):
    """accelerate passes a state_dict gathered from elsewhere."""
    base = llama()
    model = adapted(base)
    initialize(model)
    move(model)
    state, want = weights_of(model), logits(model)
    move(model, seed=9)
    model.save_pretrained(tmp_path, state_dict=state)
    assert close(logits(plain(base, tmp_path)), want)
    del state["base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"]
    with pytest.raises(ValueError, match=r"state_dict lacks .*layers\.0\.mlp\.up_proj\.lora_A"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize("rank_zero", [True, False])
def test_only_the_main_process_writes(tmp_path, rank_zero):
    model = adapted(llama())
    initialize(model)
    model.save_pretrained(tmp_path, is_main_process=rank_zero)
    assert (tmp_path / "adapter_model.safetensors").exists() == rank_zero


def test_resumes_exactly(tmp_path):
    """Into an existing adapter, as Trainer does, however that one was initialized."""
    model = adapted(llama())
    initialize(model, "loram")
    move(model)
    model.save_pretrained(tmp_path)
    for method in ("loram", "pissa", "lora"):
        other = adapted(llama())
        initialize(other, method)
        result = other.load_adapter(str(tmp_path), "default", is_trainable=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert same_bits(weights_of(other), weights_of(model))
        assert torch.equal(logits(other), logits(model))
        assert all(p.requires_grad for n, p in other.named_parameters() if ".lora_A." in n)


def test_loads_as_another_adapter(tmp_path):
    base = llama()
    model = adapted(base)
    initialize(model, "pissa")
    move(model)
    model.save_pretrained(tmp_path)
    other = adapted(base)
    report = initialize(other)
    other.load_adapter(tmp_path, "loaded")
    assert other.peft_config["loaded"].r == 4 and not other.training
    other.set_adapter("loaded")
    assert torch.equal(logits(other), logits(model))
    # The loaded adapter still needs them.
    report.undo()
    assert "save_pretrained" in vars(other)
    other.save_pretrained(tmp_path / "again", selected_adapters=["loaded"])
    assert close(logits(plain(base, tmp_path / "again" / "loaded")), logits(model))


def test_a_plain_adapter_has_nothing_to_subtract(tmp_path):
    """The folder decides: the start of the replaced adapter is dropped."""
    base = llama()
    trained = adapted(base)
    with torch.no_grad():
        for layer in linear_layers(trained).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    trained.save_pretrained(tmp_path)
    model = adapted(base)
    initialize(model)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), logits(trained))
    assert not any("lora_start" in key for key in model.state_dict())


def test_a_killed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    """As with `lora_kernels.save_adapter`, which uses the same code."""
    from lora_kernels.files.adapter import content

    base = llama()
    model = adapted(base)
    initialize(model)
    move(model)
    model.save_pretrained(tmp_path)
    want = logits(model)
    move(model, seed=3)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(content, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert model.peft_config["default"].r == 4
    assert close(logits(plain(base, tmp_path)), want)
    model.save_pretrained(tmp_path)
    assert close(logits(plain(base, tmp_path)), logits(model))
    assert len(list(tmp_path.iterdir())) == 3


def damaged(tmp_path, change):
    """A saved folder with another recipe in its metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = adapted(llama())
    initialize(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["lora_kernels"] = change(metadata["lora_kernels"])
    save_file(load_file(path), path, metadata)
    return model


def test_bad_files(tmp_path):
    newer = damaged(tmp_path / "newer", lambda text: text.replace('"version": 2', '"version": 9'))
    with pytest.raises(ValueError, match="of version 9, this package reads up to version 2"):
        newer.load_adapter(tmp_path / "newer", "default")
    broken = damaged(tmp_path / "broken", lambda text: text[:-5])
    with pytest.raises(ValueError, match="its recipe is damaged"):
        broken.load_adapter(tmp_path / "broken", "default")

    def swapped(text):
        recipe = json.loads(text)
        recipe["layers"]["model.layers.9.mlp.up_proj"] = {"r": 4, "start": "kept"}
        return json.dumps(recipe)

    foreign = damaged(tmp_path / "foreign", swapped)
    with pytest.raises(ValueError, match=r"does not fit its tensors: .*layers\.9\.mlp"):
        foreign.load_adapter(tmp_path / "foreign", "default")
    path = tmp_path / "broken" / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        broken.load_adapter(tmp_path / "broken", "default")


def test_another_rank_changes_nothing(tmp_path):
    model = adapted(llama(), r=3)
    initialize(model)
    model.save_pretrained(tmp_path)
    other = adapted(llama())
    initialize(other)
    before = weights_of(other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_adapter(tmp_path, "default")
    after = weights_of(other)
    starts = [key for key in before if "lora_start" in key]
    assert starts and all(torch.equal(before[key], after[key]) for key in starts)


def test_refused(tmp_path):
    model = adapted(llama())
    initialize(model)
    with pytest.raises(ValueError, match="safe_serialization=False pickles"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="for the original base anyway"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="before")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) first"):
        model.load_adapter(tmp_path, "default")


def test_weighted_adapters():
    from peft import LoraConfig

    model = adapted(gpt2(), target_modules=["c_fc"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    initialize(model)
    move(model)
    with pytest.raises(ValueError, match="'default' subtracts a start"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", "cat")
    with pytest.raises(ValueError, match="of 1 adapter"):
        model.add_weighted_adapter(["default"], [1.0], "half")
    model.add_weighted_adapter(["default", "second"], [0.5, 1.0], "both", "svd", svd_rank=8)
    for layer in linear_layers(model).values():
        got, want = torch.tensor(update_of(layer, "both")), torch.tensor(update_of(layer))
        assert close(got, 0.5 * want)  # "second" is zero
        assert float64(layer.lora_A["both"].weight).shape[0] == 8


def test_hot_swapping_leaves_nothing_to_subtract(tmp_path):
    """PEFT sets what the file does not contain, the start, to zero."""
    from peft.utils.hotswap import hotswap_adapter

    base = llama()
    trained = adapted(base)
    move(trained)
    trained.save_pretrained(tmp_path)
    model = adapted(base)
    initialize(model)
    hotswap_adapter(model, str(tmp_path), "default")
    assert close(logits(model), logits(trained))


def factors_of(model) -> dict:
    """A, B, A₀ and B₀ of each layer, for a model of PEFT or of this package."""
    from lora_kernels.model.install import adapted_layers

    found = {n: layer.layer_state() for n, layer in adapted_layers(model).items()}
    if found:
        return {
            n: (state.lora_A, state.lora_B, *state.start_factors()) for n, state in found.items()
        }
    return {
        n: (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.lora_start_A["default"],
            layer.lora_start_B["default"],
        )
        for n, layer in linear_layers(model).items()
    }


def same_factors(one, other) -> bool:
    one, other = factors_of(one), factors_of(other)
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for n in one for a, b in zip(one[n], other[n], strict=True)
    )


OPTIONS = {
    "target_modules": ["k_proj", "up_proj", "down_proj"],
    "rank_pattern": {"k_proj": 3},
    "alpha_pattern": {r"1\.mlp\.up_proj": 5},
    "modules_to_save": ["lm_head"],
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["loram", "pissa"])
def test_load_adapter_of_this_package_takes_it_further(tmp_path, method, rslora):
    """At rank r, with its start: A, B, A₀ and B₀ keep their bits."""
    from lora_kernels import load_adapter, save_adapter

    model = adapted(llama(), **OPTIONS, use_rslora=rslora)
    initialize(model, method)
    move(model)
    model.save_pretrained(tmp_path)
    other = llama()
    load_adapter(other, tmp_path)
    assert same_factors(other, model)
    assert close(logits(other.eval()), logits(model))
    trained = [sorted(p.shape for p in m.parameters() if p.requires_grad) for m in (other, model)]
    assert trained[0] == trained[1]

    # And back.
    for form in ("peft", "native"):
        save_adapter(other, tmp_path / form, format=form)
    again = adapted(llama(), **OPTIONS, use_rslora=rslora)
    initialize(again, "lora")
    with pytest.raises(
        ValueError, match=r"format='native', which lora_kernels\.load_adapter reads"
    ):
        again.load_adapter(tmp_path / "native", "default")
    result = again.load_adapter(tmp_path / "peft", "default")
    assert not result.missing_keys and not result.unexpected_keys
    assert same_factors(again, model)
    assert torch.equal(logits(again), logits(model))


def test_folders_of_this_package(tmp_path):
    """A start stored as a recipe, and one absorbed by the base: rank r and the same function."""
    from lora_kernels import LoRAConfig, add_lora, save_adapter

    for scaling in ("lora", "rslora", "alpha_sqrt"):
        config = LoRAConfig(
            r=4,
            scaling=scaling,
            init_lora_weights="pissa" if scaling == "alpha_sqrt" else "loram",
            rank_pattern={"q_proj": 2},
            alpha_pattern={"1.mlp.up_proj": 3},
        )
        model = llama()
        add_lora(model, config, progress=False)
        move(model)
        save_adapter(model, tmp_path)
        other = adapted(llama())
        initialize(other, "lora")
        other.load_adapter(tmp_path, "ours")
        other.set_adapter("ours")
        assert {layer.r["ours"] for layer in linear_layers(other).values()} == {2, 4}
        assert close(logits(other), logits(model.eval()))
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
        with pytest.raises(ValueError, match=r"says lora_alpha = 1, but .* was edited"):
            other.load_adapter(tmp_path, "ours")


def test_what_this_package_does_not_know_stays_an_error(tmp_path):
    from lora_kernels import load_adapter

    base = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Linear(4, 4))
    model = adapted(copy.deepcopy(base), target_modules=["0", "1"], r=2)
    initialize(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"0: .* not read here, such as .* convolutions"):
        load_adapter(base, tmp_path)


def test_the_start_of_a_residual_base_is_a_plain_adapter(tmp_path):
    """On that base `load_adapter` takes it as PEFT does, beside adapters of `initialize`."""
    from lora_kernels.files.checkpoint.initialize import initialize as initialize_folder
    from lora_kernels.model.config import LoRAConfig

    base, residual = tmp_path / "base", tmp_path / "residual"
    llama().save_pretrained(base)
    initialize_folder(base, residual, LoRAConfig(r=4))
    model = adapted(type(llama()).from_pretrained(residual))
    initialize(model, "pissa")
    model.load_adapter(str(residual / "adapter"), "start")
    model.set_adapter("start")
    assert close(logits(model.eval()), logits(llama()))


@pytest.mark.parametrize("method", ["loram", "lora"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_layer_has_its_strength_in_b(tmp_path, method, bias):
    """s is no power of two, and the embedding and the biases of B take part."""
    from safetensors.torch import load_file

    options = {"r": 3, "use_rslora": True, "rank_pattern": {"k_proj": 5}, "lora_bias": bias}
    targets = ["q_proj", "k_proj", "up_proj"] + ([] if bias else ["embed_tokens"])
    options["target_modules"] = targets
    base = llama()
    model = adapted(base, **options)
    initialize(model, method)
    move(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    r = 10 if method == "loram" else 5
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (r, r, False)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(t) for n, t in tensors.items() if n.endswith("lora_A.weight")} == {r}
    assert close(logits(plain(base, tmp_path)), logits(model))
    again = adapted(base, **options)
    initialize(again, "pissa")
    again.load_adapter(tmp_path, "default", is_trainable=True)
    ours, theirs = weights_of(model), weights_of(again)
    for name, tensor in ours.items():
        if "lora_" in name:
            assert torch.equal(tensor, theirs[name]), name
    import lora_kernels

    plain_model = copy.deepcopy(base)
    lora_kernels.load_adapter(plain_model, tmp_path)
    for name, layer in linear_layers(model).items():
        adapter = plain_model.get_submodule(name).active()
        if "default" in layer.lora_embedding_A:
            assert torch.equal(adapter.lora_A, layer.lora_embedding_A["default"])
            assert torch.equal(adapter.lora_B, layer.lora_embedding_B["default"])
            continue
        assert torch.equal(adapter.lora_B, layer.lora_B["default"].weight)
        if bias:
            assert torch.equal(adapter.lora_bias, layer.lora_B["default"].bias)
    assert close(logits(plain_model.eval()), logits(model))
    again.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(tmp_path, groups):
    """Each group of a convolution has consecutive rows of A."""
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Flatten(), nn.Linear(8 * 36, 16))
    base.config = {"model_type": "custom"}
    model = adapted(base, target_modules=["0", "2"], r=3, rank_pattern={"0": 4}, use_rslora=True)
    report = initialize(model, "loram")
    assert report.left
    move(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        want = model.eval()(x)
        assert close(plain(base, tmp_path)(x), want)
        again = adapted(base, target_modules=["0", "2"], r=3, rank_pattern={"0": 4},
                        use_rslora=True)  # fmt: skip
        initialize(again, "loram")
        again.load_adapter(tmp_path, "default")
        assert torch.equal(again.eval()(x), want)


def test_saved_while_it_is_loaded(tmp_path):
    """The bridge reads one of two adapters that replace each other, never parts of both."""
    from threading import Event, Thread

    models = {}
    for name, alpha in (("one", 7), ("two", 13)):
        models[name] = adapted(llama(), target_modules=["q_proj"], r=5, lora_alpha=alpha)
        initialize(models[name], "pissa")
        move(models[name], seed=alpha)
        models[name].save_pretrained(tmp_path / name)
    folder, stop = tmp_path / "both", Event()
    shutil.copytree(tmp_path / "one", folder)

    def saving():
        while not stop.is_set():
            for model in models.values():
                model.save_pretrained(folder)

    writer = Thread(target=saving)
    writer.start()
    try:
        for _ in range(25):
            reader = adapted(llama(), target_modules=["q_proj"], r=5, lora_alpha=7)
            initialize(reader, "loram")
            reader.load_adapter(folder, "new")
            found = [
                all(
                    torch.equal(layer.lora_B["new"].weight, own.lora_B["default"].weight)
                    for layer, own in zip(
                        linear_layers(reader).values(), linear_layers(model).values(), strict=True
                    )
                )
                for model in models.values()
            ]
            assert any(found)
    finally:
        stop.set()
        writer.join()


def test_a_regular_expression_becomes_a_list(tmp_path):
    base = llama()
    model = adapted(base, target_modules=r".*\.1\.self_attn\.(q|v)_proj")
    initialize(model, "loram")
    move(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["1.self_attn.q_proj", "1.self_attn.v_proj"] or sorted(
        config["target_modules"]
    ) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert close(logits(plain(base, tmp_path)), logits(model))
    again = adapted(base, target_modules=["q_proj"])
    initialize(again, "loram")
    again.load_adapter(tmp_path, "again")
    again.set_adapter("again")
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["again"].target_modules == r".*\.1\.self_attn\.(q|v)_proj"
