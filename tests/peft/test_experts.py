"""PEFT's adapters of experts: our operator in place of PEFT's forward, and our starts."""

from __future__ import annotations

import copy
import importlib
import pickle
from functools import cache

import pytest
import torch
from torch import nn

from ..support.packages import needs_peft
from ..support.peft_models import accelerate, initialize, linear_layers
from ..support.running import logits, move, token_ids
from ..support.tiny_experts import EXPERTS, expert_parameters, tiny_experts

pytestmark = needs_peft
FAMILIES = ["Mixtral", "Qwen3Moe", "GptOss", "Olmoe", "GraniteMoe", "NemotronH", "DeepseekV3"]


@cache
def _base(family: str, dtype: torch.dtype) -> nn.Module:
    return tiny_experts(family, dtype)


def base(family: str = "Mixtral", dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(_base(family, dtype))


def endings(model: nn.Module) -> list[str]:
    return sorted({".".join(name.split(".")[-2:]) for name in expert_parameters(model)})


def adapted(model: nn.Module, **options) -> nn.Module:
    """With an adapter of another rank and s on each of the experts' parameters, and on o_proj."""
    from peft import LoraConfig, get_peft_model

    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    defaults |= {"target_parameters": endings(model), "rank_pattern": {"down_proj": 3}}
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(**defaults | options)).eval()


def wrappers(model: nn.Module) -> dict:
    """PEFT's layers over parameters, by the parameter's name."""
    layers = linear_layers(model).values()
    return {x.parameter_name: x for x in layers if hasattr(x, "parameter_name")}


def outer(model: nn.Module) -> nn.Module:
    return next(x for n, x in linear_layers(model).items() if n.endswith("experts"))


def of_expert(layer, e: int, adapter: str = "default", start: bool = False):
    """A [r, in] and B [out, r] of one expert, float64, by PEFT's order of rows and columns."""
    if start:
        A, B = layer.lora_start_A[adapter], layer.lora_start_B[adapter]
    else:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    r = len(A) // EXPERTS
    rows, columns = range(e * r, e * r + r), range(e, r * EXPERTS, EXPERTS)
    return A.detach().double()[list(rows)], B.detach().double()[:, list(columns)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(input_ids=token_ids(), use_cache=False).logits
    out.square().mean().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), trained


@pytest.fixture
def fused(monkeypatch) -> list:
    """A list that grows by one, the parameters' names, at every call of our forward."""
    module = importlib.import_module("lora_kernels.peft.experts.forward")
    calls, run = [], module.experts_forward

    def recorded(experts, x, index, weights, factors):
        calls.append(list(factors))
        return run(experts, x, index, weights, factors)

    monkeypatch.setattr(module, "experts_forward", recorded)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_and_trains_as_peft_does(family, fused):
    model = adapted(base(family))
    start = "pissa" if family == "GptOss" else "lora"
    initialize(model, start)
    move(model, 0.1)
    want, peft_s = gradients(model)
    report = accelerate(model)
    assert report.layers == list(linear_layers(model)) and not report.left
    got, ours = gradients(model)
    assert fused == [[*wrappers(model)]]
    assert relative(got, want) <= 1e-6
    assert ours.keys() == peft_s.keys() and len(ours) == 6
    for name, gradient in peft_s.items():
        assert relative(ours[name], gradient) <= 2e-6, name
    report.undo()
    report.undo()
    assert torch.equal(logits(model), want) and len(fused) == 1
    assert not any("forward" in vars(layer) for layer in linear_layers(model).values())


@pytest.mark.parametrize("method, factor", [("lora", 1.1), ("loram", 3)])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "NemotronH"])
def test_bfloat16(family, method, factor):
    """Of the same experts in float64; the model's router would differ for tokens that are close to
    two experts. With a start, A, B, A₀ and B₀ are rounded, PEFT's W' only at the end.
    """
    model = adapted(base(family, torch.bfloat16))
    initialize(model, method)
    move(model)
    experts = outer(model)
    exact = copy.deepcopy(experts).double()
    torch.manual_seed(0)
    x = torch.randn(40, 32).bfloat16()
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(40)])
    weights = torch.rand(40, 2).bfloat16()
    exact.get_base_layer().config = copy.copy(exact.get_base_layer().config)
    exact.get_base_layer().config._experts_implementation = "eager"  # float64 is not in grouped_mm
    want = exact(x.double(), index, weights.double())
    peft_s = relative(experts(x, index, weights), want)
    accelerate(model)
    ours = relative(experts(x, index, weights), want)
    assert peft_s < 0.01 and ours <= factor * peft_s


@pytest.mark.parametrize("method", ["loram", "pissa"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "NemotronH"])
def test_every_expert_has_its_own_start(family, method):
    """The oracle, in float64, is the initializer for one expert's weight."""
    from lora_kernels.init import get_initializer

    model = adapted(base(family))
    before, want = copy.deepcopy(model.state_dict()), None
    with model.disable_adapter():
        want = logits(model)
    report = initialize(model, method)
    assert not report.left and report.layers == list(linear_layers(model))
    assert torch.equal(logits(model), want)  # W + 0
    fused = accelerate(model)
    assert relative(logits(model), want) <= 1e-6
    fused.undo()
    for layer in wrappers(model).values():
        weights = layer.get_param().detach()
        weights = weights.mT if layer.get_base_layer().is_transposed else weights
        r, s = layer.r["default"], layer.scaling["default"]
        for e in range(EXPERTS):
            start = get_initializer(method)(weights[e].double(), r, s)
            A, B = of_expert(layer, e)
            assert relative(B @ A, start.lora_B @ start.lora_A) <= 3e-5
            assert all(map(torch.equal, of_expert(layer, e, start=True), (A, B)))
    move(model)
    report.undo()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_merges_the_start_away(family):
    """W_e + s·(BA − B₀A₀) in float64."""
    model = adapted(base(family))
    initialize(model)
    move(model)
    want = {}
    for name, layer in wrappers(model).items():
        transposed = layer.get_base_layer().is_transposed
        merged = []
        for e, weight in enumerate(layer.get_param().detach().double()):
            (A, B), (A0, B0) = of_expert(layer, e), of_expert(layer, e, start=True)
            update = layer.scaling["default"] * (B @ A - B0 @ A0)
            merged.append(weight + (update.T if transposed else update))
        want[name] = torch.stack(merged)
    output = logits(model)
    accelerate(model)
    model.merge_adapter()
    for name, layer in wrappers(model).items():
        assert relative(layer.get_param(), want[name]) <= 1e-7
    assert relative(logits(model), output) <= 1e-6
    model.unmerge_adapter()
    assert relative(logits(model), output) <= 1e-6
    plain = model.merge_and_unload()
    assert relative(logits(plain), output) <= 1e-6
    assert not any("lora" in name for name in plain.state_dict())


def test_several_adapters(fused):
    """Calls that one adapter does not explain are PEFT's own."""
    from peft import LoraConfig

    model = adapted(base())
    options = {"r": 2, "lora_alpha": 6, "target_parameters": endings(base())}
    model.add_adapter("other", LoraConfig(target_modules=["o_proj"], **options))
    initialize(model, "loram", adapter_name="default")
    initialize(model, "pissa", adapter_name="other")
    move(model)
    for layer in linear_layers(model).values():
        nn.init.normal_(layer.lora_B["other"].weight, std=0.05)
    peft_s = copy.deepcopy(model)
    accelerate(model)
    for active, calls in (("other", 1), ("default", 1), (["default", "other"], 0), ([], 0)):
        for each in (model, peft_s):
            each.base_model.set_adapter(active)
        del fused[:]
        want, theirs = gradients(peft_s) if active else (logits(peft_s), {})
        got, ours = gradients(model) if active else (logits(model), {})
        assert len(fused) == calls and relative(got, want) <= 1e-6
        assert all(relative(ours[name], gradient) <= 2e-6 for name, gradient in theirs.items())


def test_calls_that_are_left_to_peft(fused):
    model = adapted(base())
    initialize(model)
    move(model)
    peft_s = copy.deepcopy(model)
    accelerate(model)
    inner = outer(model).get_base_layer()
    with model.disable_adapter(), peft_s.disable_adapter():
        assert torch.equal(logits(model), logits(peft_s))
    model.merge_adapter(), peft_s.merge_adapter()
    assert torch.equal(logits(model), logits(peft_s))
    model.unmerge_adapter(), peft_s.unmerge_adapter()
    inner.down_proj.requires_grad_(True)
    _, found = gradients(model)
    assert any(name.endswith("experts.base_layer.base_layer.down_proj") for name in found)
    inner.down_proj.requires_grad_(False)
    seen = []
    for module in (inner, outer(model).base_layer, outer(model).lora_A["default"]):
        hook = module.register_forward_hook(lambda *_: seen.append(1))
        assert relative(logits(model), logits(peft_s)) <= 1e-6
        hook.remove()
    assert len(seen) == 2 and not fused  # PEFT itself reads lora_A without calling it
    with pytest.raises(TypeError):
        outer(model)(torch.randn(2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(logits(model), logits(peft_s)) <= 0.02
    assert len(fused) == 1


def test_one_parameter_alone(fused):
    model = adapted(base("GptOss"), target_parameters=["experts.down_proj"])
    report = initialize(model, "loram")
    assert report.layers == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts"]
    move(model)
    want, theirs = gradients(model)
    accelerate(model)
    got, ours = gradients(model)
    assert fused == [["down_proj"]] and relative(got, want) <= 1e-6
    assert all(relative(ours[name], gradient) <= 2e-6 for name, gradient in theirs.items())


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Llama4TextConfig(
        **sizes, **heads, num_hidden_layers=1, num_local_experts=4, vocab_size=96, moe_layers=[0]
    )
    torch.manual_seed(0)
    return Llama4ForCausalLM(config).eval()


def test_what_is_left():
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(llama4(), target_parameters=parameters)
    for report in (accelerate(model), initialize(model)):
        assert len(report.left) == 2
        assert report.layers == ["model.layers.0.self_attn.o_proj"]
        assert all("Llama4TextExperts" in reason for reason in report.left.values())
    model = adapted(base("GptOss"), target_parameters=["router.weight", *parameters])
    report = accelerate(model)
    assert list(report.left) == ["model.layers.0.mlp.router"]
    assert "'weight' of GptOssTopKRouter, is no 3-D one of experts" in str(report)
    # A parameter that is none of the two: the whole chain is PEFT's, because it is one call.
    model = adapted(base("GptOss"), target_parameters=["experts.gate_up_proj_bias", *parameters])
    report = accelerate(model)
    assert len(report.left) == 3
    assert all("'gate_up_proj_bias'" in reason for reason in report.left.values())
    (name,) = initialize(model).left
    assert linear_layers(model)[name].parameter_name == "gate_up_proj_bias"
    model = adapted(base())
    outer(model).get_base_layer().register_forward_hook(lambda *_: None)
    assert set(accelerate(model).left.values()) == {"its experts have hooks or a wrapped forward"}
    model = adapted(base())
    outer(model).get_base_layer()._is_expert_parallel = True
    assert all("expert parallelism" in why for why in accelerate(model).left.values())


def test_undo_refuses_a_foreign_wrapper():
    model = adapted(base())
    report = accelerate(model)
    wrapped, own = outer(model), outer(model).forward
    wrapped.forward = lambda *args: own(*args)
    with pytest.raises(RuntimeError, match="its forward was wrapped since"):
        report.undo()
    left = accelerate(model).left
    assert len(left) == 2 and set(left.values()) == {"its forward is wrapped by another tool"}
    wrapped.forward = own
    report.undo()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_with_their_own_factors(copied, fused):
    model = adapted(base())
    initialize(model)
    accelerate(model)
    other = copied(model)
    before = logits(model)
    move(other)
    assert relative(logits(other), before) > 1e-3 and torch.equal(logits(model), before)
    assert len(fused) == 3
    names = model.state_dict().keys()
    assert names == other.state_dict().keys()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, fused):
    model = adapted(base())
    initialize(model)
    move(model)
    accelerate(model)
    _, want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, got = gradients(model.train())
    assert len(fused) == 3
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())


def test_state_dict_and_reference_model():
    """A₀ and B₀ follow A and B, and TRL's reference model is the base."""
    model = adapted(base())
    initialize(model)
    with model.disable_adapter():
        want = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    move(model)
    state, output = model.state_dict(), logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), want)
    other = adapted(base())
    initialize(other, "pissa")
    assert other.load_state_dict(state, strict=False).missing_keys == []
    assert torch.equal(logits(other), output)
    other.delete_adapter("default")
    assert not any("default" in name for name in other.state_dict())


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_starts_from_gradients(family):
    """Those captured in PEFT's model, whose names differ, are those of the base."""
    from lora_kernels import capture_gradients

    ids = token_ids()
    batches = [{"input_ids": ids, "labels": ids}]
    names = expert_parameters(base(family))
    want = capture_gradients(base(family), batches, [*names, "o_proj"], progress=False)
    model = adapted(base(family))
    accelerate(model)
    inside = [name.rpartition("experts.")[2] for name in names]
    targets = [f"experts.base_layer.base_layer.{name}" for name in inside]
    got = capture_gradients(model, batches, [*targets, "o_proj.base_layer"], progress=False)
    assert all(map(torch.allclose, got.values(), want.values()))
    outputs = []
    for gradients_ in (got, want):
        report = initialize(model, "lora_ga", gradients=gradients_)
        assert not report.left
        outputs.append({n: of_expert(x, 1)[0] for n, x in wrappers(model).items()})
    assert all(relative(outputs[0][name], A) <= 1e-4 for name, A in outputs[1].items())
    del want[names[0]]
    with pytest.raises(ValueError, match=r"gradients has none for model\.layers\.0\.mlp\.experts"):
        initialize(model, "lora_ga", gradients=want)
