"""Adapters in folders: plain PEFT computes the same from them, and training goes on from them."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRALinear,
    _atomic,
    add_lora,
    disable_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)
from lora_kernels.adapter_files import NATIVE_FILE, read_adapter, write_adapter
from lora_kernels.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.config import LoRAConfig, pattern_matches
from lora_kernels.init import LoRAM, PiSSA, get_initializer, initializer_names
from lora_kernels.state import AdapterState, LayerState
from lora_kernels.targets import is_conv1d

from .oracle import to_numpy
from .packages import needs_real_model

safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).parents[1]
NAMES = initializer_names()
FACTORS = ("lora_A", "lora_B", "lora_R", "start_A", "start_B")
LLAMA_LAYERS = [
    f"model.layers.{block}.{end}"
    for block in (0, 1)
    for end in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]
GPT2_LAYERS = [
    f"transformer.h.{block}.{end}" for block in (0, 1) for end in ("attn.c_attn", "mlp.c_fc")
]


def adapt(linear: nn.Linear, config: LoRAConfig, name: str = "", residual: str = "absorb"):
    """The trained state of a layer over a copy of `linear`, and its true ΔW in float64."""
    initializer = config.initializer
    gradient = torch.randn_like(linear.weight) if initializer.needs_gradient else None
    layer = LoRALinear.from_linear(
        copy.deepcopy(linear),
        r=config.layer_rank(name),
        lora_alpha=config.layer_alpha(name),
        scaling=config.scaling_rule,
        init_lora_weights=initializer,
        residual=residual,
        gradient=gradient,
    )

    def product():
        B, A = to_numpy(layer.lora_B), to_numpy(layer.lora_A)
        return B @ A if layer.lora_R is None else B @ to_numpy(layer.lora_R) @ A

    start = product() if initializer.changes_base else 0.0
    with torch.no_grad():
        trained = [layer.lora_A, layer.lora_B] if layer.lora_R is None else [layer.lora_R]
        for factor in trained:
            factor.add_(0.1 * factor.std() + 0.05, alpha=random.uniform(0.5, 1.5))
            factor.add_(0.05 * torch.randn_like(factor))
    return layer.layer_state(), layer.scaling * (product() - start)


def one_layer(rows=40, cols=48, **options):
    options = {"r": 4, "lora_alpha": 8, **options}
    residual = options.pop("residual", "absorb")
    config = LoRAConfig(**options)
    layer, delta = adapt(nn.Linear(cols, rows), config, "block.1.q", residual)
    return AdapterState(config, {"block.1.q": layer}, base_model="some/base"), delta


def assert_same(got: AdapterState, want: AdapterState) -> None:
    """Bit for bit, the dtypes too."""
    assert got.config == want.config and got.base_model == want.base_model
    assert list(got.layers) == list(want.layers) and got.extra.keys() == want.extra.keys()
    for name, tensor in want.extra.items():
        assert got.extra[name].dtype == tensor.dtype and torch.equal(got.extra[name], tensor)
    for name, layer in want.layers.items():
        for field in fields(LayerState):
            a, b = getattr(got.layers[name], field.name), getattr(layer, field.name)
            if isinstance(b, torch.Tensor):
                assert a.dtype == b.dtype and torch.equal(a, b), (name, field.name)
            else:
                assert a == b, (name, field.name)


def peft_config(folder) -> dict:
    return json.loads((folder / ADAPTER_CONFIG).read_text())


class TestRoundTrip:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("form", ["peft", "native"])
    @pytest.mark.parametrize("name", NAMES)
    def test_training_goes_on_from_the_same_bits(self, name, form, residual, tmp_path):
        state, delta = one_layer(init_lora_weights=name, residual=residual)
        report = write_adapter(tmp_path, state, format=form)
        assert all((tmp_path / n).stat().st_size == size for n, size in report.files.items())
        got = read_adapter(tmp_path)
        layer = got.layers["block.1.q"]
        if state.layers["block.1.q"].lora_R is None or form == "native":
            assert not report.folded
            assert_same(got, state)
        else:  # said in the report: R A is one matrix now
            assert report.folded == ("block.1.q",) and "only format='native'" in str(report)
            assert layer.lora_R is None
        right, left = layer.update_factors()
        product = layer.scaling * to_numpy(left) @ to_numpy(right)
        # Starts are rounded to float32, and so is R A.
        size = np.linalg.norm(to_numpy(left)) * np.linalg.norm(to_numpy(right)) * layer.scaling
        assert np.linalg.norm(product - delta) <= 2.0**-22 * size

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_sizes(self, form, tmp_path):
        """A recipe is a number, kept starts lie in the file; engines get what they need."""
        sizes = {}
        for name in ("loram", "pissa"):
            state, _ = one_layer(400, 480, init_lora_weights=name)
            sizes[name] = write_adapter(tmp_path / name, state, format=form).files
        pair = 4 * (400 + 480) * 4
        file = NATIVE_FILE if form == "native" else ADAPTER_FILE
        assert sizes["pissa"][file] - 2 * pair in range(300, 4000)
        loram = pair if form == "native" else 2 * pair
        assert sizes["loram"][file] - loram in range(300, 4000)

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_configurations(self, form, tmp_path):
        config = LoRAConfig(
            r=3,
            target_modules=["q", "k"],
            exclude_modules=r".*\.9\..*",
            lora_dropout=0.25,
            scaling="alpha_sqrt",
            init_lora_weights=LoRAM(track=PiSSA(seed=3), statistic="variance"),
            modules_to_save=["head"],
            layers_to_transform=(0, 1),
            layers_pattern="block",
            rank_pattern={r"1\.q": 5},
            alpha_pattern={"k": 100.5},
            task_type="CAUSAL_LM",
            bias="all",
        )
        layers = {}
        for name in ("block.0.q", "block.1.q", "block.11.q", "block.0.k"):
            layers[name], _ = adapt(nn.Linear(12, 20, dtype=torch.float64), config, name)
        extra = {"head.weight": torch.randn(3, 4).bfloat16(), "norm.bias": torch.randn(5)}
        state = AdapterState(config, layers, extra, None)
        write_adapter(tmp_path, state, format=form)
        assert_same(read_adapter(tmp_path), state)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_factors(self, dtype, tmp_path):
        """They are float32 in PEFT's file and what they were when they are read."""
        for name in ("loram", "pissa"):
            state, _ = one_layer(init_lora_weights=name)
            layer = state.layers["block.1.q"]
            narrow = {
                k: getattr(layer, k).to(dtype) for k in FACTORS if getattr(layer, k) is not None
            }
            state.layers["block.1.q"] = replace(layer, **narrow)
            write_adapter(tmp_path / name, state)
            stored = safetensors.load_file(tmp_path / name / ADAPTER_FILE)
            assert {t.dtype for t in stored.values()} == {torch.float32}
            assert_same(read_adapter(tmp_path / name), state)

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_the_same_adapter_gives_the_same_bytes(self, form, tmp_path):
        state, _ = one_layer()
        for k in "ab":
            write_adapter(tmp_path / k, state, format=form)
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

    def test_shared_and_strided_factors(self, tmp_path):
        state, _ = one_layer(init_lora_weights="lora")
        layer = state.layers["block.1.q"]
        pool = torch.randn(96, 40)
        state.layers = {
            n: replace(layer, lora_A=pool[:48].T[:4], lora_B=pool[:4].T) for n in ("a", "b")
        }
        for form in ("peft", "native"):
            write_adapter(tmp_path, state, format=form)
            assert_same(read_adapter(tmp_path), state)

    def test_initialiser_that_is_not_registered_here(self, tmp_path):
        state, _ = one_layer()
        write_adapter(tmp_path, state, format="native")
        tensors = safetensors.load_file(tmp_path / NATIVE_FILE)
        with safetensors.safe_open(tmp_path / NATIVE_FILE, "pt") as file:
            recipe = json.loads(file.metadata()["lora_kernels"])
        recipe["config"]["init_lora_weights"] = {"name": "Mine", "options": None}
        metadata = {"lora_kernels": json.dumps(recipe)}
        safetensors.save_file(tensors, tmp_path / NATIVE_FILE, metadata)
        with pytest.warns(UserWarning, match="started with 'Mine', which is not registered"):
            got = read_adapter(tmp_path)
        assert torch.equal(got.layers["block.1.q"].lora_A, state.layers["block.1.q"].lora_A)


def logits_64(model, deltas: dict[str, np.ndarray], ids, extra=None):
    """What the model computes with W + ΔW in float64."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            module = model.get_submodule(name)
            delta = torch.from_numpy(delta)
            module.weight.add_(delta.T if is_conv1d(module) else delta)
        tensors = dict(model.named_parameters())
        for name, tensor in (extra or {}).items():
            tensors[name].copy_(tensor)
        return model(ids).logits


def plain_linear(module) -> nn.Linear:
    if not is_conv1d(module):
        return module
    weight = module.weight.detach().T
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), module.bias
    return linear


@pytest.fixture(scope="module")
def models():
    """Tiny models with weights of a usual size, so that logits depend on all of them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=32,
            initializer_range=0.1,
        )
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=32, initializer_range=0.1
        )
    )
    return {"llama": llama.eval(), "gpt2": gpt2.eval()}


IDS = torch.arange(24).reshape(2, 12) * 5 % 64


def adapt_model(model, names, config):
    layers, deltas = {}, {}
    for name in names:
        layers[name], deltas[name] = adapt(plain_linear(model.get_submodule(name)), config, name)
    return AdapterState(config, layers), deltas


def peft_logits(model, folder):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys and options that it passes over
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    with torch.no_grad():
        return adapted, adapted.eval()(IDS).logits


def assert_agree(got, want) -> None:
    # A model of two blocks in float32, against one in float64: some roundings of the largest logit.
    assert (got.double() - want).abs().max() <= 3e-5 * want.abs().max()


class TestPlainPeft:
    """What is written gives plain PEFT the adapted model, on the original base."""

    @pytest.mark.parametrize("kind,names", [("llama", LLAMA_LAYERS), ("gpt2", GPT2_LAYERS)])
    @pytest.mark.parametrize("name", NAMES)
    def test_every_start(self, name, kind, names, models, tmp_path):
        model = models[kind]
        config = LoRAConfig(r=4, lora_alpha=6, init_lora_weights=name)
        state, deltas = adapt_model(model, names, config)
        modules = [n for n, _ in model.named_modules()]
        write_adapter(tmp_path, state, module_names=modules, fan_in_fan_out=kind == "gpt2")
        want = logits_64(model, deltas, IDS)
        adapted, got = peft_logits(model, tmp_path)
        assert_agree(got, want)
        assert (want - logits_64(model, {}, IDS)).abs().max() > 0.01 * want.abs().max()
        assert {n for n, m in adapted.named_modules() if hasattr(m, "lora_A")} == {
            f"base_model.model.{n}" for n in names
        }
        written = peft_config(tmp_path)
        assert written["r"] == (8 if get_initializer(name).changes_base else 4)
        assert written["rank_pattern"] == written["alpha_pattern"] == {}
        assert all("." not in target for target in written["target_modules"])

    @pytest.mark.parametrize("rule", ["lora", "rslora", "alpha_sqrt"])
    def test_scaling_rules_and_patterns(self, rule, models, tmp_path):
        """In layer 1 but not in layer 11, and in one that plain names cannot tell apart."""
        config = LoRAConfig(
            r=4,
            scaling=rule,
            lora_alpha=5.5,
            init_lora_weights="pissa",
            rank_pattern={r"1\.mlp\.up_proj": 7, "v_proj": 3},
            alpha_pattern={r"model\.layers\.0\.self_attn\.q_proj": 9},
        )
        state, deltas = adapt_model(models["llama"], LLAMA_LAYERS[1:], config)
        write_adapter(tmp_path, state)
        want = logits_64(models["llama"], deltas, IDS)
        assert_agree(peft_logits(models["llama"], tmp_path)[1], want)
        written = peft_config(tmp_path)
        assert written["use_rslora"] == (rule != "lora") and written["r"] == 8
        assert sorted(written["target_modules"]) == sorted(LLAMA_LAYERS[1:])

    @pytest.mark.parametrize("rule", ["lora", "rslora"])
    def test_engines_that_read_no_pattern(self, rule, tmp_path):
        """vLLM takes s from r and lora_alpha for all layers, and every tensor for an A or a B."""
        alphas = {"lora": {"k": 8}, "rslora": {"k": 16 / math.sqrt(2)}}[rule]
        config = LoRAConfig(
            r=4, lora_alpha=16, scaling=rule, rank_pattern={"k": 2}, alpha_pattern=alphas
        )
        layers, deltas = {}, {}
        for name in ("a.k", "a.q", "b.k", "b.q"):
            layers[name], deltas[name] = adapt(nn.Linear(24, 20), config, name)
        report = write_adapter(tmp_path, AdapterState(config, layers))
        written = peft_config(tmp_path)
        root = math.sqrt(written["r"]) if written["use_rslora"] else written["r"]
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        for name, delta in deltas.items():
            A, B = (tensors.pop(f"base_model.model.{name}.lora_{k}.weight") for k in "AB")
            got = written["lora_alpha"] / root * to_numpy(B) @ to_numpy(A)
            assert np.linalg.norm(got - delta) <= 1e-5 * np.linalg.norm(delta)
        assert not tensors
        assert len(report.scalings) == 1 and "vLLM" not in str(report)
        layers["a.k"] = replace(layers["a.k"], scaling=1.0)
        assert "vLLM does not" in str(write_adapter(tmp_path, AdapterState(config, layers)))

    def test_whole_numbers_stay(self, tmp_path):
        """s of r = 6 is 16 / 6, no binary fraction: alpha is doubled, and an integer."""
        state, _ = one_layer(r=6, lora_alpha=16)
        write_adapter(tmp_path, state)
        written = peft_config(tmp_path)
        assert (written["r"], written["lora_alpha"]) == (12, 32)
        assert isinstance(written["lora_alpha"], int)

    def test_patterns_are_whole_names(self, tmp_path):
        peft_key = pytest.importorskip("peft.utils.other").get_pattern_key
        config = LoRAConfig(r=4, init_lora_weights="lora", rank_pattern={"x": 1})
        names = ["1.q", "11.q", "a.1.q", "a.1xq", "a.x"]
        layers = {n: adapt(nn.Linear(8, 8), config, n)[0] for n in names}
        layers["1.q"] = adapt(nn.Linear(8, 8), replace(config, r=2), "1.q")[0]
        layers["a.1.q"] = adapt(nn.Linear(8, 8), replace(config, r=3), "a.1.q")[0]
        write_adapter(tmp_path, AdapterState(config, layers))
        written = peft_config(tmp_path)
        for name, layer in layers.items():
            key = peft_key(written["rank_pattern"].keys(), name)
            assert written["rank_pattern"].get(key, written["r"]) == layer.r
            assert [pattern_matches(k, name) for k in written["rank_pattern"]].count(True) <= 1

    @pytest.mark.parametrize(
        "names,modules,expected",
        [
            (["a.0.q", "a.1.q"], ["a", "a.0.q", "a.1.q", "a.0.k"], ["q"]),
            (["a.0.x.q"], ["a.0.x.q", "a.0.y.q"], ["x.q"]),
            (["a.0.q"], ["a.0.q", "a.1.q"], ["0.q"]),
            (["a.0.b.q"], ["a.0.b.q", "a.1.b.q"], ["a.0.b.q"]),
            # The full name of one is the ending of another.
            (["b.q"], ["b.q", "a.b.q"], r"b\.q"),
            (["b.q", "q"], ["b.q", "a.b.q", "q"], r"b\.q|q"),
        ],
    )
    def test_targets_are_exactly_the_layers(self, names, modules, expected, tmp_path):
        tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
        from peft import LoraConfig

        state, _ = one_layer()
        state.layers = dict.fromkeys(names, state.layers["block.1.q"])
        write_adapter(tmp_path, state, module_names=modules)
        targets = peft_config(tmp_path)["target_modules"]
        assert targets == expected
        config = LoraConfig(target_modules=targets)
        found = [m for m in modules if tuners_utils.check_target_module_exists(config, m)]
        assert sorted(found) == sorted(names)

    @pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
    def test_modules_in_full_and_biases(self, bias, models, tmp_path):
        model = models["gpt2"]
        config = LoRAConfig(r=4, modules_to_save=["ln_f", "h.0.mlp.c_proj"], bias=bias)
        state, deltas = adapt_model(model, GPT2_LAYERS, config)
        own = ["ln_f.weight", "ln_f.bias", "h.0.mlp.c_proj.weight", "h.0.mlp.c_proj.bias"]
        keys = {f"transformer.{key}" for key in own}
        if bias != "none":
            keys |= {f"{name}.bias" for name in GPT2_LAYERS}
        if bias == "all":
            keys |= {n for n, _ in model.named_parameters() if n.endswith(".bias")}
        tensors = dict(model.named_parameters())
        state.extra = {
            k: tensors[k].detach() + 0.1 * torch.randn_like(tensors[k]) for k in sorted(keys)
        }
        write_adapter(tmp_path, state, fan_in_fan_out=True)
        want = logits_64(model, deltas, IDS, state.extra)
        assert_agree(peft_logits(model, tmp_path)[1], want)
        assert_same(read_adapter(tmp_path), state)


class TestFromPeft:
    def make(self, model, folder, **options):
        """An adapter that PEFT made, trained and wrote, with the logits that it gives."""
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            adapted.save_pretrained(folder)
            return adapted.eval()(IDS).logits

    @pytest.mark.parametrize(
        "kind,options",
        [
            ("llama", {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
            ("llama", {"target_modules": r".*\.1\..*(q_proj|up_proj)", "r": 3, "lora_alpha": 7}),
            (
                "llama",
                {
                    "target_modules": ["q_proj", "k_proj", "down_proj"],
                    "use_rslora": True,
                    "r": 4,
                    "rank_pattern": {r"1\.self_attn\.q_proj": 6},
                    "alpha_pattern": {"down_proj": 3},
                    "modules_to_save": ["lm_head", "norm"],
                    "exclude_modules": ["layers.0.self_attn.k_proj"],
                },
            ),
            (
                "llama",
                {
                    "target_modules": ["v_proj"],
                    "layers_to_transform": 1,
                    "layers_pattern": "layers",
                },
            ),
            (
                "gpt2",
                {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "fan_in_fan_out": True},
            ),
            (
                "gpt2",
                {
                    "target_modules": ["c_attn"],
                    "bias": "all",
                    "modules_to_save": ["ln_f"],
                    "fan_in_fan_out": True,
                },
            ),
        ],
    )
    def test_what_peft_writes(self, kind, options, models, tmp_path):
        want = self.make(models[kind], tmp_path / "theirs", **options)
        state = read_adapter(tmp_path / "theirs")
        deltas = {
            name: layer.scaling * to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
            for name, layer in state.layers.items()
        }
        assert_agree(want, logits_64(models[kind], deltas, IDS, state.extra))
        assert not any(layer.changes_base for layer in state.layers.values())
        for option in ("bias", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"):
            assert (
                getattr(state.config, option)
                == getattr(LoRAConfig(**{option: options[option]}), option)
                if option in options
                else True
            )
        assert set(state.config.modules_to_save or ()) == set(options.get("modules_to_save", ()))
        modules = [n for n, _ in models[kind].named_modules()]
        write_adapter(tmp_path / "ours", state, module_names=modules, fan_in_fan_out=kind == "gpt2")
        assert torch.equal(peft_logits(models[kind], tmp_path / "ours")[1], want)
        assert_same(read_adapter(tmp_path / "ours"), state)

    @pytest.mark.parametrize(
        "option,value",
        [
            ("use_dora", True),
            ("lora_bias", True),
            ("layer_replication", [[0, 2], [1, 2]]),
            ("target_parameters", ["experts.weight"]),
            ("trainable_token_indices", [1, 2]),
            ("alora_invocation_tokens", [3]),
            ("use_qalora", True),
            ("megatron_config", {"a": 1}),
            ("velora_config", {"num_groups": 64}),
            ("monteclora_config", {"a": 1}),
            ("use_bdlora", {"a": 1}),
            ("arrow_config", {"top_k": 3}),
            ("kasa_config", {"beta": 1e-4}),
            ("ensure_weight_tying", True),
            ("option_of_tomorrow", 3),
        ],
    )
    def test_options_that_change_the_function(self, option, value, tmp_path):
        self.plain(tmp_path, **{option: value})
        with pytest.raises(ValueError, match=rf"{ADAPTER_FILE}: {option} = .*not implemented here"):
            read_adapter(tmp_path)
        self.plain(tmp_path, **{option: None})
        read_adapter(tmp_path)

    def test_every_field_of_peft_is_known(self, tmp_path):
        """A field that is new in PEFT has a default that is off, or is on the list."""
        peft = pytest.importorskip("peft")
        values = peft.LoraConfig(target_modules=["q"], r=2).to_dict()
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
        self.plain(tmp_path, **values | {"peft_type": "LORA"})
        assert read_adapter(tmp_path).config.target_modules == ("q",)

    @pytest.mark.parametrize(
        "init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga"]
    )
    def test_starts_that_changed_the_base(self, init, tmp_path):
        self.plain(tmp_path, init_lora_weights=init)
        with pytest.raises(ValueError, match=f"'{init}': its factors hold for a base that PEFT"):
            read_adapter(tmp_path)

    @pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
    def test_starts_that_did_not(self, init, tmp_path):
        self.plain(tmp_path, init_lora_weights=init)
        assert read_adapter(tmp_path).layers["a.q"].scaling == 4.0

    def test_which_starts_change_the_base(self, models):
        """The two lists above, by what PEFT does."""
        peft = pytest.importorskip("peft")
        target = "model.layers.0.self_attn.q_proj"
        weight = models["llama"].get_submodule(target).weight
        for init in (
            "pissa",
            "pissa_niter_4",
            "olora",
            True,
            False,
            "gaussian",
            "orthogonal",
            "mica",
        ):
            config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=init)
            adapted = peft.get_peft_model(copy.deepcopy(models["llama"]), config)
            layer = adapted.base_model.model.get_submodule(target)
            changed = not torch.equal(layer.base_layer.weight, weight)
            assert changed == (str(init).startswith(("pissa", "olora"))), init

    def test_mica_and_unknown_starts(self, tmp_path):
        self.plain(tmp_path, init_lora_weights="mica")
        with pytest.warns(UserWarning, match="PEFT trains A only"):
            read_adapter(tmp_path)
        self.plain(tmp_path, init_lora_weights="gausian")
        with pytest.raises(ValueError, match=r"'gausian': expected one of .*mean 'gaussian'"):
            read_adapter(tmp_path)

    def test_converted_pissa(self, models, tmp_path):
        """PEFT's own conversion gives a plain adapter, which is read."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        adapted = peft.get_peft_model(copy.deepcopy(models["llama"]), config)
        adapted.save_pretrained(tmp_path / "start")
        with pytest.raises(ValueError, match="'pissa'"):
            read_adapter(tmp_path / "start")
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
            want = adapted.eval()(IDS).logits
            adapted.save_pretrained(
                tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start"
            )
        state = read_adapter(tmp_path / "end")
        deltas = {
            name: layer.scaling * to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
            for name, layer in state.layers.items()
        }
        assert_agree(want, logits_64(models["llama"], deltas, IDS))

    @staticmethod
    def plain(folder, tensors=None, **options):
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q"], **options}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
        if tensors is None:
            tensors = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
        tensors = {f"base_model.model.a.q.{k}.weight": v for k, v in tensors.items()}
        safetensors.save_file(tensors, folder / ADAPTER_FILE)


def train(model, steps, optimizer=None):
    """The model, some steps further, and its optimiser."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fresh = torch.optim.AdamW(parameters, lr=1e-2)
    if optimizer is not None:
        fresh.load_state_dict(copy.deepcopy(optimizer))  # it takes the tensors over
    model.train()
    for _ in range(steps):
        fresh.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        fresh.step()
    model.eval()
    return copy.deepcopy(fresh.state_dict())


class TestModels:
    """save_adapter and load_adapter."""

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize(
        "form,name",
        [
            *itertools.product(["peft", "native"], ["loram", "pissa", "lora"]),
            ("native", "lora_xs"),  # PEFT's format has no place for R
        ],
    )
    def test_training_goes_on_as_if_it_had_not_stopped(
        self, form, name, residual, models, tmp_path
    ):
        config = LoRAConfig(
            r=4,
            lora_alpha=4,
            init_lora_weights=name,
            residual=residual,
            rank_pattern={r"0\.self_attn\.q_proj": 7},
            modules_to_save=["norm"],
        )
        through = copy.deepcopy(models["llama"])
        add_lora(through, config)
        optimizer = train(through, 2)
        save_adapter(through, tmp_path, format=form)
        train(through, 2, optimizer)

        resumed = copy.deepcopy(models["llama"])
        load_adapter(resumed, tmp_path)
        train(resumed, 2, optimizer)
        with torch.no_grad():
            assert torch.equal(resumed(IDS).logits, through(IDS).logits)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("name", ["loram", "olora", "lora_xs"])
    def test_plain_peft_on_the_original_base(self, name, kind, models, tmp_path):
        model = copy.deepcopy(models[kind])
        config = LoRAConfig(
            r=4, init_lora_weights=name, modules_to_save=["norm", "ln_f"][kind == "gpt2" :][:1]
        )
        add_lora(model, config)
        train(model, 2)
        with torch.no_grad():
            want = model(IDS).logits
        save_adapter(model, tmp_path)
        assert all("." not in target for target in peft_config(tmp_path)["target_modules"])
        assert_agree(peft_logits(models[kind], tmp_path)[1], want.double())
        fresh = copy.deepcopy(models[kind])
        load_adapter(fresh, tmp_path, is_trainable=False)
        assert not any(p.requires_grad for p in fresh.parameters())
        with torch.no_grad():
            assert_agree(fresh(IDS).logits, want.double())
            with disable_adapters(fresh):
                assert_agree(fresh(IDS).logits, models[kind](IDS).logits.double())

    def test_one_of_several(self, models, tmp_path):
        model = copy.deepcopy(models["llama"])
        for name, targets in (("first", ["q_proj"]), ("second", ["v_proj", "up_proj"])):
            config = LoRAConfig(r=3, target_modules=targets, residual="implicit")
            add_lora(model, config, adapter_name=name)
            train(model, 1)
            save_adapter(model, tmp_path / name)
        save_adapter(model, tmp_path / "again", adapter_name="first")
        for file in (tmp_path / "first").iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        fresh = copy.deepcopy(models["llama"])
        for name in ("first", "second"):
            load_adapter(fresh, tmp_path / name, adapter_name=name)
        for name in ("first", "second"):
            for each in (model, fresh):
                set_adapter(each, name)
            with torch.no_grad():
                assert torch.equal(fresh(IDS).logits, model(IDS).logits)
            assert_agree(
                peft_logits(models["llama"], tmp_path / name)[1], model(IDS).logits.double()
            )

    def test_compiled(self, models, tmp_path):
        model = copy.deepcopy(models["llama"])
        add_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
        save_adapter(model, tmp_path / "a")
        save_adapter(torch.compile(model), tmp_path / "b")
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

    def test_what_does_not_fit_changes_nothing(self, models, tmp_path):
        model = copy.deepcopy(models["llama"])
        add_lora(model, LoRAConfig(r=2, modules_to_save=["norm"]))
        save_adapter(model, tmp_path / "a")
        other = copy.deepcopy(models["gpt2"])
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"layer 'model\.layers\.0.*GPT2LMHeadModel"):
            load_adapter(other, tmp_path / "a")
        state = read_adapter(tmp_path / "a")
        name = "model.layers.1.mlp.down_proj"
        layer = state.layers[name]
        state.layers[name] = replace(layer, lora_A=torch.randn(2, 95))
        write_adapter(tmp_path / "b", state)
        with pytest.raises(
            ValueError, match=r"down_proj is for a weight \[64, 95\], this model has"
        ):
            load_adapter(other := copy.deepcopy(models["llama"]), tmp_path / "b")
        assert other.state_dict().keys() == models["llama"].state_dict().keys()
        state.layers[name] = layer
        state.extra = {"model.nrom.weight": torch.randn(64)}
        write_adapter(tmp_path / "c", state)
        with pytest.raises(ValueError, match=r"'model\.nrom\.weight'.*did you mean 'model\.norm"):
            load_adapter(other, tmp_path / "c")
        for key, tensor in models["llama"].state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor)
        assert before.keys() == models["gpt2"].state_dict().keys()

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_another_base(self, form, models, tmp_path):
        """A base that lacks a start already, as it is after PiSSA elsewhere, is told."""
        model = copy.deepcopy(models["llama"])
        add_lora(model, LoRAConfig(r=8, init_lora_weights="pissa"))
        save_adapter(model, tmp_path, format=form)
        other = copy.deepcopy(models["llama"])
        with torch.no_grad():
            other.get_submodule(LLAMA_LAYERS[0]).weight.mul_(0.97)
        with pytest.warns(UserWarning, match="another base, or one that lacks a start"):
            load_adapter(other, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_adapter(copy.deepcopy(models["llama"]), tmp_path)


@needs_real_model
def test_real_model(real_model, tmp_path):
    """SmolLM2-135M, all 210 projections: the same logits in plain PEFT and here."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(real_model)
    add_lora(model, LoRAConfig(r=8, lora_alpha=8), progress=False)
    train(model, 1)
    report = save_adapter(model, tmp_path)
    assert report.layers == 210 and peft_config(tmp_path)["r"] == 16
    assert len(peft_config(tmp_path)["target_modules"]) == 7
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(real_model), tmp_path)
    fresh = copy.deepcopy(real_model)
    load_adapter(fresh, tmp_path, progress=False)
    with torch.no_grad():
        want = model(IDS).logits
        assert torch.equal(fresh(IDS).logits, want)
        # As in test_real_model: the noise of reordered GEMMs in 210 layers.
        size = want.abs().max()
        assert (adapted.eval()(IDS).logits - want).abs().max() <= 3e-5 * size
        assert (real_model(IDS).logits - want).abs().max() > 1e-2 * size


class TestRecompression:
    @pytest.mark.parametrize("name", ["loram", "pissa", "lora", "lora_sb"])
    @pytest.mark.parametrize("keep", [1, 3, 4, 20])
    def test_against_the_svd_of_the_dense_update(self, name, keep, tmp_path):
        config = LoRAConfig(r=4, lora_alpha=12, init_lora_weights=name)
        layers, deltas = {}, {}
        for layer in ("a.q", "a.k"):
            layers[layer], deltas[layer] = adapt(nn.Linear(48, 40), config)
        report = write_adapter(tmp_path, AdapterState(config, layers), compress_to=keep)
        got = read_adapter(tmp_path)
        lost = total = 0.0
        for layer, delta in deltas.items():
            U, S, Vh = np.linalg.svd(delta)
            best = (U[:, :keep] * S[:keep]) @ Vh[:keep]
            state = got.layers[layer]
            assert not state.changes_base and state.scaling == layers[layer].scaling
            assert state.r == min(keep, layers[layer].update_factors()[0].shape[0])
            product = state.scaling * to_numpy(state.lora_B) @ to_numpy(state.lora_A)
            right, left = layers[layer].update_factors()
            size = float(right.norm() * left.norm()) * state.scaling  # of what is rounded
            assert np.linalg.norm(product - best) <= 2.0**-22 * size
            want = np.linalg.norm(S[keep:]) / np.linalg.norm(S)
            assert math.isclose(report.errors[layer], want, rel_tol=1e-4, abs_tol=1e-6)
            lost, total = lost + np.sum(S[keep:] ** 2), total + np.sum(S**2)
            if keep < 4:  # cut: √σ is in both
                norms = [np.sum(to_numpy(f) ** 2) for f in (state.lora_A, state.lora_B)]
                assert np.allclose(norms, S[:keep].sum() / state.scaling, rtol=1e-5)
        assert math.isclose(report.error, math.sqrt(lost / total), rel_tol=1e-4, abs_tol=1e-6)
        assert "relative error of" in str(report)

    def test_zero_update(self, tmp_path):
        state, _ = one_layer(init_lora_weights="lora")
        state.layers["block.1.q"].lora_B.zero_()
        report = write_adapter(tmp_path, state, compress_to=2)
        assert report.error == 0.0 and read_adapter(tmp_path).layers["block.1.q"].r == 2

    def test_bad_ranks(self, tmp_path):
        state, _ = one_layer()
        with pytest.raises(ValueError, match="compress_to must be at least 1, got 0"):
            write_adapter(tmp_path, state, compress_to=0)
        with pytest.raises(TypeError, match="compress_to must be an integer"):
            write_adapter(tmp_path, state, compress_to=1.5)
        with pytest.raises(ValueError, match="goes with format='peft' only"):
            write_adapter(tmp_path, state, compress_to=2, format="native")
        assert list(tmp_path.iterdir()) == []


class TestBadFiles:
    """One line that names the file."""

    def refused(self, folder, match, error=ValueError):
        with pytest.raises(error, match=match) as caught:
            read_adapter(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_damaged_bytes(self, form, tmp_path):
        state, _ = one_layer()
        write_adapter(tmp_path, state, format=form)
        file = tmp_path / (NATIVE_FILE if form == "native" else ADAPTER_FILE)
        whole = file.read_bytes()
        header = int.from_bytes(whole[:8], "little")
        for damaged in (
            b"",
            whole[:5],
            whole[: header // 2],
            whole[:-1],
            whole + b"x",
            (2**62).to_bytes(8, "little") + whole[8:],
            (99 * 2**20).to_bytes(8, "little") + whole[8:],
            b"\x80\x02}q\x00." + whole,  # a pickle
        ):
            file.write_bytes(damaged)
            self.refused(tmp_path, f"{file.name} is damaged, or no safetensors file")
        # A byte of the recipe, and of the numbers.
        file.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
        self.refused(tmp_path, "of version 9, this package reads version 1: update")
        file.write_bytes(whole.replace(b'\\"config\\"', b'\\"confug\\"'))
        self.refused(tmp_path, f"{file.name}: its recipe is damaged")
        file.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")
        self.refused(tmp_path, f"{file.name}: .* holds NaN or Inf")

    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_tensors_that_do_not_go_with_the_recipe(self, form, tmp_path):
        state, _ = one_layer(init_lora_weights="pissa")
        write_adapter(tmp_path, state, format=form)
        file = tmp_path / (NATIVE_FILE if form == "native" else ADAPTER_FILE)
        tensors = safetensors.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        key = next(k for k in tensors if "lora_A" in k)
        other = key.replace("block.1", "block.2")
        for change, match in (
            ({key: None}, "lora_A of 'block.1.q' is missing"),
            ({key: tensors[key][:3]}, "do not go together"),
            ({key: tensors[key].int()}, "is torch.int32, no floating-point"),
            ({key: tensors[key][None]}, "not those of a linear layer"),
            (
                {other: tensors[key] + 0, other.replace("A", "B"): tensors[key] + 1},
                "recipe of 'block.2.q'",
            ),
        ):
            changed = {k: v for k, v in (tensors | change).items() if v is not None}
            safetensors.save_file({k: v.contiguous() for k, v in changed.items()}, file, metadata)
            self.refused(tmp_path, match)

    def test_plain_files(self, tmp_path):
        pair = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
        for change, match in (
            ({"lora_A": None}, "lora_A of 'a.q' is missing"),
            ({"lora_B": None}, "lora_B of 'a.q' is missing"),
            ({"lora_A": torch.randn(3, 6)}, "do not go together"),
            (
                {"lora_A": torch.randn(3, 6), "lora_B": torch.randn(5, 3)},
                "has rank 3, the configuration says 2: they are not of one adapter",
            ),
            ({"lora_embedding_A": torch.randn(2, 6)}, "is no A or B of a linear layer: embeddings"),
            ({"lora_magnitude_vector": torch.randn(6)}, "DoRA and other variants"),
            ({"lora_A": torch.full((2, 6), math.inf)}, "holds NaN or Inf"),
            ({"lora_A": torch.zeros(2, 6, dtype=torch.int8)}, "is torch.int8, no floating"),
        ):
            tensors = {k: v for k, v in (pair | change).items() if v is not None}
            TestFromPeft.plain(tmp_path, tensors)
            self.refused(tmp_path, f"{ADAPTER_FILE}: .*{match}")
        for config, match in (
            ({"peft_type": "IA3"}, "peft_type is 'IA3': only 'LORA'"),
            ({"r": "2"}, "r must be an integer"),
            ({"lora_alpha": -1}, "lora_alpha must be positive"),
            ({"bias": "some"}, "unknown bias 'some'"),
            ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ):
            TestFromPeft.plain(tmp_path, **config)
            self.refused(tmp_path, match)
        (tmp_path / ADAPTER_CONFIG).write_text("{")
        self.refused(tmp_path, f"{ADAPTER_CONFIG} is no JSON")
        (tmp_path / ADAPTER_CONFIG).write_text("[]")
        self.refused(tmp_path, f"{ADAPTER_CONFIG} is no JSON object")
        (tmp_path / ADAPTER_CONFIG).unlink()
        self.refused(tmp_path, f"{ADAPTER_CONFIG} is missing beside it")

    def test_nothing_there(self, tmp_path):
        self.refused(tmp_path, "has no adapter_native.safetensors or", FileNotFoundError)
        self.refused(tmp_path / "no", "is no folder", FileNotFoundError)
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        self.refused(tmp_path, "adapter_model.bin is not read: save it", FileNotFoundError)

    def test_edited_configuration(self, tmp_path):
        """PEFT would compute with another s than this package."""
        state, _ = one_layer()
        write_adapter(tmp_path, state)
        written = peft_config(tmp_path)
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(written | {"lora_alpha": 1}))
        self.refused(tmp_path, r"says lora_alpha = 1, but this was saved with 16: it was edited")
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(written | {"revision": "x"}))
        assert_same(read_adapter(tmp_path), state)
        (tmp_path / ADAPTER_CONFIG).unlink()
        assert_same(read_adapter(tmp_path), state)

    def test_what_cannot_be_written(self, tmp_path):
        good, _ = one_layer()
        write_adapter(tmp_path, good)
        for change, match in (
            ({"lora_A": torch.full((4, 48), math.nan)}, "lora_A of 'block.1.q' holds NaN or Inf"),
            ({"lora_A": torch.zeros(0)}, "not those of a linear layer"),  # a shard of ZeRO-3
            ({"lora_B": torch.zeros(40, 3)}, "do not go together"),
            (
                {"lora_R": torch.zeros(3, 3)},
                r"lora_R of 'block.1.q' is \[3, 3\], expected \[4, 4\]",
            ),
        ):
            layers = {"block.1.q": replace(good.layers["block.1.q"], **change)}
            with pytest.raises(ValueError, match=match):
                write_adapter(tmp_path, replace(good, layers=layers))
        with pytest.raises(ValueError, match="has no layers"):
            write_adapter(tmp_path, replace(good, layers={}))
        with pytest.raises(ValueError, match=r"unknown format 'pefd'.*did you mean 'peft'"):
            write_adapter(tmp_path, good, format="pefd")
        with pytest.raises(ValueError, match=r"'n\.bias' holds NaN"):
            write_adapter(tmp_path, replace(good, extra={"n.bias": torch.tensor([math.nan])}))
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="is a file: give a folder"):
            write_adapter(tmp_path / "file", good)
        assert_same(read_adapter(tmp_path), good)


class Killed(BaseException):
    pass


class TestReplacing:
    """Old or new, and never some of each."""

    @pytest.fixture()
    def pair(self):
        return one_layer(init_lora_weights="loram")[0], one_layer(r=3, init_lora_weights="lora")[0]

    def test_other_files_stay(self, pair, tmp_path):
        folder = tmp_path / "out"
        write_adapter(folder, pair[0])
        (folder / "checkpoint-1").mkdir()
        for name in ("README.md", "optimizer.pt", "checkpoint-1/adapter_config.json"):
            (folder / name).write_text(name)
        for form in ("peft", "native", "peft"):
            for state in pair:
                write_adapter(folder, state, format=form)
                assert_same(read_adapter(folder), state)
                assert (folder / "checkpoint-1/adapter_config.json").exists()
                ours = {ADAPTER_CONFIG, NATIVE_FILE if form == "native" else ADAPTER_FILE}
                assert {p.name for p in folder.iterdir()} == ours | {
                    "README.md",
                    "optimizer.pt",
                    "checkpoint-1",
                }
        assert (folder / "README.md").read_text() == "README.md"
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("alone", [True, False], ids=["exchanged", "one by one"])
    def test_formats_replace_each_other(self, alone, pair, tmp_path):
        folder = tmp_path / "out"
        folder.mkdir()
        if not alone:
            (folder / "notes").write_text("mine")
        before = folder.stat().st_ino
        for form in ("peft", "native", "peft"):
            write_adapter(folder, pair[0], format=form)
            ours = {ADAPTER_CONFIG, NATIVE_FILE if form == "native" else ADAPTER_FILE}
            assert {p.name for p in folder.iterdir()} - {"notes"} == ours
        if not alone:
            assert folder.stat().st_ino == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_only_the_tensors_change(self, pair, tmp_path):
        """The usual case, a save at every so many steps: one rename, in the same folder."""
        write_adapter(tmp_path, pair[0])
        config = (tmp_path / ADAPTER_CONFIG).stat()
        pair[0].layers["block.1.q"].lora_A.add_(1.0)
        write_adapter(tmp_path, pair[0])
        now = (tmp_path / ADAPTER_CONFIG).stat()
        assert (config.st_ino, config.st_mtime_ns) == (now.st_ino, now.st_mtime_ns)
        assert_same(read_adapter(tmp_path), pair[0])

    @pytest.mark.parametrize("form", ["peft", "native"])
    @pytest.mark.parametrize("step", range(1, 7))
    def test_stopped_at_every_step(self, step, form, pair, tmp_path, monkeypatch):
        """Where the folder cannot be exchanged: PEFT finds no configuration rather than one that
        is not of the tensors, and this package reads one of the two.
        """
        old, new = pair
        folder = tmp_path / "out"
        write_adapter(folder, old)
        (folder / "notes").write_text("mine")
        steps = 0

        def stopping(method):
            def call(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == step:
                    raise Killed
                return method(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for method in ("replace", "unlink"):
                patch.setattr(Path, method, stopping(getattr(Path, method)))
            patch.setattr(_atomic, "_discard", lambda *_: None)
            try:
                write_adapter(folder, new, format=form)
            except Killed:
                pass
            else:
                assert steps < step
        got = read_adapter(folder)
        assert got.config in (old.config, new.config)
        assert_same(got, old if got.config == old.config else new)
        if (folder / ADAPTER_CONFIG).exists() and peft_config(folder)["peft_type"] == "LORA":
            pytest.importorskip("peft").PeftConfig.from_pretrained(folder)
            r = peft_config(folder)["r"]
            stored = safetensors.load_file(folder / ADAPTER_FILE)
            assert stored["base_model.model.block.1.q.lora_A.weight"].shape[0] == r
        write_adapter(folder, new, format=form)  # clears what was left
        assert len(list(folder.iterdir())) == 3 and len(list(tmp_path.iterdir())) == 1
        assert_same(read_adapter(folder), new)

    def test_a_stage_at_work_is_left_alone(self, pair, tmp_path):
        folder = tmp_path / "out"
        write_adapter(folder, pair[0])
        with _atomic._staged(tmp_path, folder, ()) as stage:
            write_adapter(folder, pair[1])
            assert stage.is_dir()
        assert not stage.exists()

    def test_disk_full(self, pair, tmp_path, monkeypatch):
        write_adapter(tmp_path, pair[0])

        def full(path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(_atomic, "_sync", full)
        with pytest.raises(OSError, match="No space left"):
            write_adapter(tmp_path, pair[1])
        assert_same(read_adapter(tmp_path), pair[0])
        assert len(list(tmp_path.iterdir())) == 2

    def test_symbolic_links_and_relative_paths(self, pair, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        for state in pair:
            write_adapter(tmp_path / "link", state)
        assert (tmp_path / "link").is_symlink()
        assert_same(read_adapter(tmp_path / "real"), pair[1])
        monkeypatch.chdir(tmp_path / "real")
        for state in pair:
            write_adapter(".", state)
            assert_same(read_adapter("."), state)  # the folder that we stand in is still there


# Forks a saver for each line it reads: importing torch anew for each would take minutes.
SAVERS = """
import os, sys
import torch
from lora_kernels.adapter_files import read_adapter, write_adapter
torch.set_num_threads(1)
states = [read_adapter(folder) for folder in sys.argv[2:4]]
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)
        continue
    turn = int(line)
    while True:
        write_adapter(sys.argv[1], states[turn % 2])
        if turn == int(line):
            print("saved", flush=True)
        turn += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kill_9(tmp_path):
    """50 savers that write two adapters over each other by turns, killed at a random moment: what
    is there is one of the two, to this package and to plain PEFT.
    """
    peft = pytest.importorskip("peft")
    states = [
        one_layer(init_lora_weights="loram")[0],
        one_layer(r=3, lora_alpha=24, init_lora_weights="lora")[0],
    ]
    base = nn.ModuleDict(
        {"block": nn.ModuleList([nn.Identity(), nn.ModuleDict({"q": nn.Linear(48, 40)})])}
    )
    want = []
    for index, state in enumerate(states):
        write_adapter(tmp_path / str(index), state)
        layer = state.layers["block.1.q"]
        right, left = layer.update_factors()
        want.append(layer.scaling * left @ right)
    folder = tmp_path / "out"
    command = [sys.executable, "-c", SAVERS, str(folder), str(tmp_path / "0"), str(tmp_path / "1")]
    generator = random.Random(0)
    seen = [0, 0]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as savers:
        assert savers.stdout.readline() == "ready\n"
        for turn in range(50):
            print(turn, file=savers.stdin, flush=True)
            child = int(savers.stdout.readline())
            assert savers.stdout.readline() == "saved\n"
            time.sleep(generator.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert savers.stdout.readline() == "ended\n"
            got = read_adapter(folder)
            index = 0 if got.config == states[0].config else 1
            assert_same(got, states[index])
            seen[index] += 1
            adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
            layer = adapted.base_model.model.block[1]["q"]
            delta = layer.get_delta_weight("default")
            # One product of rank 8 in float32, twice.
            assert (delta - want[index]).abs().max() <= 1e-5 * want[index].abs().max()
        savers.stdin.close()
    assert min(seen) >= 5
    write_adapter(folder, states[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "out"]
    assert sorted(p.name for p in folder.iterdir()) == [ADAPTER_CONFIG, ADAPTER_FILE]


def test_nothing_is_pickled(tmp_path):
    state, _ = one_layer()
    for form in ("peft", "native"):
        write_adapter(tmp_path, state, format=form)
        for file in tmp_path.iterdir():
            assert re.fullmatch(r"adapter_config\.json|.*\.safetensors", file.name)
