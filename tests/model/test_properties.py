"""Properties of whole models, over random models and configurations.

LORA_KERNELS_EXAMPLES=500 tries 500 new examples for each property instead of a few fixed ones.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    capture_activations,
    capture_gradients,
    disable_adapters,
    enable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.init import LoRA, LoRAM, get_initializer, initializer_names
from lora_kernels.layers.adapted import AdaptedLayer
from lora_kernels.layers.kinds import is_conv1d
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state, apply_state

from ..support.exhaustive import EXHAUSTIVE
from ..support.oracle import ROUNDING
from ..support.packages import needs_transformers
from ..support.running import snapshot, token_ids
from ..support.tiny_models import gpt2, llama

pytestmark = needs_transformers

_EXAMPLES = int(os.environ.get("LORA_KERNELS_EXAMPLES", "0"))
examples = settings(
    max_examples=_EXAMPLES or (25 if EXHAUSTIVE else 12),
    derandomize=not _EXAMPLES,
    database=None,
    deadline=None,
)

NAMES = [name for name in initializer_names() if not get_initializer(name).rewrites_base]
# These change the function at the start on purpose.
_ADDING = ("init_ab_plus", "kasa", "lora_one", "lora_sb", "lora_xs")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Mlp(nn.Module):
    """Linear layers with tanh, a norm and a head; a layer or a weight may be shared."""

    def __init__(self, widths: tuple[int, ...], bias: bool, shared: str) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias) for a, b in pairs)
        width = widths[-1]
        self.square, self.norm = nn.Linear(width, width, bias), nn.LayerNorm(width)
        self.again = self.square if shared == "layer" else nn.Linear(width, width, bias)
        if shared == "weight":
            self.again.weight = self.square.weight
        self.head = nn.Linear(width, 13, bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.square, self.again):
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def mlp(widths: tuple[int, ...], bias: bool, shared: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Mlp(widths, bias, shared).to(dtype).eval()


@dataclass(frozen=True)
class Case:
    """A model that can be built repeatedly, and the configuration of its adapter."""

    family: str
    options: tuple
    dtype: torch.dtype
    config: LoRAConfig

    def model(self) -> nn.Module:
        makers = {"mlp": mlp, "llama": llama, "gpt2": gpt2}
        return makers[self.family](*self.options, dtype=self.dtype)

    def batch(self, seed: int = 1) -> Tensor:
        """More rows than any rank, so that gradients have full rank."""
        if self.family != "mlp":
            return token_ids(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(24, self.options[0][0], generator=generator).to(self.dtype)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        if self.family == "mlp":
            return (model(batch).float() - 1).square().mean()
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        model.eval()
        batch = self.batch()
        if self.family == "mlp":
            return model(batch)
        return model(input_ids=batch, use_cache=False).logits

    def data(self) -> dict:
        """What the start needs."""
        initializer, batches = self.config.initializer, [self.batch(5)]
        if not (initializer.needs_gradient or initializer.needs_activations):
            return {}
        names = adapted_names(self.model(), self.config)
        if initializer.needs_gradient:
            found = capture_gradients(self.model(), batches, names, loss=self.loss, progress=False)
            return {"gradients": found}
        batches = batches if self.family == "mlp" else [{"input_ids": b} for b in batches]
        return {"activations": capture_activations(self.model(), batches, names, progress=False)}

    def add(self, model: nn.Module, **options) -> None:
        data = self.data()
        torch.manual_seed(4)
        try:
            add_lora(model, self.config, **data, progress=False, **options)
        except ValueError as error:
            # Gradients of a few tokens may have too low a rank.
            assume("numerical rank" not in str(error))
            raise

    def trained(self, model: nn.Module | None = None, **options) -> nn.Module:
        """With the adapter after one step, large enough to be visible in every dtype."""
        model = self.model() if model is None else model
        self.add(model, **options)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.loss(model, self.batch(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return model.eval()


def adapted_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    plain = replace(config, init_lora_weights="lora")
    return [row.name for row in add_lora(model, plain, progress=False).adapted]


@functools.cache
def linear_names(family: str, options: tuple) -> tuple[str, ...]:
    """Without the head of a language model, which "all-linear" does not select."""
    model = Case(family, options, torch.float32, LoRAConfig()).model()
    return tuple(
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and name != "lm_head"
    )


SAVED = {
    "mlp": ["norm", "head"],
    "llama": ["model.norm", "lm_head", "embed_tokens"],
    "gpt2": ["ln_f", "lm_head", "wte"],
}


@st.composite
def cases(draw: Callable) -> Case:
    family = draw(st.sampled_from(["mlp", "mlp", "llama", "gpt2"]))
    if family == "mlp":
        widths = draw(st.lists(st.integers(12, 24), min_size=1, max_size=3))
        shared = draw(st.sampled_from(["", "layer", "weight"]))
        options = (tuple(widths), draw(st.booleans()), shared)
    else:
        options = (draw(st.booleans()),) if family == "llama" else ()
    return Case(family, options, draw(st.sampled_from(DTYPES)), draw(configs(family, options)))


@st.composite
def configs(draw: Callable, family: str, options: tuple) -> LoRAConfig:
    """Valid configurations for that model: every name matches a layer."""
    names = linear_names(family, options)
    few = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
    rule = draw(st.sampled_from(["all-linear", "excluding", "names", "endings", "regex", "head"]))
    layers, excluded = draw(few), None
    targets = layers
    if rule == "all-linear":
        targets, layers = rule, list(names)
    elif rule == "excluding" and len(layers) < len(names):
        targets, excluded = "all-linear", layers
        layers = [name for name in names if name not in excluded]
    elif rule == "regex":
        targets = "|".join(name.replace(".", r"\.") for name in layers)
    elif rule == "endings":
        targets = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        layers = [name for name in names if name.rpartition(".")[2] in targets]
    elif rule == "head" and family != "mlp":
        targets = layers = [*layers, "lm_head"]
    initializer = draw(st.sampled_from(NAMES))
    rules = ["lora", "rslora"]
    if not get_initializer(initializer).grows_with_scaling:
        rules.append("alpha_sqrt")
    scaling = draw(st.sampled_from(rules))
    alphas, keys = st.floats(0.5, 16), st.lists(st.sampled_from(layers), max_size=2, unique=True)
    ranks = st.integers(1, 5)
    if initializer == "orthogonal":
        ranks = st.sampled_from([2, 4])
    whole = st.lists(
        st.sampled_from([name for name in SAVED[family] if name not in layers]),
        max_size=2,
        unique=True,
    )
    return LoRAConfig(
        r=draw(ranks),
        target_modules=targets,
        exclude_modules=excluded,
        # The default of "alpha_sqrt", 256, changes these models too much in one step.
        lora_alpha=draw(alphas if scaling == "alpha_sqrt" else st.none() | alphas),
        scaling=scaling,
        lora_dropout=draw(st.sampled_from([0.0, 0.0, 0.1])),
        bias=draw(st.sampled_from(["none", "none", "all", "lora_only"])),
        init_lora_weights=initializer,
        residual=draw(st.sampled_from(["auto", "implicit"])),
        modules_to_save=draw(st.none() | whole),
        rank_pattern={key: draw(ranks) for key in draw(keys)},
        alpha_pattern={key: draw(alphas) for key in draw(keys)},
    )


# In roundings, of at most 14 layers one after the other, and of what lies between them: three times
# the worst of 6000 comparisons.
TOLERANCE = 16


def assert_near(got: Tensor, want: Tensor, case: Case, model: nn.Module) -> None:
    """Equal to some roundings of the terms that a layer sums."""
    rounding = ROUNDING[case.dtype]
    load = effort(case, model)
    difference = (got.double() - want.double()).norm() / want.double().norm()
    assert difference <= TOLERANCE * rounding * load


def effort(case: Case, model: nn.Module) -> float:
    """Σ ‖terms of a layer's sum‖ / ‖the sum‖ ≥ 1, the largest over all layers: where the subtracted
    start is larger than the result, roundings are relative to the start. Relative to ‖W‖ if the
    sum is larger, since later layers magnify roundings by that.
    """
    base, largest = case.model(), 1.0
    for name, layer in adapter_state(model).layers.items():
        module = base.get_submodule(name)
        W = module.weight.detach().double()
        W = W.T if is_conv1d(module) else W
        A, B = layer.lora_A.double(), layer.lora_B.double()
        middle = layer.middle()
        A = A if middle is None else middle.double() @ A
        terms, total = [W, layer.scaling * B @ A], W + layer.scaling * B @ A
        start = layer.start_factors()
        if start is not None:
            taken = layer.scaling * start[1].double() @ start[0].double()
            terms, total = [*terms, taken], total - taken
        smaller = torch.minimum(total.norm(), W.norm())
        largest = max(largest, float(sum(term.norm() for term in terms) / smaller))
    return largest


def is_exact(model: nn.Module) -> bool:
    """Whether nothing was absorbed, so that the base keeps its bits."""
    return not any(layer.absorbed for layer in adapted_layers(model).values())


@given(cases())
@examples
def test_the_start_is_the_base_and_so_is_the_end(case):
    """Adding an adapter changes nothing, disabling and unloading it restore the base: bit for bit
    where nothing was absorbed.
    """
    plain = case.model()
    base = case.logits(plain)
    model = case.model()
    case.add(model)
    if case.config.init_lora_weights not in _ADDING:
        assert_near(case.logits(model), base, case, model)
    model = case.trained()
    exact = is_exact(model)
    trained = case.logits(model)
    with disable_adapters(model):
        off = case.logits(model)
    assert torch.equal(case.logits(model), trained)
    disable_adapters(model)
    assert torch.equal(case.logits(model), off)
    enable_adapters(model)
    assert torch.equal(case.logits(model), trained)
    unloaded = copy.deepcopy(model)
    unload_lora(unloaded)
    if exact:
        assert torch.equal(off, base)
        assert torch.equal(case.logits(unloaded), base)
    assert_near(off, base, case, model)
    assert_near(case.logits(unloaded), base, case, model)
    assert {n: type(m) for n, m in unloaded.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    tensors, expected = unloaded.state_dict(), plain.state_dict()
    assert list(tensors) == list(expected)
    places = model.named_modules(remove_duplicate=False)
    own = {f"{name}.weight" for name, layer in places if isinstance(layer, AdaptedLayer)}
    for name, tensor in expected.items():
        assert exact or name in own or torch.equal(tensors[name], tensor)


@given(cases())
@examples
def test_merging_keeps_what_was_learnt(case):
    model = case.trained()
    trained = case.logits(model)
    merged = merge_lora(copy.deepcopy(model))
    assert_near(case.logits(merged), trained, case, model)
    assert not adapted_layers(merged) and not any(p.requires_grad for p in merged.parameters())
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in case.model().named_modules()
    }


@given(cases())
@examples
def test_files_give_it_back(case):
    """Native and PEFT folders, loaded here and by plain PEFT, onto the original base."""
    model = case.trained()
    trained = case.logits(model)
    state = adapter_state(model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_adapter(model, folder / "native", format="native")
        save_adapter(model, folder / "peft")
        rank = 2 * max(layer.r for layer in state.layers.values())
        small = save_adapter(model, folder / "compressed", compress_to=rank)
        assert small.error == 0  # 2r hold it all
        for kind in ("native", "peft", "compressed"):
            fresh = case.model()
            load_adapter(fresh, folder / kind, progress=False)
            # PEFT's format has no R: the rounded R A is stored.
            folded = any(layer.middle() is not None for layer in state.layers.values())
            if kind == "native" or (kind == "peft" and not folded):
                assert torch.equal(case.logits(fresh), trained)
                pairs = zip(model.named_parameters(), fresh.named_parameters(), strict=True)
                for (name, one), (other, two) in pairs:
                    assert name == other and torch.equal(one, two)
                    assert one.requires_grad == two.requires_grad
            assert_near(case.logits(fresh), trained, case, model)
        if case.options[2:] != ("layer",):  # PEFT adapts one of a layer's two places
            for kind in ("peft", "compressed"):
                assert_near(peft_logits(case, folder / kind), trained, case, model)


def peft_logits(case: Case, folder: Path) -> Tensor:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case.logits(peft.PeftModel.from_pretrained(case.model(), folder))


@dataclass(frozen=True)
class Fails(LoRA):
    """Raises at call number `time`."""

    time: int = 0

    def __call__(self, weight, r, scaling=1.0, gradient=None):
        object.__setattr__(self, "time", self.time - 1)
        if self.time < 0:
            raise RuntimeError("no start")
        return super().__call__(weight, r, scaling, gradient)


@given(cases(), st.data())
@examples
def test_an_error_changes_nothing(case, data):
    """Wherever it is raised, with or without another adapter present."""
    model = case.model()
    names = adapted_names(case.model(), case.config)
    victim = data.draw(st.sampled_from(names))
    if data.draw(st.booleans()):
        first = LoRAConfig(r=2, residual="implicit", target_modules=[names[0]], bias="all")
        add_lora(model, first, adapter_name="first", progress=False)
    weight = model.get_submodule(victim).weight
    kind = data.draw(st.sampled_from(["nan", "zero", "rank", "start", "name", "alpha"]))
    config, message = case.config, victim.replace(".", r"\.")
    if kind in ("nan", "zero"):
        config = replace(config, init_lora_weights=LoRAM(), scaling="lora")
        with torch.no_grad():
            if kind == "zero":
                weight.zero_()
            else:
                weight.view(-1)[data.draw(st.integers(0, weight.numel() - 1))] = torch.nan
        tied = [n for n in names if model.get_submodule(n).weight is weight]
        message = "|".join(name.replace(".", r"\.") for name in tied)
    elif kind == "rank":
        config = replace(config, rank_pattern={victim: min(weight.shape) + 1}, alpha_pattern={})
    elif kind == "start":
        time = names.index(victim)
        config = replace(config, init_lora_weights=Fails(time=time))
        message = "no start"
    elif kind == "name":
        saved = [*(config.modules_to_save or ()), "nowhere"]
        config, message = replace(config, modules_to_save=saved), "nowhere"
    else:
        config = replace(config, alpha_pattern={"nowhere": 2.0})
        message = "alpha_pattern has 'nowhere'"
    if config.initializer.needs_gradient or config.initializer.needs_activations:
        config = replace(config, init_lora_weights="lora")
    check = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        add_lora(model, config, adapter_name="second", progress=False)
    check()


@given(cases(), st.data())
@examples
def test_an_adapter_that_does_not_fit_changes_nothing(case, data):
    state = adapter_state(case.trained())
    victim = data.draw(st.sampled_from(list(state.layers)))
    kind = data.draw(st.sampled_from(["name", "shape", "tensor"]))
    layers = dict(state.layers)
    if kind == "name":
        layers["nowhere"] = layers.pop(victim)
        state = replace(state, layers=layers)
    elif kind == "shape":
        longer = torch.cat([layers[victim].lora_B] * 2)
        layers[victim] = replace(layers[victim], lora_B=longer)
        state = replace(state, layers=layers)
    else:
        state = replace(state, extra={**state.extra, "nowhere.weight": torch.ones(3)})
    model = case.model()
    check = snapshot(model)
    with pytest.raises(
        ValueError, match=victim.replace(".", r"\.") if kind == "shape" else "nowhere"
    ):
        apply_state(model, state, progress=False)
    check()


@given(cases(), st.data())
@examples
def test_several_adapters_do_not_interact(case, data):
    """On a shared base each computes what it computes alone, bit for bit, in any order of adding
    and training.
    """
    both = [case.config, data.draw(configs(case.family, case.options))]
    each = [replace(case, config=replace(config, residual="implicit")) for config in both]
    together = case.model()
    wanted = {}
    for name, alone in zip("ab", each, strict=True):
        wanted[name] = case.logits(alone.trained())
        try:
            alone.trained(together, adapter_name=name)
        except ValueError as error:  # one may adapt a layer that the other trains in full
            assert "trained in full" in str(error) or "modules_to_save" in str(error)
            reject()
        assert torch.equal(case.logits(together), wanted[name])
    for name in data.draw(st.permutations("ab")):
        set_adapter(together, name)
        assert torch.equal(case.logits(together), wanted[name])
        with disable_adapters(together):
            assert torch.equal(case.logits(together), case.logits(case.model()))
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(together, folder, format="native")
            fresh = case.model()
            load_adapter(fresh, folder, progress=False)
        assert torch.equal(case.logits(fresh), wanted[name])
    assert torch.equal(case.logits(unload_lora(together)), case.logits(case.model()))
