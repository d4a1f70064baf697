"""Renamed adapters: the same update under other names, in our files, in PEFT, and in add_lora."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_kernels import add_lora, load_adapter
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
from lora_kernels.files.serving.rename import renamed
from lora_kernels.model.config import AdapterState, LoRAConfig

from ...support.adapters import (
    IDS,
    LLAMA_LAYERS,
    adapt_model,
    assert_agree,
    assert_same,
    logits_64,
    peft_config,
    peft_logits,
    tiny_model,
)

OLD, NEW = "model.", "language_model.model."


class Nested(nn.Module):
    """A model that holds a text model as `language_model`, as multimodal ones do."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.language_model = copy.deepcopy(text)
        self.vision = nn.Linear(64, 64)

    def forward(self, ids):
        return self.language_model(ids)


def adapted(**options) -> tuple[AdapterState, dict]:
    """An adapter of a tiny Llama, and its ΔW."""
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": "loram", **options}
    options.setdefault("target_modules", ["q_proj", "v_proj", "up_proj", "down_proj"])
    return adapt_model(tiny_model("llama"), LLAMA_LAYERS, LoRAConfig(**options))


def inside(names) -> list[str]:
    return [f"language_model.{name}" for name in names]


def with_head(state: AdapterState) -> AdapterState:
    return replace(state, extra={"lm_head.weight": torch.randn(96, 64)})


class TestAdapter:
    @pytest.mark.parametrize("form", ["peft", "native"])
    def test_the_same_update_after_writing_and_reading(self, form, tmp_path):
        state, deltas = adapted(
            rank_pattern={"up_proj": 2}, modules_to_save=["model.norm"], use_rslora=True
        )
        state.extra = {"model.norm.weight": torch.randn(64)}
        before = copy.deepcopy(state)
        moved = renamed(state, OLD, NEW)
        assert_same(state, before)  # it is another object
        assert list(moved.layers) == inside(LLAMA_LAYERS)
        assert list(moved.extra) == ["language_model.model.norm.weight"]
        assert moved.config.modules_to_save == ("language_model.model.norm",)
        write_adapter(tmp_path, moved, format=form)
        assert_same(read_adapter(tmp_path), moved)
        model = Nested(tiny_model("llama"))
        report = load_adapter(model, tmp_path, progress=False)
        assert [row.name for row in report.adapted] == inside(LLAMA_LAYERS)
        want = logits_64(tiny_model("llama"), deltas, IDS, state.extra)
        assert_agree(model(IDS).logits, want)

    def test_back_again_is_the_same(self):
        state, _ = adapted(
            modules_to_save=["norm", "model.embed_tokens"], exclude_modules=["vision"]
        )
        state.extra = {"model.norm.weight": torch.randn(64)}
        assert_same(renamed(renamed(state, OLD, NEW), NEW, OLD), state)
        # A prefix added to all names, and removed again; with and without the dot.
        assert_same(renamed(renamed(state, "", "language_model"), "language_model.", ""), state)
        assert "lm_head.weight" in renamed(with_head(state), OLD, NEW).extra
        assert "a.lm_head.weight" in renamed(with_head(state), "", "a").extra
        assert list(renamed(state, "", "a.b").layers) == [f"a.b.{name}" for name in LLAMA_LAYERS]

    def test_peft_loads_it_on_the_nested_model(self, tmp_path):
        state, deltas = adapted(use_rslora=True, alpha_pattern={"q_proj": 2.5})
        write_adapter(tmp_path, renamed(state, OLD, NEW))
        assert peft_config(tmp_path)["target_modules"] == sorted(inside(LLAMA_LAYERS))
        _, got = peft_logits(Nested(tiny_model("llama")), tmp_path)
        assert_agree(got, logits_64(tiny_model("llama"), deltas, IDS))

    def test_names_without_the_prefix_stay(self):
        state, _ = adapted()
        first, *_ = LLAMA_LAYERS
        part = renamed(state, "model.layers.0", "model.layers.7")
        assert [n for n in part.layers if n not in LLAMA_LAYERS] == [
            name.replace(".0.", ".7.") for name in LLAMA_LAYERS if ".0." in name
        ]
        assert part.layers[first.replace(".0.", ".7.")] is state.layers[first]
        # Whole parts only: "model.layers.1" is no prefix of model.layers.11.
        state.layers["model.layers.11.q_proj"] = state.layers[first]
        assert "model.layers.11.q_proj" in renamed(state, "model.layers.1", "x").layers
        whole = renamed(replace(state, layers={"head": state.layers[first]}), "head", "lm.head")
        assert list(whole.layers) == ["lm.head"]


class TestConfiguration:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"target_modules": "all-linear"},
            {"target_modules": LLAMA_LAYERS},
            {"target_modules": r"model\.layers\.\d\.(self_attn\.[qv]|mlp\.(up|down))_proj"},
            {"target_modules": r".*(q_proj|v_proj|up_proj|down_proj)"},
            {
                "target_modules": [
                    "model.layers.0.mlp.up_proj",
                    "q_proj",
                    "v_proj",
                    "down_proj",
                    "layers.1.mlp.up_proj",
                ]
            },
            {"exclude_modules": ["model.layers.0.mlp.gate_proj", "o_proj"]},
            {"exclude_modules": r"model\.layers\.\d\.mlp\.gate_proj"},
            {"rank_pattern": {"q_proj": 2, r"^model\.layers\.0\.mlp\.up_proj": 1}},
            {"rank_pattern": {r"model\.layers\.1\.mlp\..*": 2}, "alpha_pattern": {"v_proj": 2.5}},
            {"alpha_pattern": {r"^model\.layers\.0\..*": 0.3}, "lora_alpha": None},
        ],
    )
    def test_it_means_the_same_layers_ranks_and_strengths(self, options):
        state, _ = adapted(**options)
        moved = renamed(state, OLD, NEW)
        for name in LLAMA_LAYERS:
            now = f"language_model.{name}"
            assert moved.config.layer_rank(now) == state.config.layer_rank(name)
            assert moved.config.layer_scaling(now) == state.config.layer_scaling(name)
            assert moved.layers[now].scaling == moved.config.layer_scaling(now)
        if options.get("target_modules") != "all-linear":
            model = Nested(tiny_model("llama"))
            report = add_lora(model, moved.config, progress=False)
            assert sorted(row.name for row in report.adapted) == sorted(moved.layers)

    def test_endings_and_patterns_stay(self):
        options = {"rank_pattern": {"up_proj": 2}, "exclude_modules": ["o_proj"]}
        state, _ = adapted(modules_to_save=["embed_tokens"], **options)
        assert renamed(state, OLD, NEW).config == state.config

    def test_saved_modules_with_a_part_of_the_prefix(self, tmp_path):
        state, _ = adapted(modules_to_save=["model.norm"])
        state = renamed(state, OLD, "text.model.")
        state.extra = {"text.model.norm.weight": torch.randn(64)}
        short = renamed(
            replace(state, config=replace(state.config, modules_to_save=["model.norm"])),
            "text.model",
            "",
        )
        write_adapter(tmp_path, short)
        assert peft_config(tmp_path)["modules_to_save"] == ["norm"]


class TestErrors:
    @pytest.mark.parametrize(
        ("old", "new", "match"),
        [
            ("modle.", "x.", r"'modle\.'.*model\.layers\.0\.self_attn\.q_proj,.*\.\.\..*'model'"),
            ("mod", "x.", "no layer's name begins with"),
            ("layers", "x", "no layer's name begins with"),
            ("model..layers", "x", "'model..layers' has an empty part"),
            ("model", ".x", "new prefix '.x' has an empty part"),
            ("model.layers.0", "model.layers.1", "would both be called"),
            (LLAMA_LAYERS[0], "", "would have no name"),
        ],
    )
    def test_prefixes(self, old, new, match):
        state, _ = adapted()
        before = copy.deepcopy(state)
        with pytest.raises(ValueError, match=match):
            renamed(state, old, new)
        assert_same(state, before)

    def test_tensors_of_saved_modules_collide_too(self):
        state, _ = adapted()
        state.extra = {"model.norm.weight": torch.ones(1), "norm.weight": torch.ones(1)}
        with pytest.raises(
            ValueError, match=r"'model\.norm\.weight' and 'norm\.weight' would both"
        ):
            renamed(state, "model", "")
