"""Whole models of experts: `add_lora` with `target_parameters`, against PEFT and the bare model."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    capture_gradients,
    disable_adapters,
    enable_adapters,
    init,
    magnitude,
    merge_lora,
    set_adapter,
    unload_lora,
    with_expert_rank,
)
from lora_kernels.model.experts.base import experts_bases
from lora_kernels.model.experts.module import LoRAExperts, stacks_of
from lora_kernels.model.experts.stack import AdaptedStack
from lora_kernels.model.install import adapted_layers

from ..support.exhaustive import EXHAUSTIVE
from ..support.tiny_experts import EXPERTS, expert_parameters, tiny_experts

FAMILIES = ("Mixtral", "Qwen3Moe", "GptOss", "Olmoe", "GraniteMoe", "DeepseekV3", "NemotronH")
# Normal; transposed, interleaved and biased; without a gate.
KINDS = FAMILIES if EXHAUSTIVE else ("Qwen3Moe", "GptOss", "NemotronH")
R = 3
IDS = torch.tensor([[5, 17, 2, 44, 8, 61, 30], [9, 3, 77, 21, 50, 6, 90]])


def endings(model) -> list[str]:
    names = expert_parameters(model)
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def adapt(model, adapter_name="default", activations=None, **options):
    options = {"r": R, "target_modules": None, "target_parameters": endings(model)} | options
    config, data = LoRAConfig(**options), {"activations": activations}
    return add_lora(model, config, adapter_name=adapter_name, progress=False, **data)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, seed=1):
    """Moves all trained parameters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def relative(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def from_peft(name, A, B, model):
    """PEFT's A [E·r, in] and B [out, r·E] as stacks; E is slowest in A and fastest in B."""
    E = EXPERTS
    return A.view(E, -1, A.shape[1]), B.view(len(B), -1, E).permute(2, 0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same(family):
    peft = pytest.importorskip("peft")
    model, theirs = tiny_experts(family), tiny_experts(family)
    adapt(model, init_lora_weights="gaussian", lora_alpha=4.0)
    config = peft.LoraConfig(
        r=R, lora_alpha=4.0, target_modules=[], target_parameters=endings(theirs)
    )
    theirs = peft.get_peft_model(theirs, config)
    wrappers = {
        f"{n.partition('base_model.model.')[2].replace('.base_layer', '')}.{m.parameter_name}": m
        for n, m in theirs.named_modules()
        if type(m).__name__ == "ParamWrapper"
    }
    layers = adapted_layers(model)
    assert layers.keys() == wrappers.keys()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = (
                getattr(wrappers[name], f"lora_{f}")["default"].weight.normal_(std=0.1)
                for f in "AB"
            )
            for factor, value in zip(
                (layer.lora_A, layer.lora_B), from_peft(name, A, B, model), strict=True
            ):
                factor.copy_(value)
    y, expected = (m(input_ids=IDS, labels=IDS) for m in (model, theirs))
    assert relative(y.logits.detach(), expected.logits.detach()) <= 1e-6
    y.loss.backward()
    expected.loss.backward()
    for name, layer in layers.items():
        grads = (
            getattr(wrappers[name], f"lora_{factor}")["default"].weight.grad for factor in "AB"
        )
        found = (layer.lora_A.grad, layer.lora_B.grad)
        for a, b in zip(found, from_peft(name, *grads, model), strict=True):
            assert float((a - b).norm() / b.norm()) <= 2e-6


@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize("family", KINDS)
def test_a_life(family, residual):
    """Start, disable, train, unload and merge."""
    model = tiny_experts(family)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    base = logits(model)
    adapt(model, residual=residual)
    assert relative(logits(model), base) < 2e-6
    with disable_adapters(model):
        off = logits(model)
        assert torch.equal(off, base) if residual == "implicit" else relative(off, base) < 2e-6
    train(model)
    trained = logits(model)
    assert relative(trained, base) > 1e-3
    merged = merge_lora(copy.deepcopy(model))
    assert relative(logits(merged), trained) < 3e-6
    unload_lora(model)
    for plain in (model, merged):
        assert {n: type(m) for n, m in plain.named_modules()} == classes
        assert [n for n, _ in plain.named_parameters()] == list(weights)
    for name, parameter in model.named_parameters():
        if residual == "implicit":
            assert torch.equal(parameter, weights[name])
        else:
            assert relative(parameter.detach(), weights[name]) < 3e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_start_of_each_expert_is_exact(transposed, dtype):
    """W_res + s·BA is W to one rounding of W's dtype, for each expert with its own β."""
    model = tiny_experts("GptOss" if transposed else "Qwen3Moe", dtype)
    with torch.no_grad():  # experts of different size
        for name in expert_parameters(model):
            model.get_parameter(name).mul_(torch.arange(1, EXPERTS + 1).view(-1, 1, 1).to(dtype))
    before = {n: model.get_parameter(n).detach().double() for n in expert_parameters(model)}
    adapt(model)
    for name, layer in adapted_layers(model).items():
        W = before[name].mT if transposed else before[name]
        r, s = layer.r, layer.scaling
        norms = W.flatten(1).norm(dim=1)
        gain = torch.tensor(float(r)).double().log() / torch.tensor(float(min(W.shape[1:]))).log()
        beta = (norms**2 * gain / r) ** 0.25
        assert torch.allclose(layer.active().beta, beta, rtol=1e-6)
        residual = layer.matrix().detach().double()
        B, A = layer.lora_B.detach().double(), layer.lora_A.detach().double()
        product = s * B @ A
        # W_res is rounded once to `dtype`; the product's sums are rounded in float32.
        bound = torch.finfo(dtype).eps * residual.abs() + 3e-7 * (s * B.abs() @ A.abs() + W.abs())
        assert bool(((residual + product - W).abs() <= bound).all())


FROM_INPUTS = [n for n in init.initializer_names() if init.get_initializer(n).needs_activations]
_OTHERS = ("init_ab_plus", "loftq", "lora_xs", *FROM_INPUTS)
STARTS = [n for n in init.initializer_names() if n not in _OTHERS]


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
def test_every_start(name, residual):
    """Each expert starts as the initializer starts its matrix alone; the base comes back."""
    model = tiny_experts("Qwen3Moe")
    initializer = init.get_initializer(name)
    if "seed" in getattr(initializer, "__dataclass_fields__", {}):
        initializer = type(initializer)(seed=5)
    before = {n: model.get_parameter(n).detach().clone() for n in expert_parameters(model)}
    gradients = {n: torch.randn_like(w) for n, w in before.items()}
    options = {"gradients": gradients} if initializer.needs_gradient else {}
    r = R - R % 2 if name == "orthogonal" else R
    config = LoRAConfig(
        r=r,
        target_modules=None,
        target_parameters=endings(model),
        init_lora_weights=initializer,
        residual=residual,
    )
    add_lora(model, config, progress=False, **options)
    for path, layer in adapted_layers(model).items():
        assert isinstance(layer, AdaptedStack)
        for e in range(EXPERTS):
            gradient = gradients[path][e] if options else None
            alone = initializer(before[path][e], r, layer.scaling, gradient)
            expected = alone.lora_B @ alone.right()
            middle = layer.active().middle()
            own = layer.lora_A[e] if middle is None else middle[e] @ layer.lora_A[e]
            found = (layer.lora_B[e] @ own).detach()
            size = max(float(expected.norm()), 1e-12)
            assert float((found - expected).norm()) <= 1e-4 * size
    model(input_ids=IDS, labels=IDS).loss.backward()
    unload_lora(model)
    for path, weight in before.items():
        assert relative(model.get_parameter(path).detach(), weight) < 3e-7


def test_kasa_trains_a_diagonal_of_each_expert():
    model = tiny_experts("GptOss")
    base = logits(model)
    adapt(model, init_lora_weights="kasa")
    train(model)
    for layer in adapted_layers(model).values():
        assert layer.lora_diag.shape == (EXPERTS, R) and layer.lora_diag.requires_grad
    trained = logits(model)
    assert relative(trained, base) > 1e-2
    with disable_adapters(model):
        assert relative(logits(model), base) < 1e-6
    assert relative(logits(merge_lora(model)), trained) < 1e-6


@pytest.mark.parametrize("name", FROM_INPUTS)
def test_starts_from_inputs_are_refused(name):
    model = tiny_experts("Qwen3Moe")
    with pytest.raises(ValueError, match=r"gate_up_proj holds experts, .* leave out target_parame"):
        adapt(model, init_lora_weights=name, activations={})
    assert not adapted_layers(model)


def test_loftq_rewrites_each_expert():
    model = tiny_experts("Qwen3Moe")
    before = {n: model.get_parameter(n).detach().clone() for n in expert_parameters(model)}
    adapt(model, init_lora_weights="loftq")
    for path, layer in adapted_layers(model).items():
        found = layer.effective_weight()
        assert layer.matrix().unique().numel() <= 16 * before[path].numel() // 64
        assert 0 < relative(found, before[path]) < 0.2


def test_an_implicit_dst_start_keeps_no_stacks():
    """It keeps β; the initial factors are made again for every call."""
    model = tiny_experts("Qwen3Moe")
    adapt(model, residual="implicit")
    for layer in adapted_layers(model).values():
        adapter = layer.active()
        assert adapter.start_A is None and adapter.start_B is None
        A0, B0 = adapter.implicit_start()
        assert torch.equal(A0, adapter.lora_A) and torch.equal(B0, adapter.lora_B)


class TestSeveralAdapters:
    def test_each_computes_its_own(self):
        model = tiny_experts("GptOss")
        base = logits(model)
        adapt(model, "one", residual="implicit")
        train(model, 1)
        one = logits(model)
        adapt(model, "two", residual="implicit", r=2, target_parameters=["experts.down_proj"])
        train(model, 2)
        two = logits(model)
        set_adapter(model, "one")
        assert relative(logits(model), one) < 1e-6
        layers = adapted_layers(model)
        layer = layers["model.layers.0.mlp.experts.down_proj"]
        assert not layer.adapter("two").lora_A.requires_grad
        set_adapter(model, "two")
        assert relative(logits(model), two) < 1e-6
        with disable_adapters(model):
            assert torch.equal(logits(model), base)
        enable_adapters(model)
        merge_lora(model, "two")
        assert relative(logits(model), two) < 3e-6

    def test_absorbed_experts_take_no_second_adapter(self):
        model = tiny_experts("Qwen3Moe")
        adapt(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match="residual='implicit' for all of them"):
            adapt(model, "two")
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class TestTheModuleStaysWhatItWas:
    def test_names_class_and_state_dict(self):
        model = tiny_experts("Qwen3Moe")
        experts = model.model.layers[0].mlp.experts
        cls, names = type(experts), list(model.state_dict())
        adapt(model)
        assert model.model.layers[0].mlp.experts is experts and isinstance(experts, cls)
        assert isinstance(experts, LoRAExperts) and stacks_of(experts).keys() == {
            "gate_up_proj",
            "down_proj",
        }
        assert [name for name in model.state_dict() if "_lora." not in name] == names

    def test_deepcopy_and_pickle(self):
        model = tiny_experts("GptOss")
        adapt(model)
        train(model)
        expected = logits(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin), expected)
            stack = next(iter(adapted_layers(twin).values()))
            assert stack.experts is twin.model.layers[0].mlp.experts
            merge_lora(twin)
        assert torch.equal(logits(model), expected)

    def test_torch_save_and_load_state_dict(self):
        model, other = tiny_experts("Qwen3Moe"), tiny_experts("Qwen3Moe")
        adapt(model)
        train(model)
        adapt(other)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer))
        assert torch.equal(logits(other), logits(model))
        assert relative(logits(unload_lora(other)), logits(unload_lora(model))) < 1e-6

    def test_save_pretrained_writes_the_checkpoints_form(self, tmp_path):
        model = tiny_experts("Qwen3Moe")
        base = logits(model)
        adapt(model)
        train(model)
        expected = logits(model)
        merge_lora(model).save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert relative(logits(again), expected) < 3e-6 and relative(expected, base) > 1e-3

    def test_hooks(self):
        model = tiny_experts("Qwen3Moe")
        experts, seen = model.model.layers[0].mlp.experts, []
        handle = experts.register_forward_hook(lambda *args: seen.append(1))
        adapt(model)
        logits(model)
        assert seen == [1]
        handle.remove()
        logits(unload_lora(model))
        assert seen == [1]

    def test_accelerates_hook_runs_the_new_forward(self):
        hooks = pytest.importorskip("accelerate.hooks")
        model = tiny_experts("Qwen3Moe")
        base = logits(model)
        experts = model.model.layers[0].mlp.experts
        hooks.add_hook_to_module(experts, hooks.ModelHook())
        adapt(model)
        train(model)
        assert relative(logits(model), base) > 1e-3
        unload_lora(model)
        assert relative(logits(model), base) < 2e-6
        hooks.remove_hook_from_module(experts)
        assert relative(logits(model), base) < 2e-6

    def test_accelerates_hook_removed_while_adapted(self):
        hooks = pytest.importorskip("accelerate.hooks")
        model = tiny_experts("Qwen3Moe")
        base = logits(model)
        experts = model.model.layers[0].mlp.experts
        hooks.add_hook_to_module(experts, hooks.ModelHook())
        adapt(model, residual="implicit")
        hooks.remove_hook_from_module(experts)
        adapt(model, "second", residual="implicit")
        unload_lora(model)
        assert relative(logits(model), base) < 2e-6

    def test_offloaded_factors_are_refused(self):
        model = tiny_experts("Qwen3Moe")
        adapt(model)
        for stack in stacks_of(model.model.layers[0].mlp.experts).values():
            stack.to("meta")
        with pytest.raises(ValueError, match="lora_A is on meta"):
            logits(model)

    def test_to_dtype(self):
        model = tiny_experts("Qwen3Moe")
        adapt(model, residual="implicit")
        model.to(torch.bfloat16)
        assert logits(model).dtype == torch.bfloat16
        with disable_adapters(model):
            expected = logits(model)
        assert relative(logits(model).float(), expected.float()) < 0.02


class TestRunning:
    def test_generate(self):
        model = tiny_experts("Qwen3Moe")
        adapt(model)
        train(model)
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        merged = merge_lora(copy.deepcopy(model))
        assert torch.equal(tokens, merged.generate(IDS, max_new_tokens=4, do_sample=False))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        model = tiny_experts("GptOss").train()
        adapt(model)
        train(model)

        def grads():
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            return [p.grad.clone() for p in model.parameters() if p.requires_grad]

        expected = grads()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for found, wanted in zip(grads(), expected, strict=True):
            assert relative(found, wanted) < 1e-5

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_compile(self, residual):
        model = tiny_experts("GptOss" if EXHAUSTIVE else "Qwen3Moe")
        adapt(model, residual=residual)
        train(model)
        x = torch.randn(6, 32)
        index, weights = torch.tensor([[0, 1]] * 3 + [[2, 3]] * 3), torch.rand(6, 2)
        experts = model.model.layers[0].mlp.experts
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        found, expected = compiled(x, index, weights), experts(x, index, weights)
        assert relative(found.detach(), expected.detach()) < 1e-6
        own = [p for p in experts.parameters() if p.requires_grad]
        grads = [torch.autograd.grad(y.square().sum(), own) for y in (found, expected)]
        for a, b in zip(*grads, strict=True):
            assert relative(a, b) < 1e-5

    def test_the_router_stays_frozen_and_the_loss_falls(self):
        model = tiny_experts("Qwen3Moe").train()
        adapt(model, r=4)
        router = model.model.layers[0].mlp.gate.weight.detach().clone()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0] - 0.05
        assert torch.equal(model.model.layers[0].mlp.gate.weight, router)


class TestSelection:
    def test_all_linear_tells_of_experts(self):
        model = tiny_experts("Qwen3Moe")
        report = add_lora(model, LoRAConfig(r=4), progress=False)
        reason = report.skipped["model.layers.0.mlp.experts"]
        count = 4 * EXPERTS * (48 + 32 + 32 + 24)
        assert "target_parameters=['experts.gate_up_proj', 'experts.down_proj']" in reason
        assert f"{count:,} parameters (r=4)" in reason
        assert "not adapted: model.layers.*.mlp.experts" in str(report)

    def test_the_option_that_it_names_adapts_them(self):
        model = tiny_experts("Qwen3Moe")
        names = ["experts.gate_up_proj", "experts.down_proj"]
        report = add_lora(model, LoRAConfig(r=4, target_parameters=names), progress=False)
        rows = {row.name: row for row in report.adapted}
        row = rows["model.layers.0.mlp.experts.gate_up_proj"]
        shape = (row.num_experts, row.out_features, row.in_features)
        assert shape == (EXPERTS, 48, 32) and row.kind == "experts"
        assert "model.layers.0.self_attn.q_proj" in rows
        assert f"experts.gate_up_proj {EXPERTS} experts x [48, 32]: r=4" in str(report)
        assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)

    def test_one_parameter(self):
        model = tiny_experts("Mixtral")
        report = adapt(model, target_parameters=["down_proj"])
        assert [row.name for row in report.adapted] == ["model.layers.0.mlp.experts.down_proj"]
        reason = report.skipped["model.layers.0.mlp.experts.gate_up_proj"]
        assert reason == "not among target_parameters"

    def test_linear_routers_stay_frozen(self):
        model = tiny_experts("Qwen3Moe")
        block = model.model.layers[0].mlp
        block.router = nn.Linear(32, EXPERTS)
        report = add_lora(model, LoRAConfig(r=2), progress=False)
        assert "router of experts" in report.skipped["model.layers.0.mlp.router"]
        unload_lora(model)
        report = add_lora(model, LoRAConfig(r=2, target_modules=["router"]), progress=False)
        assert [row.name for row in report.adapted] == ["model.layers.0.mlp.router"]

    def test_patterns_go_by_the_parameters_name(self):
        model = tiny_experts("Qwen3Moe")
        report = adapt(model, rank_pattern={"gate_up_proj": 2}, alpha_pattern={"down_proj": 5.0})
        rows = {row.name.rpartition(".")[2]: row for row in report.adapted}
        assert (rows["gate_up_proj"].r, rows["down_proj"].r) == (2, R)
        assert rows["down_proj"].lora_alpha == 5.0
        with pytest.raises(ValueError, match="'experts', which matches no adapted layer"):
            adapt(tiny_experts("Qwen3Moe"), rank_pattern={"experts": 2})

    @pytest.mark.parametrize("rule", ["lora", "rslora"])
    def test_the_rank_of_each_expert(self, rule):
        model = tiny_experts("Qwen3Moe")
        config = LoRAConfig(
            r=8, lora_alpha=16, scaling=rule, target_parameters=endings(model), rank_pattern={}
        )
        report = add_lora(model, with_expert_rank(model, config), progress=False)
        rows = {row.name.rpartition(".")[2]: row for row in report.adapted}
        assert rows["gate_up_proj"].r == rows["down_proj"].r == 4 and rows["q_proj"].r == 8
        assert rows["gate_up_proj"].scaling == pytest.approx(rows["q_proj"].scaling)
        given = dataclasses.replace(config, rank_pattern={"gate_up_proj": 2})
        given = with_expert_rank(model, given)
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert given.layer_rank(name) == 2
        assert given.layer_scaling(name) == pytest.approx(rows["q_proj"].scaling)
        with pytest.raises(ValueError, match="adapts no experts"):
            with_expert_rank(tiny_experts("Qwen3Moe"), LoRAConfig())

    def test_exclude_and_layers_to_transform(self):
        model = tiny_experts("Qwen3Moe", num_hidden_layers=2)
        report = adapt(model, layers_to_transform=[1])
        assert {row.name.split(".")[2] for row in report.adapted} == {"1"}
        model = tiny_experts("Qwen3Moe", num_hidden_layers=2)
        report = adapt(model, exclude_modules=["layers.0.mlp.experts.down_proj"])
        assert len(report.adapted) == 3
        model = tiny_experts("Qwen3Moe", num_hidden_layers=2)
        report = adapt(model, exclude_modules=["layers.0.mlp.experts"])
        assert {row.name.split(".")[2] for row in report.adapted} == {"1"}

    def test_tied_experts_subtract_in_every_forward(self):
        model = tiny_experts("Qwen3Moe", num_hidden_layers=2)
        first, second = (layer.mlp.experts for layer in model.model.layers)
        second.gate_up_proj = first.gate_up_proj
        base = logits(model)
        report = adapt(model)
        notes = {row.name: row.note for row in report.adapted}
        assert "experts.gate_up_proj too" in notes["model.layers.0.mlp.experts.gate_up_proj"]
        assert relative(logits(model), base) < 2e-6
        train(model)
        expected = logits(model)
        assert relative(logits(merge_lora(model)), expected) < 3e-6


class TestErrors:
    def test_a_misspelt_name(self):
        with pytest.raises(ValueError, match=r"'experts\.gate_up'.*gate_up_proj"):
            adapt(tiny_experts("Qwen3Moe"), target_parameters=["experts.gate_up"])

    def test_a_string(self):
        with pytest.raises(TypeError, match="target_parameters must be a list of names"):
            LoRAConfig(target_parameters="down_proj")

    def test_nothing_at_all(self):
        with pytest.raises(ValueError, match="target_modules is empty"):
            LoRAConfig(target_modules=None)

    def test_a_linear_layers_weight(self):
        with pytest.raises(ValueError, match=r"q_proj\.weight.*name the layer in target_modules"):
            adapt(tiny_experts("Qwen3Moe"), target_parameters=["q_proj.weight"])

    def test_experts_as_target_modules(self):
        with pytest.raises(TypeError, match="3-D parameters, which target_parameters names"):
            adapt(tiny_experts("Qwen3Moe"), target_modules=["experts"], target_parameters=None)

    def test_a_rank_that_is_too_large(self):
        with pytest.raises(ValueError, match=r"r = 25 .*experts\.gate_up_proj \[48, 32\]|r = 25"):
            adapt(tiny_experts("Qwen3Moe"), r=25)

    def test_one_bad_expert_is_named_and_nothing_changes(self):
        model = tiny_experts("Qwen3Moe")
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj[2].zero_()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=r"experts\.down_proj\[2\]: .*zero"):
            adapt(model)
        assert not any(isinstance(m, LoRAExperts) for m in model.modules())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda e: setattr(e, "_is_expert_parallel", True), "expert parallelism"),
            (
                lambda e: setattr(
                    e, "down_proj", nn.Parameter(e.down_proj.to(torch.float8_e4m3fn), False)
                ),
                "quantized",
            ),
            (lambda e: setattr(e, "forward", lambda x, *routing: x), "replaced"),
        ],
    )
    def test_what_is_not_supported_is_told(self, change, reason):
        model = tiny_experts("Qwen3Moe")
        change(model.model.layers[0].mlp.experts)
        report = add_lora(model, LoRAConfig(r=2), progress=False)
        assert reason in report.skipped["model.layers.0.mlp.experts"]
        unload_lora(model)
        with pytest.raises(ValueError, match=f"target_parameters names .*{reason}"):
            adapt(model)

    def test_undecorated_classes(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.Llama4TextConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=24,
            intermediate_size_mlp=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=EXPERTS,
            moe_layers=[0],
        )
        model = transformers.Llama4ForCausalLM(config)
        report = add_lora(model, LoRAConfig(r=2), progress=False)
        reason = report.skipped["model.layers.0.feed_forward.experts"]
        assert "Llama4TextExperts is not one of transformers' decorated classes" in reason
        unload_lora(model)
        with pytest.raises(ValueError, match="Llama4TextExperts is not one of"):
            adapt(model, target_parameters=["experts.down_proj"])

    def test_an_interrupt_restores_everything(self, monkeypatch):
        model = tiny_experts("Qwen3Moe", num_hidden_layers=2)
        classes = {n: type(m) for n, m in model.named_modules()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        attach, calls = AdaptedStack.attach, []

        def failing(self, *args):
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError
            attach(self, *args)

        monkeypatch.setattr(AdaptedStack, "attach", failing)
        with pytest.raises(MemoryError):
            adapt(model)
        assert {n: type(m) for n, m in model.named_modules()} == classes
        for name, parameter in model.named_parameters():
            assert relative(parameter.detach(), before[name]) < 3e-7


def test_gradients_and_magnitudes_of_experts():
    model = tiny_experts("GptOss")
    names = endings(model)
    batch = {"input_ids": IDS, "labels": IDS}
    found = capture_gradients(model, [batch], names, progress=False)
    for name in expert_parameters(model):
        model.get_parameter(name).requires_grad_(True)
    model(**batch).loss.backward()
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad.mT
        assert gradient.shape == expected.shape and relative(gradient, expected) < 1e-5
    model.requires_grad_(False)
    options = {"init_lora_weights": "lora_ga", "target_parameters": names, "target_modules": None}
    add_lora(model, LoRAConfig(r=2, **options), gradients=found, progress=False)
    train(model)
    rows = {row.name: row for row in magnitude.inspect_model(model, targets=names, progress=False)}
    for path, layer in adapted_layers(model).items():
        for e in range(EXPERTS):
            row = rows[f"{path}[{e}]"]
            A, B = layer.lora_A[e].detach(), layer.lora_B[e].detach()
            A0, B0 = (factor[e] for factor in layer.start_factors())
            expected = layer.scaling**2 * float((B @ A - B0 @ A0).square().mean())
            assert row.nu_update == pytest.approx(expected, rel=1e-4)
            assert (row.out_features, row.in_features) == layer.matrix().shape[1:]


def test_bases_are_views():
    model = tiny_experts("GptOss")
    bases = experts_bases("experts", model.model.layers[0].mlp.experts)
    base = bases["experts.gate_up_proj"]
    assert base.transposed and base.shape == (48, 32) and base.num_experts == EXPERTS
    for matrix, stored in zip(base.matrices(), base.stored_weight, strict=True):
        assert matrix.data_ptr() == stored.data_ptr()
