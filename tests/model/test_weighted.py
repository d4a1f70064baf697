"""`add_weighted_adapter`, against its formulas in float64 and against PEFT's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    adapter_names,
    adapters_per_row,
    add_weighted_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
)
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state
from tests.support.packages import needs_peft
from tests.support.running import logits, move, quiet, snapshot, token_ids

WEIGHTS = [0.7, -1.3]
TYPES = ("svd", "cat", "linear")


def tiny(kind="llama", **options):
    from tests.support import tiny_models

    return getattr(tiny_models, kind)(**options)


def adapted(model, ranks=(3, 3), starts=("lora", "lora"), **options):
    """With adapters "a" and "b"."""
    options = {"residual": "implicit", "target_modules": ["q_proj", "up_proj"]} | options
    for name, r, start in zip("ab", ranks, starts, strict=True):
        config = LoRAConfig(r=r, lora_alpha=5, init_lora_weights=start, **options)
        quiet(model, config, adapter_name=name)
        move(model, 0.2, seed=ord(name))
    return model.eval()


def deltas(model, name):
    """Each layer's update of the original base, float64, from the definition."""
    found = {}
    for path, layer in adapter_state(model, name).layers.items():
        middle = layer.middle()
        A, B = layer.lora_A.double(), layer.lora_B.double()
        update = B @ A if middle is None else B @ middle.double() @ A
        start = layer.start_factors()
        if start is not None:
            update = update - start[1].double() @ start[0].double()
        found[path] = layer.scaling * update
    return found


def truncated(delta, r):
    U, S, Vh = np.linalg.svd(delta.numpy())
    S[..., r:] = 0
    k = S.shape[-1]
    return (U[..., :k] * S[..., None, :]) @ Vh[..., :k, :]


def expected_sum(model, weights=WEIGHTS):
    parts = [deltas(model, name) for name in "ab"]
    return {
        path: sum(w * own[path] for w, own in zip(weights, parts, strict=True) if path in own)
        for path in parts[0] | parts[1]
    }


@pytest.mark.parametrize("start", ["lora", "loram", "pissa", "kasa"])
def test_svd_and_cat_are_the_weighted_sum(start):
    model = adapted(tiny(), ranks=(3, 2), starts=(start, "lora"))
    want = expected_sum(model)
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "cat", "cat")
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "svd")
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "one", svd_rank=1)
    rank = adapter_state(model, "svd").config.r
    assert rank == (3 if start == "lora" else max(2, adapter_state(model, "cat").config.r - 2))
    for path, delta in want.items():
        scale = float(delta.abs().max())
        for name, r in (("cat", None), ("svd", rank), ("one", 1)):
            got = deltas(model, name)[path]
            wanted = delta if r is None else torch.tensor(truncated(delta, r))
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6 * scale)


def test_linear_follows_its_formula():
    model = adapted(tiny())
    states = {name: adapter_state(model, name).layers for name in "ab"}
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", "linear")
    for path, new in adapter_state(model, "c").layers.items():
        A = B = 0
        for name, weight in zip("ab", WEIGHTS, strict=True):
            own = states[name][path]
            root = np.sqrt(abs(weight * own.scaling))
            A = A + np.sign(weight) * root * own.lora_A.double()
            B = B + root * own.lora_B.double()
        assert (new.r, new.scaling) == (3, 1.0)
        torch.testing.assert_close(new.lora_A.double(), A, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(new.lora_B.double(), B, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("start", ["lora", "loram"])
@pytest.mark.parametrize("kind", TYPES)
def test_one_adapter_is_scaled_exactly(kind, start):
    model = adapted(tiny(), starts=(start, "lora"))
    want = deltas(model, "a")
    add_weighted_adapter(model, ["a"], [-0.5], "c", kind, svd_rank=1)
    for path, delta in deltas(model, "c").items():
        torch.testing.assert_close(delta, -0.5 * want[path], rtol=1e-5, atol=1e-6)


CASES = {
    "linear layers": {"target_modules": ["q_proj", "up_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "Conv1D": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "patterns": {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"q_proj": 2}},
}


@needs_peft
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_peft(kind, case, tmp_path):
    from peft import LoraConfig, get_peft_model

    family = "gpt2" if case == "Conv1D" else "llama"
    ranks = (3, 3) if kind == "linear" else (3, 2)
    options = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "lora_alpha": 5}
    configs = [LoraConfig(r=r, **options | CASES[case]) for r in ranks]
    if kind == "linear" and case == "patterns":
        configs[1].rank_pattern = dict(configs[0].rank_pattern)
    theirs = get_peft_model(tiny(family), configs[0], "a")
    theirs.add_adapter("b", configs[1])
    theirs.save_pretrained(tmp_path)
    ours = tiny(family)
    for name in "ab":
        load_adapter(ours, tmp_path / name, adapter_name=name, progress=False)
    add_weighted_adapter(ours.eval(), ["a", "b"], WEIGHTS, "c", kind)
    theirs.base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", kind)
    assert adapter_state(ours, "c").config.r == theirs.peft_config["c"].r
    set_adapter(ours, "c")
    theirs.set_adapter("c")
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-5, atol=1e-5)


def test_layers_of_some_adapters_and_what_they_train_in_full():
    model = tiny("gpt2")
    quiet(
        model,
        LoRAConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_f"], residual="implicit"),
        adapter_name="a",
    )
    move(model, 0.1)
    saved = model.transformer.ln_f.weight.detach().clone()
    quiet(
        model,
        LoRAConfig(r=2, target_modules="all-linear", residual="implicit", layers_to_transform=1),
        adapter_name="b",
    )
    move(model, 0.1, seed=1)
    want = expected_sum(model)
    add_weighted_adapter(model, ["b", "a"], WEIGHTS[::-1], "c", "cat")
    assert adapter_state(model, "c").layers.keys() == want.keys()
    for path, delta in deltas(model, "c").items():
        torch.testing.assert_close(delta, want[path], rtol=1e-5, atol=1e-6)
    set_adapter(model, "c")
    assert torch.equal(model.transformer.ln_f.weight, saved)
    with pytest.raises(ValueError, match=r"'a' and 'c' both train transformer\.ln_f\.weight"):
        add_weighted_adapter(model, ["a", "c"], [1, 1], "d", "cat")


def test_experts():
    model = tiny("mixtral")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapted(model, target_parameters=parameters, target_modules=None, ranks=(2, 2))
    want = expected_sum(model)
    for kind in ("cat", "svd"):
        add_weighted_adapter(model, ["a", "b"], WEIGHTS, kind, kind, svd_rank=4)
        for path, delta in deltas(model, kind).items():
            assert delta.dim() == 3
            torch.testing.assert_close(delta, want[path], rtol=1e-5, atol=1e-6)


def test_it_is_an_adapter_like_others(tmp_path):
    model = adapted(tiny(), starts=("loram", "lora"))
    set_adapter(model, "a")
    before = logits(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c")
    assert adapter_names(model) == ["a", "b", "c"]
    assert torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    set_adapter(model, "c")
    want = logits(model)
    save_adapter(model, tmp_path / "c")
    other = tiny()
    load_adapter(other, tmp_path / "c", progress=False)
    torch.testing.assert_close(logits(other.eval()), want, rtol=1e-5, atol=1e-5)
    ids = token_ids()
    with torch.no_grad(), adapters_per_row(model, ["c", "c", None]):
        torch.testing.assert_close(model(ids).logits[:2], want[:2])
    merge_lora(model, "c")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_a_biased_B():
    """PEFT leaves the biases out."""
    model = adapted(tiny(), ranks=(2, 2))
    for name in "ab":
        for layer in adapted_layers(model).values():
            adapter = layer.adapter(name)
            adapter.lora_bias = nn.Parameter(torch.randn(len(adapter.lora_B)))
    parts = [adapter_state(model, name).layers for name in "ab"]
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", "cat")
    for path, layer in adapter_state(model, "c").layers.items():
        own = zip(WEIGHTS, parts, strict=True)
        want = sum(w * p[path].scaling * p[path].lora_bias for w, p in own)
        torch.testing.assert_close(layer.lora_bias, want)


def test_bad_inputs():
    model = adapted(tiny(), ranks=(3, 2), starts=("loram", "lora"))
    unchanged = snapshot(model)

    def raises(error, match, adapters=("a", "b"), weights=(1, 1), name="c", *rest, **options):
        with pytest.raises(error, match=match):
            add_weighted_adapter(model, list(adapters), weights, name, *rest, **options)

    raises(ValueError, "unknown adapter 'bb'.*did you mean 'b'", ("a", "bb"))
    raises(ValueError, "adapters is empty", ())
    raises(ValueError, "2 adapters and 1 weights", weights=[1])
    raises(ValueError, "the weight of adapter 'b' is nan", weights=[1, float("nan")])
    raises(TypeError, "weights must be a list of numbers", weights=["x", 1])
    raises(TypeError, "adapters must be a list", (1, 2))
    raises(ValueError, "has an adapter 'a' already", name="a")
    raises(ValueError, "cannot be 'x.y'", name="x.y")
    raises(
        ValueError, "unknown combination_type 'cats'.*did you mean 'cat'", combination_type="cats"
    )
    raises(ValueError, "'ties_svd' is not implemented here", combination_type="ties_svd")
    raises(ValueError, "one rank, these have 'a' 6, 'b' 2", combination_type="linear")
    raises(ValueError, "svd_rank must be at least 1", svd_rank=0)
    with pytest.raises(ValueError, match="has no adapters"):
        add_weighted_adapter(tiny(), ["a"], [1], "c")
    unchanged()
    model = adapted(tiny(), starts=("loram", "loram"))
    raises(ValueError, "adapter 'a' subtracts a start", combination_type="linear")


def test_a_convolution():
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2), "proj": nn.Linear(6, 5)})
    for name in "ab":
        config = LoRAConfig(r=2, target_modules=["conv", "proj"], residual="implicit")
        quiet(model, config, adapter_name=name)
        move(model, 0.2, seed=ord(name))
    want = expected_sum(model)
    x, outputs = torch.randn(2, 4, 5, 5), {}
    for name in "ab":
        set_adapter(model, name)
        outputs[name] = model["conv"](x)
    add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "average", "cat")
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", svd_rank=8)
    for path, delta in deltas(model, "c").items():
        torch.testing.assert_close(delta, want[path], rtol=1e-5, atol=1e-6)
    set_adapter(model, "average")
    torch.testing.assert_close(model["conv"](x), (outputs["a"] + outputs["b"]) / 2)


def test_tied_adapters_stay_tied():
    model = tiny(tied=True)
    for name, r in (("a", 2), ("b", 3)):
        options = {"target_modules": ["lm_head"], "init_lora_weights": "lora"}
        config = LoRAConfig(r=r, ensure_weight_tying=True, **options)
        quiet(model, config, adapter_name=name)
        move(model, 0.1, seed=r)
    want = expected_sum(model)
    for kind in ("cat", "svd"):
        add_weighted_adapter(model, ["a", "b"], WEIGHTS, kind, kind, svd_rank=5)
        assert model.lm_head.adapter(kind).source is model.model.embed_tokens.adapter(kind)
        for path, delta in deltas(model, kind).items():
            torch.testing.assert_close(delta, want[path], rtol=1e-5, atol=1e-6)
