from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lora_kernels import load_adapter
from lora_kernels.model.install import adapted_layers

from ...support.running import close, logits, same_bits, token_ids
from ...support.tiny_models import llama


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in (2, 3, 4):
        ids = token_ids(seed=seed)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_peft(folder, start: str | bool) -> nn.Module:
    """Saves an adapter of PEFT before and after training; returns the model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=start)
    model = get_peft_model(llama(), config)
    model.save_pretrained(f"{folder}-start")
    trained = [p for p in model.parameters() if p.requires_grad]
    train(model, torch.optim.AdamW(trained, lr=1e-2))
    model.save_pretrained(folder)
    return model.eval()


def names(folder):
    pytest.importorskip("peft")
    peft = by_peft(folder / "from-peft", True)
    pissa = by_peft(folder / "pissa", "pissa")
    trained = {"from-peft": logits(peft), "pissa": logits(pissa)}
    return {
        **{name: llama() for name in ("model", "base", "resumed", "model_2")},
        "train": train,
        "trained": trained,
        "residual": pissa.unload(),
    }


def check(names, output, folder):
    from peft import PeftModel

    model = names["model"]
    assert "14 layers of rank 32 in adapter_model.safetensors" in output
    assert "truncated in rank and rounded to bfloat16 with a relative error" in output
    want = logits(model)
    assert not close(want, logits(llama()))
    # In PEFT, on the original base, from the folder and from the converted native one.
    assert close(logits(names["in_peft"].eval()), want)
    portable = PeftModel.from_pretrained(llama(), folder / "portable")
    assert close(logits(portable.eval()), want)
    assert json.loads((folder / "native/adapter_config.json").read_text())["peft_type"] == (
        "LORA_KERNELS"
    )
    with safe_open(folder / "native/adapter_native.safetensors", "pt") as file:
        kinds = {key.rpartition(".")[2] for key in list(file.keys())}
    assert kinds == {"lora_A", "lora_B"}  # no start: DST starts are computed again

    # What was saved is what was trained, and training has gone on as it would have here.
    again = llama()
    load_adapter(again, folder / "adapter", progress=False)
    assert same_bits(again.state_dict(), model.state_dict())
    train(model, names["optimizer"])
    assert same_bits(names["resumed"].state_dict(), model.state_dict())

    assert close(logits(names["model_2"]), names["trained"]["from-peft"])
    assert close(logits(names["residual"]), names["trained"]["pissa"])
    original = PeftModel.from_pretrained(llama(), folder / "original")
    assert close(logits(original.eval()), names["trained"]["pissa"])
    with pytest.raises(ValueError, match="residual_base=True"):
        load_adapter(llama(), folder / "pissa")

    file = folder / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        load_adapter(fresh := llama(), folder / "adapter")
    assert "\n" not in str(error.value)
    assert not adapted_layers(fresh) and same_bits(fresh.state_dict(), llama().state_dict())
