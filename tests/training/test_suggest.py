"""`suggest`: κ against float64 oracles and real steps of AdamW, rates that follow, and errors."""

from __future__ import annotations

import copy
import csv
import math
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.study.methods import METHODS
from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    init,
    lora_plus_groups,
    rescaling,
    suggest,
    unload_lora,
)
from lora_kernels.init.fused import within_blocks
from lora_kernels.layers.adapter import Adapter
from lora_kernels.model.install import adapted_layers
from lora_kernels.training.magnitude import adam_growth
from lora_kernels.training.rescaling import STUDY, Suggestion
from lora_kernels.training.rescaling.reference import SMALL, StudyTask
from lora_kernels.training.rescaling.step_size import LayerSize, StepSize, moving, sampled

from ..support import ROOT, tiny_models
from ..support.exhaustive import paired
from ..support.oracle import loram_beta, to_numpy
from ..support.packages import needs_bitsandbytes, needs_peft, needs_transformers
from ..support.quantized import OnlyForward, linear_4bit
from ..support.ranks import needs_ranks, on_ranks
from ..support.running import quiet, snapshot, start_data
from ..support.sharded import fully_sharded
from ..support.tiny_experts import EXPERTS, tiny_experts

R = 4
SHAPES = {"q_proj": (40, 30), "up_proj": (60, 40), "down_proj": (40, 60)}


class Blocks(nn.Module):
    """Linear layers of several shapes, in blocks, as in a transformer."""

    def __init__(self, count: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(m, n, dtype=dtype) for name, (n, m) in SHAPES.items()})
            for _ in range(count)
        )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Random ones."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: torch.randn(m.weight.shape, dtype=torch.float64) for name, m in linear.items()}


def measured(model: nn.Module, config: LoRAConfig | None = None, **options) -> Suggestion:
    return suggest(model, config, progress=False, **options)


def kappa(model: nn.Module, **options) -> float:
    """κ of a configuration with R and these options, on all layers."""
    data = {k: options.pop(k) for k in ("ratio", "gradients") if k in options}
    config = LoRAConfig(**{"r": R, "lora_alpha": R} | options)
    return measured(model, config, layers=None, **data).step_size


def product(found: rescaling.Suggestion) -> float:
    """c, by its definition."""
    return found.learning_rate * found.next_step_size


def weights(model: nn.Module) -> Iterator[np.ndarray]:
    return (to_numpy(m.weight) for m in model.modules() if isinstance(m, nn.Linear))


def mean_over(model: nn.Module, square) -> float:
    """κ, from κ² of each weight."""
    pairs = [(W.size, square(W)) for W in weights(model)]
    return math.sqrt(sum(size * own for size, own in pairs) / sum(size for size, _ in pairs))


def jacobian_square(adapter: Adapter, ratio: float = 1.0) -> float:
    """κ² of an installed adapter, one matrix, by its definition: the sum over all entries e that
    train of ‖∂(s·B R A)/∂e‖², by autograd in float64, over the number of entries of W.
    """
    names = ("lora_A", "lora_B", "lora_R", "lora_diag")
    found = {name: getattr(adapter, name) for name in names if getattr(adapter, name) is not None}
    values = {name: p.detach().double() for name, p in found.items()}
    trained = [name for name, p in found.items() if p.requires_grad]

    def product(*own: Tensor) -> Tensor:
        all_values = values | dict(zip(trained, own, strict=True))
        right, left = all_values["lora_A"], all_values["lora_B"]
        if adapter.options.parts:
            left = within_blocks(left, adapter.options.parts)
        if "lora_R" in all_values:
            right = all_values["lora_R"] @ right
        if "lora_diag" in all_values:
            right = all_values["lora_diag"][:, None] * right
        return adapter.scaling * left @ right

    inputs = tuple(values[name] for name in trained)
    jacobians = torch.autograd.functional.jacobian(product, inputs, vectorize=True)
    rates = [ratio if name == "lora_B" else 1.0 for name in trained]
    total = sum(
        rate**2 * float(own.square().sum()) for rate, own in zip(rates, jacobians, strict=True)
    )
    rows, cols = values["lora_B"].shape[0], values["lora_A"].shape[1]
    if adapter.options.parts:
        rows = sum(end - begin for begin, end in adapter.options.parts)
    return total / (rows * cols)


def jacobian_kappa(model: nn.Module, ratio: float = 1.0) -> float:
    """κ of an adapted model."""
    total = count = 0.0
    for layer in adapted_layers(model).values():
        size = layer.out_features * layer.in_features
        total, count = total + size * jacobian_square(layer.active(), ratio), count + size
    return math.sqrt(total / count)


STARTS = {
    name: getattr(init, kind)(seed=1)
    for name, kind in {
        **{"lora": "LoRA", "init_b": "InitB", "gaussian": "Gaussian", "init_ab": "InitAB"},
        **{"init_ab_plus": "InitABPlus", "orthogonal": "Orthogonal", "kasa": "KaSA"},
    }.items()
} | {
    name: name
    for name in (
        *("loram", "pissa", "milora", "olora", "mica", "lora_xs", "lora_sb", "lora_ga"),
        *("lora_one", "eva", "corda", "loftq"),
    )
}


class TestStepSize:
    @needs_transformers
    @pytest.mark.parametrize("ratio", [1.0, 16.0])
    @pytest.mark.parametrize("start", list(STARTS))
    def test_against_the_jacobian_of_what_add_lora_makes(self, start, ratio):
        """Which factors train, R, λ, ranks, s and the weights of the layers' sizes included."""
        model = tiny_models.llama(dtype=torch.float64)
        config = LoRAConfig(
            r=R,
            lora_alpha=6,
            init_lora_weights=STARTS[start],
            rank_pattern={"q_proj": 2},
            alpha_pattern={"up_proj": 9},
        )
        data = start_data(model, config)
        found = measured(model, config, ratio=ratio, layers=None, **data)
        quiet(model, config, **data)
        assert found.measured == found.layers == 14
        assert found.step_size == pytest.approx(jacobian_kappa(model, ratio), rel=1e-6)
        scalings = [layer.scaling for layer in adapted_layers(model).values()]
        assert found.scaling == (min(scalings), max(scalings))

    @pytest.mark.parametrize(
        ("start", "ratio"),
        paired(["lora", "loram", "lora_one", "mica", "lora_xs", "lora_sb"], [1.0, 4.0]),
    )
    def test_after_a_step(self, start, ratio):
        """The mean of κ² over random signs of a step, by autograd, at the rate of the study."""
        model = Blocks()
        config = LoRAConfig(r=R, lora_alpha=6, init_lora_weights=STARTS[start])
        data = {"gradients": gradients_of(model)} if config.initializer.needs_gradient else {}
        found = measured(model, config, ratio=ratio, layers=None, **data)
        quiet(model, config, **data)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        before, squares = [p.detach().clone() for _, p in trained], []
        for _ in range(20):
            with torch.no_grad():
                for (name, p), old in zip(trained, before, strict=True):
                    rate = found.learning_rate * (ratio if "lora_B" in name else 1.0)
                    p.copy_(old + rate * torch.randn_like(old).sign())
            squares.append(jacobian_kappa(model, ratio) ** 2)
        after = math.sqrt(sum(squares) / len(squares))
        assert found.next_step_size == pytest.approx(after, rel=0.01)

    @pytest.mark.parametrize("s", [1.0, 2.5])
    def test_formulas(self, s):
        """Written from the papers' formulas of the factors, in NumPy and float64."""
        model, alpha = Blocks(), s * R

        def sigma(W):
            return np.linalg.svd(W, compute_uv=False)[:R]

        def size_of(W):
            return 1 / W.shape[0] + 1 / W.shape[1]

        gradients = {
            name: torch.randn(m.weight.shape, dtype=torch.float64)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear)
        }
        exact = {
            # A = βΦₘᵀ and B = βΦₙ of orthonormal columns: ν[A] = β² / m.
            "loram": lambda W: s**2 * R * loram_beta(W, R) ** 2 * size_of(W),
            # B = U√(S/s), A = √(S/s)Vᵀ: r ν[A] = ΣS / (s m).
            "pissa": lambda W: s * sigma(W).sum() * size_of(W),
            # B = U, A = SVᵀ, and R moves: r² ν[A] ν[B].
            "lora_xs": lambda W: s**2 * R * (sigma(W) ** 2).sum() / W.size,
            "lora_sb": lambda W: s**2 * R**2 / W.size,
        }
        for start, square in exact.items():
            data = {"gradients": gradients} if start == "lora_sb" else {}
            found = kappa(model, init_lora_weights=start, lora_alpha=alpha, **data)
            assert found == pytest.approx(mean_over(model, square), rel=1e-9), start
        # Of the distributions: 200 to 500 numbers a layer.
        drawn = {
            "lora": lambda W: s**2 * R / (3 * W.shape[1]),
            "gaussian": lambda W: s**2 / R,
            "init_ab": lambda W: s**2 * R * 2 / W.shape[1],
        }
        for start, square in drawn.items():
            found = kappa(model, init_lora_weights=start, lora_alpha=alpha)
            assert found == pytest.approx(mean_over(model, square), rel=0.08), start

    def test_rules_and_lora_plus(self):
        model, lora = Blocks(), init.LoRA(seed=0)
        plain = kappa(model, init_lora_weights=lora)
        assert kappa(model, init_lora_weights=lora, use_rslora=True) == pytest.approx(
            plain * math.sqrt(R), rel=1e-12
        )
        found = measured(model, LoRAConfig(r=R, init_lora_weights=lora, scaling="alpha_sqrt"))
        assert found.step_size == pytest.approx(plain * 256 / math.sqrt(R), rel=1e-12)
        # Only B moves W while B is zero.
        assert kappa(model, init_lora_weights=lora, ratio=16) == pytest.approx(
            16 * plain, rel=1e-12
        )
        # Of LoRAM both factors do: ρ²ν[A] + ν[B].
        squares = mean_over(
            model,
            lambda W: R * loram_beta(W, R) ** 2 * (16 / W.shape[1] + 1 / W.shape[0]),
        )
        assert kappa(model, ratio=4) == pytest.approx(squares, rel=1e-9)

    @needs_transformers
    def test_conv1d(self):
        model = tiny_models.gpt2(dtype=torch.float64)
        config = LoRAConfig(r=R, lora_alpha=6)
        found = measured(model, config)
        quiet(model, config)
        assert found.step_size == pytest.approx(jacobian_kappa(model), rel=1e-6)

    @needs_transformers
    @pytest.mark.parametrize("start", ["loram", "lora_xs"])
    def test_experts(self, start):
        model = tiny_experts("Qwen3Moe", dtype=torch.float64)
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoRAConfig(
            r=R, lora_alpha=6, target_parameters=names, target_modules=["q_proj"],
            init_lora_weights=start,
        )  # fmt: skip
        found = measured(model, config, layers=None)
        total = count = 0.0
        for name, layer in parameters_of(model).items():
            for W in layer.unbind() if layer.dim() == 3 else [layer]:
                start_of = config.initializer(W, R, 1.5)
                one = 1.5**2 * adam_growth(start_of.lora_A, start_of.lora_B, start_of.lora_R)
                total, count = total + W.numel() * one, count + W.numel()
            assert layer.dim() == 2 or len(layer) == EXPERTS, name
        assert found.step_size == pytest.approx(math.sqrt(total / count), rel=1e-9)
        assert found.layers == 3 and any("experts" in note for note in found.notes)

    def test_fused_parts_are_separate_layers(self):
        fused, apart = nn.Module(), nn.Module()
        fused.qkv = nn.Linear(32, 64, dtype=torch.float64)
        for name, rows in (("q", slice(0, 32)), ("v", slice(48, 64))):
            own = nn.Linear(32, rows.stop - rows.start, dtype=torch.float64)
            own.weight.data.copy_(fused.qkv.weight[rows])
            setattr(apart, name, own)
        options = {"init_lora_weights": "pissa"}
        found = kappa(fused, fused_parts={"qkv": ((0, 32), (48, 64))}, **options)
        assert found == pytest.approx(kappa(apart, **options), rel=1e-9)
        config = LoRAConfig(r=R, lora_alpha=R, fused_parts={"qkv": (32, 16, 16)}, **options)
        whole = measured(fused, config).step_size
        quiet(fused, config)
        assert whole == pytest.approx(jacobian_kappa(fused), rel=1e-6)

    @pytest.mark.parametrize("start", ["lora", "loram", "pissa"])
    def test_quantized(self, start):
        """κ is that of the dequantized weight."""
        model, plain = Blocks(dtype=torch.float32), Blocks(dtype=torch.float32)
        for name in SHAPES:
            own = OnlyForward(model.layers[0][name].weight.detach(), None, torch.float32)
            model.layers[0][name] = own
            plain.layers[0][name].weight.data.copy_(torch.from_numpy(own.oracle()))
        options = {"init_lora_weights": init.LoRA(seed=0) if start == "lora" else start}
        assert kappa(model, **options) == pytest.approx(kappa(plain, **options), rel=1e-4)

    @needs_bitsandbytes
    def test_loftq_with_original_weights(self):
        model = Blocks(dtype=torch.float32)
        originals = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name in SHAPES:
            model.layers[0][name] = linear_4bit(model.layers[0][name])
        config = LoRAConfig(r=R, lora_alpha=R, init_lora_weights="loftq")
        with pytest.raises(ValueError, match="original_weights="):
            measured(model, config)
        found = measured(model, config, original_weights=originals)
        # The quantization error is small, and so is the step.
        assert 0 < found.step_size < kappa(Blocks(), init_lora_weights="pissa")
        other = (LoRAConfig(r=R, lora_alpha=R), 1e-3)
        again = measured(model, config, original_weights=originals, reference=other)
        assert again.step_size == found.step_size

    def test_growth_needs_no_values_of_R(self):
        A, B = torch.randn(R, 12), torch.randn(9, R)
        assert adam_growth(A, B, torch.zeros(R, R)) == adam_growth(A, B, torch.randn(R, R))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """W of q_proj, and the experts' as [E, out, in]."""
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if ".experts." in name or name.endswith("q_proj.weight")
    }


class Chain(nn.Module):
    """Two layers whose gradients are sums of many random products."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(160, 224, bias=False, dtype=torch.float64)
        self.down = nn.Linear(224, 128, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class TestRealSteps:
    @pytest.mark.parametrize(
        "start,ratio",
        [("lora", 1.0), ("lora", 16.0), ("init_ab", 1.0), ("loram", 1.0), ("loram", 4.0),
         ("pissa", 1.0), ("mica", 1.0), ("lora_xs", 1.0)],
    )  # fmt: skip
    def test_one_step_of_adamw(self, start, ratio):
        """W moves by η·κ. The signs are random up to what dA and dB have in common, a part of
        about r / n of the squares.
        """
        model, rate = Chain(), 1e-6
        seeded = {"lora": init.LoRA(seed=0), "init_ab": init.InitAB(seed=0)}
        config = LoRAConfig(r=8, lora_alpha=12, init_lora_weights=seeded.get(start, start))
        found = measured(model, config, ratio=ratio)
        quiet(model, config)
        layers = adapted_layers(model).values()
        before = [layer.effective_weight().detach() for layer in layers]
        x, target = (torch.randn(512, k, dtype=torch.float64) for k in (160, 128))
        (model(x) * target).sum().backward()
        torch.optim.AdamW(lora_plus_groups(model, rate, ratio), weight_decay=0.0).step()
        squares = [
            (layer.effective_weight().detach() - old).square().sum()
            for layer, old in zip(layers, before, strict=True)
        ]
        moved = math.sqrt(float(sum(squares)) / sum(old.numel() for old in before))
        assert moved == pytest.approx(rate * found.step_size, rel=0.05)


class TestRates:
    def test_study_is_the_reference(self):
        found = measured(Blocks(), LoRAConfig(r=R, lora_alpha=R))
        assert product(found) == pytest.approx(STUDY.product, rel=1e-12)
        assert found.low == pytest.approx(found.learning_rate / STUDY.spread)
        assert found.high == pytest.approx(found.learning_rate * STUDY.spread)
        assert found.reference == str(STUDY) and isinstance(found, rescaling.Suggestion)

    @pytest.mark.parametrize(
        "start,power", [("lora", 1), ("gaussian", 1), ("loram", 1), ("pissa", 0.5)]
    )
    def test_own_reference(self, start, power):
        """The same configuration wants the same rate; with four times the s, a fourth of it, and
        half of it if the factors are divided by √s, up to what a step does to κ.
        """
        model = Blocks()
        seeded = {"lora": init.LoRA(seed=0), "gaussian": init.Gaussian(seed=0)}
        one, four = (
            LoRAConfig(r=R, lora_alpha=alpha, init_lora_weights=seeded.get(start, start))
            for alpha in (R, 4 * R)
        )
        same = measured(model, one, reference=(one, 2e-4))
        assert same.learning_rate == pytest.approx(2e-4, rel=1e-12)
        found = measured(model, four, reference=(one, 2e-4))
        assert found.learning_rate == pytest.approx(2e-4 / 4**power, rel=1e-5)
        assert product(found) == pytest.approx(product(same), rel=1e-12)
        assert found.scaling == 4.0 and found.lora_alpha == 16 and found.config is four
        assert "at the rate 0.0002 on this model" in found.reference

    def test_lora_plus(self):
        """The reference has one rate; that of A falls by the ratio if only B moves W."""
        model, config = Blocks(), LoRAConfig(r=R, init_lora_weights=init.LoRA(seed=0), lora_alpha=8)
        found = measured(model, config, reference=(config, 3.2e-4), ratio=16)
        assert found.learning_rate == pytest.approx(3.2e-4 / 16, rel=1e-4) and found.ratio == 16
        assert product(found) == pytest.approx(
            product(measured(model, config, reference=(config, 3.2e-4))), rel=1e-12
        )
        assert "2e-05 for A, 0.00032 for B" in str(found)

    def test_data_goes_to_the_start_that_needs_it(self):
        model = Blocks()
        gradients = gradients_of(model)
        one, other = (
            LoRAConfig(r=R, lora_alpha=R, init_lora_weights=start) for start in ("loram", "lora_sb")
        )
        there = measured(model, one, reference=(other, 1e-3), gradients=gradients)
        back = measured(model, other, reference=(one, there.learning_rate), gradients=gradients)
        assert back.learning_rate == pytest.approx(1e-3, rel=1e-9)
        with pytest.raises(ValueError, match="LoRAM does not use gradients"):
            measured(model, one, reference=(one, 1e-3), gradients=gradients)

    @pytest.mark.parametrize(
        "options,expected",
        [
            # (lora_alpha, rule, s) at r = 4
            ({"init_lora_weights": "lora"}, (16, "rslora", 8)),
            ({"init_lora_weights": "lora", "scaling": "rslora"}, (16, "rslora", 8)),
            ({"init_lora_weights": "mica", "use_rslora": True}, (16, "rslora", 8)),
            ({"init_lora_weights": "lora", "scaling": "lora"}, (4, "lora", 1)),
            ({"init_lora_weights": "lora", "scaling": "alpha_sqrt"}, (256, "alpha_sqrt", 128)),
            ({"init_lora_weights": "loram"}, (4, "lora", 1)),
            ({"init_lora_weights": "loram", "use_rslora": True}, (2, "rslora", 1)),
            ({"init_lora_weights": "init_ab_plus"}, (4, "lora", 1)),
            ({"init_lora_weights": "pissa"}, (4, "lora", 1)),
            ({"init_lora_weights": "lora_xs"}, (4, "lora", 1)),
            ({"init_lora_weights": "loram", "lora_alpha": 6}, (6, "lora", 1.5)),
        ],
    )
    def test_open_s(self, options, expected):
        """Proposed, said, and what `add_lora` then has; what was given stays."""
        model, config = Blocks(), LoRAConfig(r=R, **options)
        before = copy.deepcopy(config)
        found = measured(model, config)
        assert (found.lora_alpha, found.scaling_rule, found.scaling) == expected
        assert config == before
        said = any("s was left open" in note or "constant" in note for note in found.notes)
        assert said == ("lora_alpha" not in options)
        rows = quiet(model, found.config).adapted
        assert {(row.lora_alpha, row.scaling) for row in rows} == {(expected[0], expected[2])}

    @pytest.mark.parametrize("start", ["lora", "mica"])
    def test_with_rslora_the_rate_does_not_depend_on_the_rank(self, start):
        """As the note says; of A's random numbers, to their deviation."""
        rates = [
            measured(Blocks(), LoRAConfig(r=r, init_lora_weights=start)).learning_rate
            for r in (2, 4, 8, 16)
        ]
        assert max(rates) / min(rates) < 1.1

    def test_ranges_of_s(self):
        config = LoRAConfig(r=R, lora_alpha=R, rank_pattern={"q_proj": 2})
        found = measured(Blocks(), config)
        assert found.scaling == (1.0, 2.0) and "(s=1 to 2)" in str(found)


class TestLayers:
    @pytest.mark.parametrize("start", ["pissa", "lora_xs"])
    def test_slow_starts_are_sampled(self, start):
        """Within the layers of a kind κ² varies by some per cent here, so the mean is close."""
        model = Blocks(12)
        config = LoRAConfig(r=R, lora_alpha=R, init_lora_weights=start)
        some, all_of_them = measured(model, config), measured(model, config, layers=None)
        assert (some.measured, some.layers) == (12, 36)
        assert (all_of_them.measured, all_of_them.layers) == (36, 36)
        assert some.step_size == pytest.approx(all_of_them.step_size, rel=0.02)
        assert "12 of 36 layers" in str(some) and "all 36 layers" in str(all_of_them)
        assert measured(model, config, layers=100).step_size == all_of_them.step_size
        assert measured(model, config, layers=1).measured == 3

    @pytest.mark.parametrize("start", ["lora", "loram", "init_ab"])
    def test_others_are_not(self, start):
        config = LoRAConfig(r=R, lora_alpha=R, init_lora_weights=start)
        assert measured(Blocks(12), config, layers=1).measured == 36

    def test_kinds_and_spacing(self):
        def size(name: str, r: int = R) -> LayerSize:
            return LayerSize(name, (8, 6), r, 1.0, 48)

        layers = [size(f"h.{k}.{name}") for k in range(9) for name in ("q", "v")] + [
            size("h.9.q", 2)
        ]
        names = [layer.name for layer in sampled(layers, 3)]
        assert names == ["h.1.q", "h.4.q", "h.7.q", "h.1.v", "h.4.v", "h.7.v", "h.9.q"]
        assert sampled(layers, None) and len(sampled(layers, None)) == len(layers)
        # A kind counts with all its layers, by the mean of those that were measured.
        pair = [size("h.0.q"), size("h.1.q"), LayerSize("up", (4, 4), R, 2.0, 16)]
        step = StepSize.of(pair, {"h.1.q": 4.0, "up": 1.0})
        assert step.value == pytest.approx(math.sqrt((2 * 48 * 4 + 16) / (2 * 48 + 16)))
        assert (step.measured, step.layers, step.scaling) == (2, 3, (1.0, 2.0))
        with pytest.raises(ValueError, match="the step size of this start is 0"):
            StepSize.of(pair, {"h.1.q": 0.0, "up": 0.0})


class TestNotes:
    def test_limits_of_the_study(self):
        notes = " ".join(measured(Blocks(), LoRAConfig(r=16, lora_alpha=16)).notes)
        assert "SmolLM2-135M with 135M, all-MiniLM-L6-v2 with 23M parameters" in notes
        assert "Long runs, large batches and large models were not measured" in notes
        assert "tune around this rate" in notes and "does not have" not in notes
        model = Blocks()
        config = LoRAConfig(r=2, lora_alpha=1, init_lora_weights="gaussian")
        notes = " ".join(measured(model, config).notes)
        assert "does not have the start gaussian, r = 2, s = 0.5: κ is measured" in notes

    def test_small_factors(self):
        """κ is not that of the start for long: the rate is that of the κ after a step."""
        model = Blocks()
        config = LoRAConfig(r=R, lora_alpha=R, init_lora_weights=init.LoRAOne(gamma=1e9))
        found = measured(model, config, gradients=gradients_of(model))
        assert found.next_step_size > 5 * found.step_size
        assert product(found) == pytest.approx(STUDY.product, rel=1e-12)
        assert any("factors of this start are small" in note for note in found.notes)
        plain = measured(model, LoRAConfig(r=R, lora_alpha=R)).notes
        assert not any("factors of this start are small" in note for note in plain)

    def test_what_is_not_in_kappa(self):
        model = Blocks()
        plain = measured(model, LoRAConfig(r=R, lora_alpha=R))
        found = measured(model, LoRAConfig(r=R, lora_alpha=R, use_dora=True, bias="lora_only"))
        assert found.step_size == plain.step_size
        notes = " ".join(found.notes)
        assert "DoRA's magnitudes" in notes and f"c = {STUDY.product:.2g}" in notes
        assert "DoRA" not in " ".join(plain.notes)

    @needs_transformers
    @pytest.mark.parametrize("tied", [False, True])
    def test_embeddings(self, tied):
        model = tiny_models.llama(tied=tied)
        one = LoRAConfig(r=R, lora_alpha=R, target_modules=["q_proj"])
        names = ["q_proj", "embed_tokens"]
        both = LoRAConfig(r=R, lora_alpha=R, target_modules=names, ensure_weight_tying=tied)
        found = measured(model, both)
        assert found.step_size == measured(model, one).step_size and found.layers == 2
        left = "model.embed_tokens, lm_head" if tied else "model.embed_tokens"
        assert any(f"Not in κ: {left}." in note for note in found.notes)
        only = LoRAConfig(r=R, target_modules=["embed_tokens"])
        with pytest.raises(ValueError, match="only embeddings are adapted"):
            measured(model, only)

    def test_text(self):
        config = LoRAConfig(r=R, init_lora_weights="lora")
        text = str(measured(Blocks(), config))
        head, step, source, *notes = text.splitlines()
        assert head.startswith("lora, r=4, lora_alpha=16 by rslora (s=8): learning rate ")
        assert step.startswith("  step size κ = ") and "all 3 layers" in step
        c = f"{STUDY.product:.2g}"
        assert source.startswith(f"  c = learning rate · κ = {c}, from the study of SmolLM2-135M")
        assert notes and all(line.startswith("  - ") and line.endswith(".") for line in notes)


class TestNothingChanges:
    @needs_transformers
    @pytest.mark.parametrize(
        "start", ["lora", "init_ab", "kasa", "loram", "pissa", "loftq", "lora_xs", "lora_sb", "eva"]
    )
    def test_model_and_generator(self, start):
        model = tiny_models.llama()
        config = LoRAConfig(r=R, init_lora_weights=start, modules_to_save=["lm_head"])
        data = start_data(model, config)
        if start in ("loftq", "lora_sb"):  # also with something that trains already
            model.model.norm.weight.requires_grad_(False)
        check, state = snapshot(model), torch.get_rng_state()
        first = measured(model, config, **data)
        check()
        assert torch.equal(torch.get_rng_state(), state)
        # The start is drawn from the generator's state, as add_lora's.
        assert measured(model, config, **data) == first

    @needs_transformers
    def test_nor_after_an_error(self):
        model = tiny_models.llama()
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
        check, state = snapshot(model), torch.get_rng_state()
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .* NaN"):
            measured(model, LoRAConfig(r=R))
        check()
        assert torch.equal(torch.get_rng_state(), state)

    @needs_transformers
    def test_after_unloading(self):
        model, config = tiny_models.llama(), LoRAConfig(r=R, residual="implicit")
        first = measured(model, config)
        quiet(model, config)
        unload_lora(model)
        assert measured(model, config) == first


class TestErrors:
    @pytest.mark.parametrize(
        "options,error,match",
        [
            ({"optimizer": "sgd"}, ValueError, "'sgd' is not supported: κ is the size of Adam's"),
            (
                {"optimizer": "AdamW"},
                ValueError,
                "expected one of adamw, adam; did you mean 'adamw'",
            ),
            ({"ratio": 0}, ValueError, "ratio must be positive"),
            ({"ratio": "16"}, TypeError, "ratio must be a number"),
            ({"layers": 0}, ValueError, "layers must be at least 1"),
            ({"layers": 2.0}, TypeError, "layers must be an integer"),
            ({"config": {"r": 4}}, TypeError, "config must be a LoRAConfig, got dict"),
            ({"config": LoRAConfig(r=99)}, ValueError, "no layer of Blocks is left to adapt"),
            (
                {"config": LoRAConfig(r=4, target_modules=["q_prok"])},
                ValueError,
                "did you mean 'q_proj'",
            ),
            ({"reference": 2e-4}, TypeError, "reference must be a tuple of a LoRAConfig and"),
            ({"reference": (LoRAConfig(),)}, TypeError, "reference must be a tuple"),
            ({"reference": (2e-4, LoRAConfig())}, TypeError, "the learning rate comes second"),
            ({"reference": (LoRAConfig(), -1.0)}, ValueError, "learning rate of reference must be"),
            ({"gradients": {}}, ValueError, "LoRAM does not use gradients"),
            ({"activations": {}}, ValueError, "LoRAM does not use activations"),
            ({"original_weights": {}}, ValueError, "LoRAM does not use original_weights"),
            (
                {"config": LoRAConfig(r=4, init_lora_weights="lora_sb")},
                ValueError,
                r"pass gradients=capture_gradients\(model, batches\)",
            ),
            (
                {"config": LoRAConfig(r=4, init_lora_weights="eva")},
                ValueError,
                r"pass activations=capture_activations\(model, batches\)",
            ),
        ],
    )
    def test_arguments(self, options, error, match):
        with pytest.raises(error, match=match):
            measured(Blocks(), **options)

    def test_models(self):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            measured({})
        model = Blocks()
        add_lora(model, LoRAConfig(r=R), progress=False)
        with pytest.raises(ValueError, match=r"has adapters \(default\).*or after unload_lora"):
            measured(model)
        model = Blocks()
        model.layers[0]["q_proj"] = LoRALinear.from_linear(model.layers[0]["q_proj"], r=R)
        with pytest.raises(ValueError, match=r"layers\.0\.q_proj is adapted already"):
            measured(model)
        with torch.device("meta"):
            model = Blocks()
        with pytest.raises(ValueError, match=r"meta device: call suggest once the weights are"):
            measured(model)

    @needs_peft
    def test_pefts_model(self):
        import peft

        model = peft.get_peft_model(Blocks(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(TypeError, match="call suggest before get_peft_model"):
            measured(model)

    @needs_transformers
    @needs_ranks
    def test_sharded(self):
        def work(rank: int) -> str:
            model = fully_sharded(tiny_models.llama())
            with pytest.raises(ValueError, match="is sharded: call suggest before") as caught:
                measured(model, LoRAConfig(r=R))
            return str(caught.value)

        assert on_ranks(2, work)

    @needs_ranks
    def test_weights_of_the_first_process_alone(self):
        def work(rank: int) -> str:
            for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
                os.environ[name] = "true"  # of this process, a forked one
            with pytest.raises(ValueError, match="only the first process has the") as caught:
                measured(Blocks(), LoRAConfig(r=R))
            return str(caught.value)

        assert on_ranks(2, work)


def test_the_study():
    """The constants are those of the published rates."""
    file = ROOT / "benchmarks" / "results" / "study" / "rates.csv"
    if not file.is_file():
        pytest.skip("the study's rates are not published yet")
    with file.open(encoding="utf-8") as opened:
        every = list(csv.DictReader(opened))
    full = [float(row["rate"]) for row in every if row["method"] == "full"]
    assert STUDY.full == (min(full), max(full))
    rows = [row for row in every if row["method"] != "full"]
    small = [row for row in rows if _has_small_factors(_step_of(row))]
    usual = [row for row in rows if row not in small]
    assert {row["method"] for row in small} == {"lora_one"}
    products = [_rate(row) * _step_of(row).after(_rate(row)) for row in usual]
    assert STUDY.product == pytest.approx(np.exp(np.log(products).mean()), rel=0.05)
    farthest = np.exp(np.abs(np.log([_rate_over_predicted(row) for row in usual])).max())
    assert STUDY.spread == pytest.approx(farthest, rel=0.05)
    ratios = [_rate_over_predicted(row) for row in small]
    assert STUDY.small_factors == pytest.approx((min(ratios), max(ratios)), rel=0.05)
    assert {task.name for task in STUDY.tasks} == {row["task"] for row in rows}
    assert set(STUDY.ranks) == {int(row["r"]) for row in rows}
    scalings = [float(row["scaling"]) for row in rows]
    assert STUDY.scalings == pytest.approx((min(scalings), max(scalings)), rel=0.01)
    assert set(STUDY.starts) == {_start_of(row["method"]) for row in rows}
    assert all(isinstance(task, StudyTask) for task in STUDY.tasks)


def _rate(row: dict[str, str]) -> float:
    return float(row["rate"])


def _has_small_factors(step: StepSize) -> bool:
    return step.after(step.rate(STUDY.product)) > SMALL * step.value


def _rate_over_predicted(row: dict[str, str]) -> float:
    return _rate(row) / _step_of(row).rate(STUDY.product)


def _step_of(row: dict[str, str]) -> StepSize:
    """κ of a row of rates.csv, and what a step adds to it: every layer has the same r and s."""
    r, s, method = int(row["r"]), float(row["scaling"]), METHODS[row["method"]]
    adds = moving(init.get_initializer(method.start(0)), method.ratio)
    return StepSize(float(row["step_size"]), 1, 1, (s, s), (r, r), adds * r * s**2)


def _start_of(method: str) -> str:
    """The name of the start of a method of the study; another s or rate is no start of its own."""
    start = METHODS[method].start(0)
    return start if isinstance(start, str) else type(start).__name__.lower()
