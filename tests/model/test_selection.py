"""Which layers an adapter is put on, and with what rank and scaling: PEFT's rules."""

from __future__ import annotations

import copy
import warnings

import pytest

from lora_kernels import LoRAConfig
from lora_kernels.model.install import adapted_layers

from ..support.packages import needs_transformers
from ..support.running import quiet
from ..support.tiny_models import gpt2, llama

pytestmark = needs_transformers


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
    """Without entries for the other model family, which PEFT ignores and `add_lora` refuses."""
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


def test_an_adapter_may_be_called_like_a_module():
    """Its own modules are none of those that an option names."""
    model = llama()
    options = {"r": 2, "residual": "implicit", "target_modules": ["q_proj"]}
    for name in ("q_proj", "lm_head"):
        quiet(model, LoRAConfig(**options, modules_to_save=["lm_head"]), adapter_name=name)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "lm_head.weight",
        *(
            f"model.layers.{k}.self_attn.q_proj.adapters.lm_head.lora_{half}"
            for k in range(2)
            for half in "AB"
        ),
    }
