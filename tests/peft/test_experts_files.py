"""Files of PEFT's adapters of experts that have a start: for plain PEFT, this bridge and
`lora_kernels`, each of which reads what the others write.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..support.packages import needs_peft
from ..support.peft_models import accelerate, initialize, linear_layers
from ..support.running import logits, move, quiet
from .test_experts import adapted, base, endings, relative, wrappers

pytestmark = needs_peft


def plain(folder, family: str):
    from peft import PeftModel

    return PeftModel.from_pretrained(base(family), folder).eval()


@pytest.mark.parametrize("method", ["loram", "pissa", "lora"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "NemotronH"])
def test_folders(tmp_path, family, method):
    """They are right on the original base, and resume to the last bit."""
    from lora_kernels import load_adapter

    model = adapted(base(family))
    initialize(model, method)
    accelerate(model)
    move(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = plain(tmp_path, family)
    rank = 4 if method == "lora" else 8
    assert all(x.r["default"] == rank for x in linear_layers(loaded).values())
    assert relative(logits(loaded), want) <= 1e-6
    other = adapted(base(family))
    initialize(other, "pissa" if method == "loram" else "loram")
    accelerate(other)
    for name in ("default", "again"):
        result = other.load_adapter(tmp_path, name, is_trainable=True)
        assert not result.missing_keys and not result.unexpected_keys
        other.set_adapter(name)
        assert torch.equal(logits(other), want)
        assert {n: x.r[name] for n, x in wrappers(other).items()}["down_proj"] == 3
    own = base(family)
    load_adapter(own, tmp_path, progress=False)
    assert relative(logits(own), want) <= 1e-6


def test_experts_alone(tmp_path):
    """Without a linear layer in the adapter."""
    model = adapted(base(), target_modules=[])
    initialize(model)
    move(model)
    model.save_pretrained(tmp_path)
    assert relative(logits(plain(tmp_path, "Mixtral")), logits(model)) <= 1e-6
    other = adapted(base(), target_modules=[])
    initialize(other)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("layout", ["each", "stacked"])
@pytest.mark.parametrize("parameters", [None, ["experts.down_proj"]])
def test_reads_folders_of_save_adapter(tmp_path, layout, parameters):
    """In both layouts, with a projection that is not adapted, which the file has as zeros."""
    from lora_kernels import LoRAConfig, save_adapter

    own, parameters = base(), parameters or endings(base())
    config = LoRAConfig(
        r=4, lora_alpha=8, target_modules=["o_proj"], target_parameters=parameters,
        residual="implicit",
    )  # fmt: skip
    quiet(own, config)
    move(own)
    save_adapter(own, tmp_path, experts=layout)
    model = adapted(base(), target_parameters=parameters)
    initialize(model)
    result = model.load_adapter(tmp_path, "again")
    assert not result.missing_keys and not result.unexpected_keys
    model.set_adapter("again")
    accelerate(model)
    assert relative(logits(model), logits(own)) <= 1e-6
    for layer in wrappers(model).values():
        assert layer.r["again"] == 4 and "again" in layer.lora_start_A


def test_changed_tensors_are_a_plain_adapter(tmp_path):
    """With a warning, as those of linear layers."""
    from safetensors import safe_open

    model = adapted(base(), target_modules=[])
    initialize(model)
    move(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("experts.lora_B.weight"))
    save_file(tensors | {name: 2 * tensors[name]}, file, metadata)
    with pytest.warns(UserWarning, match="down_proj"):
        model.load_adapter(tmp_path, "changed")
    layer = wrappers(model)["down_proj"]
    assert layer.r["changed"] == 8 and "changed" not in layer.lora_start_A
