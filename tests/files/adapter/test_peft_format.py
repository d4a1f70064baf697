"""Adapters in folders that plain PEFT reads, and adapters that PEFT has written."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import (
    add_lora,
    load_adapter,
    save_adapter,
)
from lora_kernels._utils.names import pattern_matches
from lora_kernels._utils.peft_names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    GROUPS_OF_OPTIONS,
    OPTIONS_OF_VARIANTS,
    OPTIONS_WITHOUT_EFFECT,
    READ,
)
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
from lora_kernels.files.adapter.peft_format.writing import to_peft
from lora_kernels.init import get_initializer, initializer_names
from lora_kernels.model.config import AdapterState, LoRAConfig

from ...support.adapters import (
    GPT2_LAYERS,
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
    write_plain,
)
from ...support.exhaustive import paired
from ...support.oracle import to_numpy
from ...support.packages import needs_real_model

safetensors = pytest.importorskip("safetensors.torch")

# LoftQ's adapters are those of a base that it makes: tests/model/test_quantized.py has them.
NAMES = [n for n in initializer_names() if not get_initializer(n).rewrites_base]


# What each field of PEFT's LoraConfig does to a trained adapter: (option, value, why it is refused)
REFUSED = [
    ("alora_invocation_tokens", [3], "aLoRA"),
    ("use_qalora", True, "QA-LoRA"),
    ("megatron_config", {"a": 1}, "Megatron"),
    ("velora_config", {}, "VeLoRA"),
    ("monteclora_config", {}, "MonteCLoRA"),
    ("use_bdlora", {}, "BD-LoRA"),
    ("arrow_config", {}, "Arrow"),
    ("kasa_config", {}, "KaSA"),
]
# ... an option that changes nothing, and a value ...
IGNORED = {
    "auto_mapping": {"base_model_class": "A", "parent_library": "b"},
    "base_model_name_or_path": "some/base",
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 1.5},
    "fan_in_fan_out": True,
    "inference_mode": False,
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {"stable_gamma": 8},
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": "0.1",
    "qalora_group_size": 8,
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
}
# ... and options of `LoRAConfig` with the same meaning.
IMPLEMENTED = [
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias"),
    *("use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "task_type", "target_parameters"),
    *("use_dora", "ensure_weight_tying"),
]


class TestPlainPeft:
    """From the files, plain PEFT computes the adapted model on the original base."""

    @pytest.mark.parametrize(("name", "kind"), paired(NAMES, ["llama", "gpt2"]))
    def test_every_start(self, name, kind, tmp_path):
        model, names = tiny_model(kind), {"llama": LLAMA_LAYERS, "gpt2": GPT2_LAYERS}[kind]
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
    def test_scaling_rules_and_patterns(self, rule, tmp_path):
        """For layer 1 but not layer 11, and for layers that only full names can distinguish."""
        config = LoRAConfig(
            r=4,
            scaling=rule,
            lora_alpha=5.5,
            init_lora_weights="pissa",
            rank_pattern={r"1\.mlp\.up_proj": 7, "v_proj": 3},
            alpha_pattern={r"model\.layers\.0\.self_attn\.q_proj": 9},
        )
        state, deltas = adapt_model(tiny_model("llama"), LLAMA_LAYERS[1:], config)
        write_adapter(tmp_path, state)
        want = logits_64(tiny_model("llama"), deltas, IDS)
        assert_agree(peft_logits(tiny_model("llama"), tmp_path)[1], want)
        written = peft_config(tmp_path)
        assert not written["use_rslora"] and written["r"] == written["lora_alpha"] == 14
        assert written["rank_pattern"] == written["alpha_pattern"] == {}
        assert sorted(written["target_modules"]) == sorted(LLAMA_LAYERS[1:])

    @pytest.mark.parametrize("rule", ["lora", "rslora"])
    def test_engines_that_read_no_pattern(self, rule, tmp_path):
        """They compute one s from r and lora_alpha for all layers, and expect only A and B."""
        alphas = {"lora": {"k": 8}, "rslora": {"k": 16 / math.sqrt(2)}}[rule]
        config = LoRAConfig(
            r=4, lora_alpha=16, scaling=rule, rank_pattern={"k": 2}, alpha_pattern=alphas
        )
        layers, deltas = {}, {}
        for name in ("a.k", "a.q", "b.k", "b.q"):
            layers[name], deltas[name] = adapt(nn.Linear(24, 20), config, name)
        layers["a.k"] = replace(layers["a.k"], scaling=3.7)
        deltas["a.k"] *= 3.7 / config.layer_scaling("a.k")
        write_adapter(tmp_path, AdapterState(config, layers))
        written = peft_config(tmp_path)
        assert written["use_rslora"] is False and written["r"] == written["lora_alpha"] == 8
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        for name, delta in deltas.items():
            A, B = (tensors.pop(f"base_model.model.{name}.lora_{k}.weight") for k in "AB")
            assert A.shape[0] == B.shape[1] == 8
            assert np.linalg.norm(to_numpy(B) @ to_numpy(A) - delta) <= 1e-5 * np.linalg.norm(delta)
        assert not tensors

    def test_patterns_are_whole_names(self):
        """In the start beside a residual base, which PEFT trains with each layer's own s and r."""
        peft_key = pytest.importorskip("peft.utils.other").get_pattern_key
        config = LoRAConfig(r=4, init_lora_weights="lora", rank_pattern={"x": 1})
        names = ["1.q", "11.q", "a.1.q", "a.1xq", "a.x"]
        layers = {n: adapt(nn.Linear(8, 8), config, n)[0] for n in names}
        layers["1.q"] = adapt(nn.Linear(8, 8), replace(config, r=2), "1.q")[0]
        layers["a.1.q"] = adapt(nn.Linear(8, 8), replace(config, r=3), "a.1.q")[0]
        written, _ = to_peft(AdapterState(config, layers), portable=False)
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
            (["b.q"], ["b.q", "a.b.q"], ["b.q"]),
            (["b.q", "q"], ["b.q", "a.b.q", "q"], ["b.q", "q"]),
            (["q", "a.b.q"], ["q", "b.q", "a.b.q"], ["a.b.q", "q"]),
        ],
    )
    def test_targets_are_exactly_the_layers(self, names, modules, expected, tmp_path):
        tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
        from peft import LoraConfig

        state, _ = one_layer()
        state.layers = dict.fromkeys(names, state.layers["block.1.q"])
        write_adapter(tmp_path, state, module_names=modules)
        written = peft_config(tmp_path)
        assert written["target_modules"] == expected
        options = {key: written[key] for key in ("target_modules", "exclude_modules")}
        config = LoraConfig(**options)
        found = [m for m in modules if tuners_utils.check_target_module_exists(config, m)]
        assert sorted(found) == sorted(names)

    @pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
    def test_modules_in_full_and_biases(self, bias, tmp_path):
        model = tiny_model("gpt2")
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

    @pytest.mark.parametrize("saved", [["classifier"], ["pooler"], None])
    @pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", None])
    def test_tasks_whose_head_peft_looks_for(self, task, saved, tmp_path):
        """If the model lacks the head, the file has no task type, so that PEFT loads it."""
        model = tiny_model("bert")
        adapted = copy.deepcopy(model)
        config = LoRAConfig(r=2, target_modules=["query"], modules_to_save=saved, task_type=task)
        add_lora(adapted, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            save_adapter(adapted, tmp_path)
            assert_agree(peft_logits(model, tmp_path)[1], adapted(IDS).logits.double())
        has_head = task in ("SEQ_CLS", "TOKEN_CLS")
        if has_head and saved != ["classifier"]:
            config = replace(config, modules_to_save=[*(saved or ()), "classifier"])
        assert read_adapter(tmp_path).config == config
        assert peft_config(tmp_path)["task_type"] == (task if has_head else None)


class TestFromPeft:
    def make(self, model, folder, **options):
        """An adapter that PEFT made, trained and wrote, and its logits."""
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
    def test_what_peft_writes(self, kind, options, tmp_path):
        want = self.make(tiny_model(kind), tmp_path / "theirs", **options)
        state = read_adapter(tmp_path / "theirs")
        deltas = {
            name: layer.scaling * to_numpy(layer.lora_B) @ to_numpy(layer.lora_A)
            for name, layer in state.layers.items()
        }
        assert_agree(want, logits_64(tiny_model(kind), deltas, IDS, state.extra))
        assert not any(layer.changes_base for layer in state.layers.values())
        for option in ("bias", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"):
            assert (
                getattr(state.config, option)
                == getattr(LoRAConfig(**{option: options[option]}), option)
                if option in options
                else True
            )
        assert set(state.config.modules_to_save or ()) == set(options.get("modules_to_save", ()))
        modules = [n for n, _ in tiny_model(kind).named_modules()]
        write_adapter(tmp_path / "ours", state, module_names=modules, fan_in_fan_out=kind == "gpt2")
        adapted, got = peft_logits(tiny_model(kind), tmp_path / "ours")
        assert_agree(got, want.double())  # s is in B, rounded
        if options.get("bias", "none") == "none":  # PEFT trains those in the base itself
            with torch.no_grad(), adapted.disable_adapter():
                assert torch.equal(adapted(IDS).logits, tiny_model(kind)(IDS).logits)
        assert_same(read_adapter(tmp_path / "ours"), state)

    @pytest.mark.parametrize("option,value,reason", REFUSED)
    def test_options_of_variants(self, option, value, reason, tmp_path):
        write_plain(tmp_path, **{option: value})
        match = rf"{ADAPTER_FILE}: {option} = .*not implemented here: .*{reason}"
        with pytest.raises(ValueError, match=match):
            read_adapter(tmp_path)
        off = [None, False] if option in GROUPS_OF_OPTIONS else [None, False, []]
        for value in off:
            write_plain(tmp_path, **{option: value})
            read_adapter(tmp_path)

    def test_every_field_of_peft_is_known(self, tmp_path):
        """A new field of PEFT is missing in these lists until someone has looked at what it does;
        with its default, which every file has, adapters are read.
        """
        peft = pytest.importorskip("peft")
        fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
        lists = ([name for name, *_ in REFUSED], IGNORED, IMPLEMENTED)
        # Those of READ have tests of their own.
        assert fields == {name for names in lists for name in names} | set(READ)
        assert set(OPTIONS_OF_VARIANTS) | set(OPTIONS_WITHOUT_EFFECT) == fields - set(IMPLEMENTED)
        assert set(GROUPS_OF_OPTIONS) < set(OPTIONS_OF_VARIANTS)
        values = peft.LoraConfig(target_modules=["q"], r=2).to_dict()
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
        write_plain(tmp_path, **values | {"peft_type": "LORA"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_adapter(tmp_path).config.target_modules == ("q",)

    @pytest.mark.parametrize(
        "options,warned",
        [
            ({}, None),
            (IGNORED, None),
            ({"lora_dropout": 0.5, "exclude_modules": ["lm_head"]}, None),
            ({"ensure_weight_tying": True}, None),
            ({"ensure_weight_tying": True, "modules_to_save": ["norm"]}, None),
            ({"merge_weights": True, "enable_lora": None}, None),
            ({"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}, None),
            ({"unsloth_fixed": True}, None),
            ({"option_of_tomorrow": 3, "peft_version": "0.99"}, r"option_of_tomorrow \(it .* 0.99"),
        ],
    )
    def test_options_that_change_nothing(self, options, warned, tmp_path):
        """Neither in PEFT nor here."""
        base = tiny_model("llama")
        saved = options.get("modules_to_save")
        want = self.make(base, tmp_path, target_modules=["q_proj"], modules_to_save=saved)
        written = peft_config(tmp_path)
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(written | options))
        assert torch.equal(peft_logits(base, tmp_path, strict=False)[1], want)
        loaded = copy.deepcopy(base)
        with warnings.catch_warnings() if warned is None else pytest.warns(match=warned):
            if warned is None:
                warnings.simplefilter("error")
            load_adapter(loaded, tmp_path)
        assert_agree(loaded.eval()(IDS).logits, want.double())

    def test_ties(self, tmp_path):
        write_plain(tmp_path, ensure_weight_tying=True)
        assert read_adapter(tmp_path).config.ensure_weight_tying
        write_plain(tmp_path, ensure_weight_tying="yes")
        with pytest.raises(ValueError, match="ensure_weight_tying must be true or false"):
            read_adapter(tmp_path)

    @pytest.mark.parametrize("name", ["default", "my_adapter", "weight"])
    @pytest.mark.parametrize("whole", [False, True], ids=["trained", "whole model"])
    def test_a_state_dict_of_the_model(self, whole, name, tmp_path):
        """As accelerate and FSDP write it: with the adapter's name, or with the base too."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        adapted = peft.get_peft_model(copy.deepcopy(tiny_model("llama")), config, adapter_name=name)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
            want = adapted.eval()(IDS).logits
        adapted.save_pretrained(tmp_path)
        folder = tmp_path if name == "default" else tmp_path / name
        tensors = {
            key: tensor.detach().clone()
            for key, tensor in adapted.state_dict().items()
            if whole or "lora_" in key
        }
        safetensors.save_file(tensors, folder / ADAPTER_FILE)
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(tiny_model("llama")), folder, adapter_name=name
        )
        assert torch.equal(theirs.eval()(IDS).logits, want)
        loaded = copy.deepcopy(tiny_model("llama"))
        match = "file is that of a whole model"
        with pytest.warns(match=match) if whole else warnings.catch_warnings():
            load_adapter(loaded, folder)
        assert_agree(loaded.eval()(IDS).logits, want.double())
        if name == "default":
            more = {
                k.replace(".default.", ".b."): v + 1 for k, v in tensors.items() if "lora_" in k
            }
            safetensors.save_file(tensors | more, folder / ADAPTER_FILE)
            with pytest.raises(ValueError, match="tensors of b and default: keep one adapter"):
                read_adapter(folder)

    @pytest.mark.parametrize(
        "key,kind",
        [
            ("lora_magnitude_vector", "DoRA"),
            ("lora_magnitude_vector.default.weight", "DoRA"),
            ("lora_B.bias", "a bias of lora_B"),
            ("lora_B.default.bias", "a bias of lora_B"),
            ("lora_diag.default", "KaSA"),
            ("lora_monteclora_sampler.std_prior", "MonteCLoRA"),
            ("lora_velora_embed.default", "VeLoRA"),
            ("lora_E", "AdaLoRA"),
            ("lora_of_tomorrow.weight", "an unknown variant of LoRA"),
            ("token_adapter.trainable_tokens_delta", "rows of an embedding"),
        ],
    )
    def test_tensors_of_variants(self, key, kind, tmp_path):
        write_plain(tmp_path)
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        tensors[f"base_model.model.a.q.{key}"] = torch.zeros(2)
        safetensors.save_file(tensors, tmp_path / ADAPTER_FILE)
        match = f"'a.q.{key}' is not A or B of a linear layer or embedding: it belongs to {kind}"
        with pytest.raises(ValueError, match=match):
            read_adapter(tmp_path)

    @pytest.mark.parametrize("key", ["lora_embedding_A", "lora_embedding_B.default"])
    def test_factors_of_two_kinds(self, key, tmp_path):
        write_plain(tmp_path)
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        tensors[f"base_model.model.a.q.{key}"] = torch.zeros(2)
        safetensors.save_file(tensors, tmp_path / ADAPTER_FILE)
        match = "'a.q' has factors of a linear layer and of an embedding"
        with pytest.raises(ValueError, match=match):
            read_adapter(tmp_path)

    @pytest.mark.parametrize(
        "init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga"]
    )
    def test_starts_that_changed_the_base(self, init, tmp_path):
        write_plain(tmp_path, init_lora_weights=init)
        with pytest.raises(ValueError, match=f"'{init}': its factors belong to a base that PEFT"):
            read_adapter(tmp_path)
        assert read_adapter(tmp_path, residual_base=True).layers["a.q"].scaling == 4.0

    @pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
    def test_starts_that_did_not(self, init, tmp_path):
        write_plain(tmp_path, init_lora_weights=init)
        assert read_adapter(tmp_path).layers["a.q"].scaling == 4.0

    def test_which_starts_change_the_base(self):
        """The two lists above, compared with PEFT."""
        peft = pytest.importorskip("peft")
        target = "model.layers.0.self_attn.q_proj"
        weight = tiny_model("llama").get_submodule(target).weight
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
            adapted = peft.get_peft_model(copy.deepcopy(tiny_model("llama")), config)
            layer = adapted.base_model.model.get_submodule(target)
            changed = not torch.equal(layer.base_layer.weight, weight)
            assert changed == (str(init).startswith(("pissa", "olora"))), init

    def test_mica_and_unknown_starts(self, tmp_path):
        write_plain(tmp_path, init_lora_weights="mica")
        state = read_adapter(tmp_path)
        assert state.config.initializer.trains == state.layers["a.q"].trains == "A"
        fresh = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(6, 5)})})
        load_adapter(fresh, tmp_path, progress=False)
        assert fresh["a"]["q"].lora_A.requires_grad and not fresh["a"]["q"].lora_B.requires_grad
        write_plain(tmp_path, init_lora_weights="gausian")
        with pytest.raises(ValueError, match=r"'gausian': expected one of .*mean 'gaussian'"):
            read_adapter(tmp_path)

    def test_converted_pissa(self, tmp_path):
        """PEFT's own conversion gives a plain adapter, which can be read."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        adapted = peft.get_peft_model(copy.deepcopy(tiny_model("llama")), config)
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
        assert_agree(want, logits_64(tiny_model("llama"), deltas, IDS))


class TestWhatHurtsInPeft:
    """Problems that users of PEFT report: PEFT's behavior, and ours."""

    def adapted_by_peft(self, init, **options):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, **options)
        adapted = peft.get_peft_model(copy.deepcopy(tiny_model("llama")), config)
        return adapted

    def test_2_fast_pissa_reloads_right(self, tmp_path):
        """PEFT repeats an unseeded SVD when it loads pissa_niter_N; here the start is stored."""
        adapted = self.adapted_by_peft("pissa_niter_2")
        train(adapted, 1)
        adapted.save_pretrained(tmp_path / "theirs")
        ours = copy.deepcopy(tiny_model("llama"))
        config = LoRAConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        add_lora(ours, config)
        train(ours, 1)
        save_adapter(ours, tmp_path / "ours")
        with torch.no_grad():
            want = adapted(IDS).logits
            got = peft_logits(tiny_model("llama"), tmp_path / "theirs", strict=False)[1]
            assert (got - want).abs().max() > 1e-2 * want.abs().max()
            want = ours(IDS).logits
            assert_agree(peft_logits(tiny_model("llama"), tmp_path / "ours")[1], want.double())
            fresh = copy.deepcopy(tiny_model("llama"))
            load_adapter(fresh, tmp_path / "ours")
            assert torch.equal(fresh(IDS).logits, want)

    def test_5_no_folder_saved_beforehand_and_modules_are_kept(self, tmp_path):
        """PEFT's conversion needs the untrained adapter, and drops modules_to_save."""
        adapted = self.adapted_by_peft("pissa", modules_to_save=["norm"])
        adapted.save_pretrained(tmp_path / "start")
        train(adapted, 1)
        adapted.save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start"
        )
        stored = safetensors.load_file(tmp_path / "theirs" / ADAPTER_FILE)
        assert not any("norm" in key for key in stored)
        ours = copy.deepcopy(tiny_model("llama"))
        config = LoRAConfig(
            r=4, target_modules=["q_proj"], init_lora_weights="pissa", modules_to_save=["norm"]
        )
        add_lora(ours, config)
        train(ours, 1)
        save_adapter(ours, tmp_path / "ours")
        with torch.no_grad():
            want = ours(IDS).logits
        assert_agree(peft_logits(tiny_model("llama"), tmp_path / "ours")[1], want.double())
        small = save_adapter(ours, tmp_path / "small", compress_to=4)
        assert peft_config(tmp_path / "small")["r"] == 4 and 0 < small.error < 1
        fresh = copy.deepcopy(tiny_model("llama"))
        load_adapter(fresh, tmp_path / "small")
        with torch.no_grad():
            want = fresh(IDS).logits
        assert_agree(peft_logits(tiny_model("llama"), tmp_path / "small")[1], want.double())


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
