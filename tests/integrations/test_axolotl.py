"""The plugin for Axolotl, called as Axolotl calls it, on a tiny model."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from ..support import ROOT
from ..support.packages import needs_peft
from ..support.peft_models import adapted, linear_layers
from ..support.running import close, logits
from ..support.tiny_models import llama, mixtral

pytestmark = [
    needs_peft,
    pytest.mark.skipif(find_spec("pydantic") is None, reason="needs pydantic, as Axolotl does"),
]
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class BasePlugin:
    """What the plugin uses of the class in axolotl 0.19.0, axolotl/integrations/base.py."""

    def get_input_args(self):
        return None

    def register(self, cfg):
        pass

    def pre_lora_load(self, cfg, model):
        pass

    def post_lora_load(self, cfg, model):
        pass

    def post_model_load(self, cfg, model):
        pass


@pytest.fixture
def axolotl(monkeypatch) -> ModuleType:
    """`lora_kernels.integrations.axolotl`, over the installed Axolotl or the class above."""
    name = "lora_kernels.integrations.axolotl"
    if find_spec("axolotl") is None:
        for parent in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def plugin(axolotl):
    """Found by the name that the example's configuration has, as `load_plugin` does."""
    yaml = pytest.importorskip("yaml")
    options = yaml.safe_load((ROOT / "examples/axolotl.yml").read_text(encoding="utf-8"))
    module, _, name = options["plugins"][0].rpartition(".")
    return getattr(importlib.import_module(module), name)()


def checked(plugin, **cfg) -> dict:
    """The configuration after the plugin was registered and pydantic has checked the options, in a
    class that Axolotl makes of its own and the plugin's; without options, all kernels are on.
    """
    from pydantic import BaseModel, model_validator

    class Own(BaseModel):
        adapter: str | None = None
        lora_model_dir: str | None = None
        relora: bool | None = None
        use_scattermoe: bool | None = None
        trl: dict | None = None
        lora_mlp_kernel: bool | None = None
        lora_qkv_kernel: bool | None = None
        lora_o_kernel: bool | None = None
        lora_embedding_kernel: bool | None = None

        @model_validator(mode="before")
        @classmethod
        def auto_enable(cls, data):
            if all(data.get(name) is None for name in KERNELS):
                data |= dict.fromkeys(KERNELS, True)
            return data

    plugin.register(cfg)
    module, _, name = plugin.get_input_args().rpartition(".")
    args = getattr(importlib.import_module(module), name)
    config = type("Config", (Own, args), {})(**cfg)
    return config.model_dump(exclude_none=True)


def test_starts_and_accelerates(plugin):
    cfg = checked(plugin, adapter="lora", lora_kernels_init="loram", lora_kernels_accelerate=True)
    assert not any(cfg[name] for name in KERNELS)
    base = llama()
    model = adapted(base)
    plugin.pre_lora_load(cfg, base)
    plugin.post_lora_load(cfg, model)
    plugin.post_model_load(cfg, model)
    for layer in linear_layers(model).values():
        assert layer.lora_B["default"].weight.abs().max() > 0
        assert "forward" in vars(layer)
    assert close(logits(model), logits(base))


def test_the_examples_options_are_valid(plugin):
    yaml = pytest.importorskip("yaml")
    options = yaml.safe_load((ROOT / "examples/axolotl.yml").read_text(encoding="utf-8"))
    known = ("adapter", "lora_kernels_init", "lora_kernels_accelerate")
    cfg = checked(plugin, **{name: options[name] for name in known})
    assert cfg["lora_kernels_init"] == "loram" and cfg["lora_kernels_accelerate"]


def test_without_options_nothing_happens(plugin):
    cfg = checked(plugin, adapter="lora")
    assert all(cfg[name] for name in KERNELS)
    model = adapted(llama())
    plugin.post_lora_load(cfg, model)
    for layer in linear_layers(model).values():
        assert layer.lora_B["default"].weight.abs().max() == 0
        assert "forward" not in vars(layer)


def test_a_start_of_zero_keeps_the_kernels(plugin):
    cfg = checked(plugin, adapter="lora", lora_kernels_init="lora")
    assert all(cfg[name] for name in KERNELS)


def test_a_trained_adapter_keeps_its_factors(plugin):
    cfg = checked(plugin, adapter="lora", lora_kernels_init="loram", lora_model_dir="trained")
    model = adapted(llama(), init_lora_weights=False)
    layers = linear_layers(model).values()
    before = [layer.lora_B["default"].weight.clone() for layer in layers]
    plugin.post_lora_load(cfg, model)
    after = [layer.lora_B["default"].weight for layer in layers]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"lora_kernels_init": "lorm"}, "did you mean 'loram'"),
        ({"lora_kernels_init": "eva"}, "eva is computed from gradients or activations"),
        ({"lora_kernels_init": "loram", "adapter": None}, "need adapter: lora, or"),
        (
            {"lora_kernels_accelerate": True, "adapter": None},
            "need adapter: lora, or adapter: qlora",
        ),
        (
            {"lora_kernels_init": "loram", "lora_mlp_kernel": True},
            "lora_mlp_kernel would lose what lora_kernels_init: loram subtracts",
        ),
        ({"lora_kernels_init": "pissa", "relora": True}, "relora resets the adapter"),
        (
            {"lora_kernels_init": "loram", "trl": {"use_vllm": True, "async_prefetch": True}},
            "set trl.vllm_lora_sync: true",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(cfg, message, plugin):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=message):
        checked(plugin, **{"adapter": "lora"} | cfg)


def test_kernels_for_experts(plugin):
    """They read the factors of PEFT's wrappers, and are fine where experts have no adapter."""
    cfg = checked(plugin, adapter="lora", lora_kernels_init="loram", use_scattermoe=True)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(mixtral(), target_modules=["q_proj"], target_parameters=names)
    with pytest.raises(ValueError, match="use_scattermoe would lose"):
        plugin.post_lora_load(cfg, model)
    plugin.post_lora_load(cfg, adapted(mixtral(), target_modules=["q_proj"]))
