"""Whole models: add, train, switch, merge and unload, with PEFT as the peer for the rules."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    capture_gradients,
    disable_adapters,
    enable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import LoRAM, get_initializer, initializer_names
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state, apply_state

from ..support.models import logits, quiet, token_ids, train, training_arguments
from ..support.packages import needs_transformers
from ..support.tiny_models import bert, falcon, gpt2, llama, mamba

pytestmark = needs_transformers

NAMES = [n for n in initializer_names() if n != "loftq"]
STARTS_AS_BASE = [n for n in NAMES if n not in ("init_ab_plus", "lora_one", "lora_sb", "lora_xs")]
# Float64 models: what is left is the rounding of some ten layers, on logits of size 1.
TIGHT = 1e-11


def gradients_for(model, config):
    if not config.initializer.needs_gradient:
        return None
    ids = token_ids().to(next(model.parameters()).device)
    batches = [{"input_ids": ids, "labels": ids}]
    return capture_gradients(model, batches, progress=False)


def everything(model) -> dict:
    """All that an error must leave as it was."""
    return {
        "modules": {n: type(m) for n, m in model.named_modules()},
        "tensors": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "adapters": adapter_names(model),
    }


def assert_unchanged(model, before) -> None:
    after = everything(model)
    assert after["modules"] == before["modules"]
    assert after["trains"] == before["trains"]
    assert after["adapters"] == before["adapters"]
    assert all(torch.equal(after["tensors"][n], t) for n, t in before["tensors"].items())


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("residual", ["auto", "implicit"])
@pytest.mark.parametrize("name", NAMES)
def test_life_of_a_model(make, residual, name, tmp_path, device):
    """Start, train, off, on, save, load, merge, unload: all against the base and each other."""
    model = make(dtype=torch.float64).to(device)
    base = logits(model)
    config = LoRAConfig(r=4, lora_alpha=6, init_lora_weights=name, residual=residual)
    quiet(model, config, gradients=gradients_for(model, config))
    start = logits(model)
    if name in STARTS_AS_BASE:
        assert (start - base).abs().max() <= TIGHT
    assert train(model)[-1] > 0
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-6
    with disable_adapters(model):
        off = logits(model)
    assert (off - base).abs().max() <= TIGHT
    if residual == "implicit" or not config.initializer.changes_base:
        assert torch.equal(off, base)
    assert torch.equal(logits(model), trained)

    fresh = make(dtype=torch.float64).to(device)
    save_adapter(model, tmp_path / "native", format="native")
    load_adapter(fresh, tmp_path / "native", progress=False)
    assert torch.equal(logits(fresh), trained)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )

    merged = merge_lora(copy.deepcopy(model))
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in make().named_modules()
    }
    assert (logits(merged) - trained).abs().max() <= TIGHT
    assert unload_lora(model) is model
    assert (logits(model) - base).abs().max() <= TIGHT
    assert not adapted_layers(model)
    assert list(model.state_dict()) == list(make().state_dict())


RULES = {
    "endings": {"target_modules": ["q_proj", "down_proj", "c_attn"]},
    "a path": {"target_modules": ["mlp.up_proj", "mlp.c_proj"]},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "transformer.h.1.mlp.c_fc"]},
    "regex": {"target_modules": r".*\.(0)\..*(proj|c_fc)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded endings": {
        "target_modules": ["up_proj", "q_proj", "c_fc"],
        "exclude_modules": ["up_proj", "c_proj"],
    },
    "excluded regex": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "a block": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": 1},
    "blocks": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0, 1]},
    "a named block": {
        "target_modules": ["q_proj", "c_fc"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers", "h"],
    },
    "the head too": {"target_modules": ["lm_head", "q_proj", "c_fc"]},
    "saved": {"target_modules": "all-linear", "modules_to_save": ["mlp", "lm_head"]},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3, "c_attn": 2},
        "alpha_pattern": {"down_proj": 5, "q_proj": 3, r"h\.0\.mlp\.c_proj": 7},
    },
}


def only_what_is_there(rule, model) -> dict:
    """Without the entries of the other family, which PEFT passes over and we refuse."""
    names = [n for n, _ in model.named_modules()]
    rule = copy.deepcopy(rule)
    for key, value in rule.items():
        if isinstance(value, list) and key in ("target_modules", "exclude_modules"):
            rule[key] = [v for v in value if any(n == v or n.endswith(f".{v}") for n in names)]
        if isinstance(value, dict):
            import re

            rule[key] = {
                k: v for k, v in value.items() if any(re.match(rf"(.*\.)?({k})$", n) for n in names)
            }
    if rule.get("exclude_modules") == []:
        del rule["exclude_modules"]
    return rule


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("rule", list(RULES))
def test_layers_ranks_and_scalings_are_those_of_peft(make, rule):
    peft = pytest.importorskip("peft")
    rule = only_what_is_there(RULES[rule], make())
    options = {"r": 4, "lora_alpha": 6, **rule}
    model = make()
    report = quiet(model, LoRAConfig(init_lora_weights="lora", **options))
    ours = {
        n: (layer.r, layer.scaling, tuple(layer.lora_A.shape), tuple(layer.lora_B.shape))
        for n, layer in adapted_layers(model).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_model = peft.get_peft_model(make(), peft.LoraConfig(**options))
    theirs = {}
    for name, module in theirs_model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            theirs[name] = (module.r["default"], module.scaling["default"], A.shape, B.shape)
    assert ours == {n: (r, s, tuple(a), tuple(b)) for n, (r, s, a, b) in theirs.items()}
    assert [row.name for row in report.adapted] == list(ours)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert own == sum(p.numel() for p in theirs_model.parameters() if p.requires_grad)


class TestSeveralAdapters:
    def test_each_is_what_it_is_alone(self):
        base = logits(llama(dtype=torch.float64))
        configs = {
            "first": LoRAConfig(r=4, init_lora_weights="loram", residual="implicit"),
            "second": LoRAConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]),
            "third": LoRAConfig(r=3, init_lora_weights="lora", lora_alpha=16, bias="all"),
        }
        alone = {}
        for name, config in configs.items():
            model = llama(dtype=torch.float64)
            torch.manual_seed(5)
            quiet(model, LoRAConfig(**{**vars(config), "residual": "implicit"}))
            train(model)
            alone[name] = logits(model)
        together = llama(dtype=torch.float64)
        for name, config in configs.items():
            torch.manual_seed(5)
            quiet(together, config, adapter_name=name)
            assert (logits(together) - base).abs().max() <= TIGHT
            train(together)
        assert adapter_names(together) == list(configs)
        for name in ("second", "first", "third"):
            set_adapter(together, name)
            assert (logits(together) - alone[name]).abs().max() <= TIGHT
            training = {n for n, p in together.named_parameters() if p.requires_grad}
            expected = len(adapter_state(together).layers) * 2
            assert len(training) == expected
            with disable_adapters(together):
                assert torch.equal(logits(together), base)
        set_adapter(together, "second")
        assert (logits(merge_lora(together)) - alone["second"]).abs().max() <= TIGHT

    def test_a_base_that_lacks_a_start_takes_no_other(self):
        model = llama()
        quiet(model, LoRAConfig(r=4))
        before = everything(model)
        with pytest.raises(
            ValueError,
            match=r"'default' of .*q_proj was added with residual='absorb'.*implicit",
        ):
            quiet(model, LoRAConfig(r=4, residual="implicit"), adapter_name="b")
        assert_unchanged(model, before)

    def test_names(self):
        model = llama()
        quiet(model, LoRAConfig(r=2, residual="implicit"))
        with pytest.raises(ValueError, match="has an adapter 'default' already"):
            quiet(model, LoRAConfig(r=2, residual="implicit"))
        for name in ("", "a.b", "forward", "keys"):
            with pytest.raises(ValueError, match="adapter_name cannot be"):
                quiet(model, LoRAConfig(r=2, residual="implicit"), adapter_name=name)
        with pytest.raises(ValueError, match=r"unknown adapter 'defualt'.*did you mean 'default'"):
            set_adapter(model, "defualt")


class Twice(nn.Module):
    """One layer under two names, two layers with one weight, and one block in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.tied = nn.Linear(12, 12)
        self.partner = nn.Linear(12, 12)
        self.partner.weight = self.tied.weight
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh())] * 2)

    def forward(self, x):
        x = self.again(torch.tanh(self.first(x)))
        x = self.partner(torch.tanh(self.tied(x)))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["loram", "pissa"])
def test_shared_layers_and_weights(name):
    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(3, 12, dtype=torch.float64)
    base = model(x)
    report = quiet(model, LoRAConfig(r=2, init_lora_weights=name))
    rows = {row.name: row for row in report.adapted}
    assert list(rows) == ["first", "tied", "partner", "blocks.0.0"]
    assert rows["first"].aliases == ("again",) and rows["blocks.0.0"].aliases == ("blocks.1.0",)
    assert model.again is model.first and model.blocks[0] is model.blocks[1]
    assert {n: row.residual for n, row in rows.items()} == {
        "first": "absorb",
        "tied": "implicit",
        "partner": "implicit",
        "blocks.0.0": "absorb",
    }
    assert "partner.weight too" in rows["tied"].note
    assert (model(x) - base).abs().max() <= TIGHT
    with pytest.raises(
        ValueError, match=r"tied cannot absorb its start, its weight is partner\.weight"
    ):
        quiet(Twice(), LoRAConfig(r=2, residual="absorb"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    trained = model(x)
    merged = merge_lora(copy.deepcopy(model))
    assert (merged(x) - trained).abs().max() <= TIGHT
    assert merged.again is merged.first
    unload_lora(model)
    assert (model(x) - base).abs().max() <= TIGHT
    assert model.partner.weight is model.tied.weight and model.again is model.first


@pytest.mark.parametrize("merged", [True, False])
def test_a_tied_head(merged, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama(tied=True)
    base = logits(model)
    report = quiet(model, LoRAConfig(r=4, target_modules=["lm_head", "q_proj"]))
    assert [row.residual for row in report.adapted].count("implicit") == 1
    train(model)
    trained = logits(model)
    if merged:
        merge_lora(model).save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert (logits(again) - trained).abs().max() <= 1e-5
    else:
        unload_lora(model)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert (logits(model) - base).abs().max() <= 1e-5


class TestTrainedInFull:
    @pytest.mark.parametrize("tied", [False, True])
    def test_modules_to_save(self, tied, tmp_path):
        model = llama(tied=tied, dtype=torch.float64)
        base, embedding = logits(model), model.get_input_embeddings().weight.clone()
        config = LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
        report = quiet(model, config)
        assert report.saved == ("model.norm.weight", "lm_head.weight")
        assert (logits(model) - base).abs().max() <= TIGHT
        train(model)
        trained = logits(model)
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert not torch.equal(
            model.lm_head.weight, llama(tied=tied, dtype=torch.float64).lm_head.weight
        )
        with disable_adapters(model):
            assert (logits(model) - base).abs().max() <= TIGHT
        assert torch.equal(logits(model), trained)
        for format in ("peft", "native"):
            fresh = llama(tied=tied, dtype=torch.float64)
            save_adapter(model, tmp_path / format, format=format)
            load_adapter(fresh, tmp_path / format, progress=False)
            # PEFT's files are in float32.
            assert (logits(fresh) - trained).abs().max() <= (1e-5 if format == "peft" else 0)
        unload_lora(model)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert (logits(model) - base).abs().max() <= TIGHT

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases(self, bias):
        model = gpt2(dtype=torch.float64)
        base = logits(model)
        quiet(model, LoRAConfig(r=2, target_modules=["c_attn"], bias=bias))
        names = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
        every = {n for n, _ in gpt2().named_parameters() if n.endswith("bias")}
        assert names == (every if bias == "all" else {n for n in every if "c_attn" in n})
        train(model)
        trained = logits(model)
        assert (trained - base).abs().max() > 1e-3
        with disable_adapters(model):
            assert (logits(model) - base).abs().max() <= TIGHT
        merged = merge_lora(copy.deepcopy(model))
        assert (logits(merged) - trained).abs().max() <= TIGHT

    def test_misspelt(self):
        with pytest.raises(ValueError, match=r"'lm_haed', which modules_to_save.*'lm_head'"):
            quiet(llama(), LoRAConfig(r=2, modules_to_save=["lm_haed"]))


def zero_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()


def bad_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan


ERRORS = [
    (zero_weight, {}, ValueError, r"layers\.1\.mlp\.down_proj: weight is zero"),
    (bad_weight, {}, ValueError, r"layers\.1\.mlp\.down_proj: .*NaN"),
    (bad_weight, {"init_lora_weights": "pissa"}, ValueError, r"layers\.1\.mlp\.down_proj: .*NaN"),
    (None, {"r": 17}, ValueError, r"r = 17 is larger than min\(out, in\) = 16 of .*k_proj"),
    (None, {"target_modules": ["q_porj"]}, ValueError, "'q_porj'.*did you mean 'q_proj'"),
    (None, {"target_modules": "q_proj"}, ValueError, "regular expression 'q_proj'"),
    (None, {"target_modules": ["norm"]}, TypeError, "'model.norm', a LlamaRMSNorm"),
    (None, {"exclude_modules": ["q_porj"]}, ValueError, "exclude_modules.*'q_proj'"),
    (None, {"exclude_modules": ".*"}, ValueError, "no layer .* is left to adapt"),
    (None, {"rank_pattern": {"q_porj": 2}}, ValueError, "rank_pattern has 'q_porj'.*'q_proj'"),
    (None, {"alpha_pattern": {"head": 2}}, ValueError, "alpha_pattern has 'head'"),
    (None, {"layers_to_transform": [0, 7]}, ValueError, "names block 7.* 0 to 1"),
    (None, {"init_lora_weights": "lora_ga"}, ValueError, "gradients=capture_gradients"),
]


@pytest.mark.parametrize("spoil,options,error,message", ERRORS)
def test_errors_change_nothing(spoil, options, error, message):
    model = llama()
    if spoil:
        spoil(model)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        quiet(model, LoRAConfig(**{"r": 4, **options}))
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0, equal_nan=True)
    assert adapter_names(model) == []


class TestWrongCalls:
    def test_no_adapters(self):
        for function in (merge_lora, unload_lora, disable_adapters, enable_adapters, adapter_state):
            with pytest.raises(ValueError, match="has no adapters: add_lora"):
                function(llama())

    def test_other_things(self):
        peft = pytest.importorskip("peft")
        with pytest.raises(TypeError, match="config must be a LoRAConfig, got dict"):
            quiet(llama(), {"r": 4})
        with pytest.raises(TypeError, match=r"lora_kernels\.peft\.initialize"):
            quiet(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])))
        with pytest.raises(TypeError, match=r"use LoRALinear\.from_linear"):
            quiet(nn.Linear(8, 8))
        with pytest.raises(TypeError, match="before it is wrapped"):
            quiet(torch.compile(llama()))
        with pytest.raises(ValueError, match="has no use for gradients"):
            quiet(llama(), LoRAConfig(r=2), gradients={})

    def test_gradients_of_other_layers(self):
        model, config = llama(), LoRAConfig(r=2, init_lora_weights="lora_ga")
        gradients = gradients_for(model, config)
        del gradients["model.layers.1.mlp.up_proj"]
        with pytest.raises(ValueError, match=r"none for model\.layers\.1\.mlp\.up_proj"):
            quiet(model, config, gradients=gradients)

    def test_a_state_that_does_not_fit(self):
        model = llama()
        quiet(model, LoRAConfig(r=2))
        state = adapter_state(model)
        other = gpt2()
        with pytest.raises(
            ValueError, match=r"layers\.0\.self_attn\.q_proj.* no linear layer of this GPT2"
        ):
            apply_state(other, state, progress=False)
        assert not adapted_layers(other)


class TestWhatSurvives:
    def test_hooks_and_attributes(self):
        model = llama()
        linear = model.model.layers[0].self_attn.q_proj
        calls = []
        handle = linear.register_forward_hook(lambda *args: calls.append("after"))
        linear.register_forward_pre_hook(lambda *args: calls.append("before"))
        linear._hf_something = "kept"
        quiet(model, LoRAConfig(r=4))
        layer = model.model.layers[0].self_attn.q_proj
        assert layer._hf_something == "kept"
        logits(model)
        assert calls == ["before", "after"]
        handle.remove()
        logits(model)
        assert calls == ["before", "after", "before"]
        for back in (merge_lora, unload_lora):
            plain = back(copy.deepcopy(model)).model.layers[0].self_attn.q_proj
            assert type(plain) is nn.Linear and plain._hf_something == "kept"
            assert len(plain._forward_pre_hooks) == 1
            assert not hasattr(plain, "scaling") and not hasattr(plain, "adapter_name")

    def test_accelerates_hook(self):
        hooks = pytest.importorskip("accelerate.hooks")

        class Doubles(hooks.ModelHook):
            def post_forward(self, module, output):
                return output * 2

        model = llama(dtype=torch.float64)
        for layer in model.model.layers:
            hooks.add_hook_to_module(layer.self_attn.v_proj, Doubles())
        base = logits(model)
        quiet(model, LoRAConfig(r=4))
        assert (logits(model) - base).abs().max() <= TIGHT
        train(model)
        trained = logits(model)
        assert (logits(merge_lora(model)) - trained).abs().max() <= TIGHT
        assert isinstance(model.model.layers[0].self_attn.v_proj._hf_hook, Doubles)

    def test_a_replaced_forward_is_refused(self):
        model = llama()
        linear = model.model.layers[0].self_attn.q_proj
        linear.forward = lambda x: x
        with pytest.raises(TypeError, match="q_proj"):
            quiet(model, LoRAConfig(r=4, target_modules=["q_proj"]))

    def test_base_is_frozen_and_mode_kept(self):
        model = llama().train()
        quiet(model, LoRAConfig(r=4))
        training = {n for n, p in model.named_parameters() if p.requires_grad}
        assert training and all(n.endswith((".lora_A", ".lora_B")) for n in training)
        assert all(layer.training for layer in adapted_layers(model).values())

    def test_deepcopy_and_pickle(self):
        model = llama()
        quiet(model, LoRAConfig(r=4, modules_to_save=["lm_head"]))
        train(model)
        want = logits(model)
        copied = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        for other in (copied, pickled):
            with disable_adapters(other):
                assert not torch.equal(logits(other), want)
            assert torch.equal(logits(other), want)
        train(copied)
        assert torch.equal(logits(model), want)

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_state_dict(self, residual):
        model, other = llama(), llama(seed=7)
        config = LoRAConfig(r=4, residual=residual)
        quiet(model, config)
        quiet(other, config)
        train(model)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer))
        assert torch.equal(logits(other), logits(model))
        with disable_adapters(other), disable_adapters(model):
            assert torch.equal(logits(other), logits(model))
        one, two = adapter_state(model), adapter_state(other)
        for name, layer in one.layers.items():
            assert layer.beta == two.layers[name].beta is not None


@pytest.mark.parametrize("mask", [False, True])
def test_torchs_encoder_does_not_pass_the_adapters_by(mask):
    """Its fast path reads the weights themselves, in eval mode without gradients."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]]) if mask else None
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    report = quiet(model, LoRAConfig(r=2))
    assert report.skipped["layers.0.self_attn.out_proj"].startswith("its forward")
    with torch.no_grad():
        for adapted in adapted_layers(model).values():
            adapted.lora_B.add_(0.3)
    trained = model(x, src_key_padding_mask=padding)
    assert trained.requires_grad
    kept = ~padding if mask else torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        off_the_fast_path = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(off_the_fast_path[kept], trained[kept], rtol=0, atol=1e-6)
        assert (trained - base)[kept].abs().max() > 1e-2
        unload_lora(model)
        assert model.layers[0].activation_relu_or_gelu == 1
        restored = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(restored[kept], base[kept], rtol=0, atol=1e-5)


def test_disable_is_a_switch_and_a_block():
    model = llama(dtype=torch.float64)
    base = logits(model)
    quiet(model, LoRAConfig(r=4))
    train(model)
    trained = logits(model)
    disable_adapters(model)
    assert (logits(model) - base).abs().max() <= TIGHT
    with disable_adapters(model):
        pass
    assert (logits(model) - base).abs().max() <= TIGHT
    enable_adapters(model)
    assert torch.equal(logits(model), trained)


class TestWithTransformers:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_trainer_trains_and_resumes(self, checkpointing, tmp_path):
        pytest.importorskip("accelerate")
        from transformers import Trainer

        data = [{"input_ids": row, "labels": row} for row in token_ids(8)]
        config = LoRAConfig(r=4, lora_dropout=0.1, init_lora_weights=LoRAM())
        runs = []
        for resume in (None, str(tmp_path / "checkpoint-2")):
            model = llama()
            quiet(model, config)
            options = training_arguments(tmp_path, gradient_checkpointing=checkpointing)
            trainer = Trainer(model, options, train_dataset=data)
            trainer.train(resume_from_checkpoint=resume)
            runs.append(model)
        for one, two in zip(*(run.parameters() for run in runs), strict=True):
            assert torch.equal(one, two)

    def test_generate(self):
        model = llama()
        quiet(model, LoRAConfig(r=4))
        train(model, lr=0.1)
        options = {"max_new_tokens": 6, "do_sample": False}
        tokens = model.generate(token_ids(1, 4), **options)
        assert torch.equal(tokens, merge_lora(model).generate(token_ids(1, 4), **options))

    def test_compile(self):
        model = llama()
        base = logits(model)
        quiet(model, LoRAConfig(r=4))
        compiled = torch.compile(model, fullgraph=True)
        assert (logits(compiled) - base).abs().max() <= 1e-5
        with disable_adapters(compiled):
            assert (logits(compiled) - base).abs().max() <= 1e-5

    def test_reentrant_checkpointing(self):
        losses = []
        for reentrant in (None, False, True):
            model = llama().train()
            quiet(model, LoRAConfig(r=4))
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            losses.append(train(model))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert losses[0] == pytest.approx(losses[2], rel=1e-6)


class TestPeculiarModels:
    """Of transformers, where a layer is not what its class says."""

    def test_falcon(self):
        """FalconLinear has a forward of its own, which is that of nn.Linear."""
        model = falcon(torch.float64)
        base = logits(model)
        assert len(quiet(model, LoRAConfig(r=4)).adapted) == 8
        assert (logits(model) - base).abs().max() <= TIGHT
        train(model)
        trained = logits(model)
        assert (logits(merge_lora(model)) - trained).abs().max() <= TIGHT
        assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"

    def test_mamba(self):
        """Its mixer reads the weights of some layers past them."""
        model = mamba(torch.float64)
        base = logits(model)
        with pytest.raises(
            ValueError, match=r"dt_proj', but its MambaMixer reads the weight directly"
        ):
            quiet(model, LoRAConfig(r=2, target_modules=["dt_proj"]))
        report = quiet(model, LoRAConfig(r=2))
        assert {row.name.rpartition(".")[2] for row in report.adapted} == {"in_proj"}
        assert "without calling the layer" in report.skipped["backbone.layers.0.mixer.out_proj"]
        assert (logits(model) - base).abs().max() <= TIGHT

    @pytest.mark.parametrize("explicit", [False, True])
    def test_the_head_of_a_task(self, explicit, tmp_path):
        """It trains in full, as with PEFT, which takes the adapter."""
        peft = pytest.importorskip("peft")
        model = bert()
        fresh = copy.deepcopy(model)
        saved = ["classifier"] if explicit else None
        report = quiet(model, LoRAConfig(r=4, task_type="SEQ_CLS", modules_to_save=saved))
        assert report.saved == ("classifier.weight", "classifier.bias")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save_adapter(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path)
        assert type(theirs).__name__ == "PeftModelForSequenceClassification"
        ids = token_ids()
        with torch.no_grad():
            ours, theirs = model(ids).logits, theirs(input_ids=ids).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_report():
    model = llama()
    report = quiet(
        model, LoRAConfig(r=4, target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.1\..*")
    )
    text = str(report)
    assert "2 layers" in text and "model.layers.*.mlp.up_proj [48, 32]: r=4, s=2, absorb" in text
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{100 * report.trainable_share:.2f} %" in text
    assert report.skipped["lm_head"] == "not among target_modules"
    assert report.skipped["model.layers.1.mlp.up_proj"] == "in exclude_modules"


def test_a_base_that_lacks_its_start_is_noticed(tmp_path):
    """An adapter on the base of another one, which PEFT takes without a word."""
    model = llama()
    quiet(model, LoRAConfig(r=8, init_lora_weights="pissa"))
    save_adapter(model, tmp_path)
    residual = llama()
    for name, layer in adapted_layers(model).items():
        residual.get_submodule(name).weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.warns(UserWarning, match="another base, or one from which a start was subtracted"):
        load_adapter(residual, tmp_path, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(), tmp_path, progress=False)


def test_starts_of_a_model_are_those_of_its_layers():
    model, alone = llama(), llama()
    quiet(model, LoRAConfig(r=4, lora_alpha=12))
    for name, layer in adapted_layers(model).items():
        one = LoRALinear.from_linear(alone.get_submodule(name), r=4, lora_alpha=12)
        assert torch.equal(layer.lora_A, one.lora_A) and torch.equal(layer.lora_B, one.lora_B)
        torch.testing.assert_close(layer.weight, one.weight, rtol=0, atol=1e-7)


def test_every_name_is_an_initialiser_of_the_config():
    for name in initializer_names():
        assert LoRAConfig(init_lora_weights=name).initializer == get_initializer(name)
    assert LoRAConfig(init_lora_weights=True).initializer == get_initializer("lora")
