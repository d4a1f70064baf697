"""docs/guide/custom_start.md: its start, and its list of the attributes of `Initializer`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_kernels import LoRAConfig, add_lora, load_adapter
from lora_kernels.init import Initializer
from lora_kernels.init.base import _REGISTRY
from lora_kernels.model.lora import adapter_state

from ...support import ROOT
from ...support.tiny_models import llama

# What is not for subclasses to set or to override.
NOT_LISTED = {"make_start", "starts", "take_out_each_", "subtracts"}


def names(folder: Path) -> dict:
    ids = torch.randint(96, (2, 12))

    def train(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return {"model": llama(), "fresh_model": llama(), "ids": ids, "train": train}


def check(names: dict, output: str, folder: Path) -> None:
    columns = names["Columns"]
    try:
        model, fresh, ids = names["model"], names["fresh_model"], names["ids"]
        torch.testing.assert_close(names["after"], names["before"])
        with torch.no_grad():
            trained = model(input_ids=ids).logits
            assert torch.equal(fresh(input_ids=ids).logits, trained)
        assert not torch.allclose(trained, names["after"], atol=1e-3)
        assert adapter_state(fresh).config.init_lora_weights == columns(share=0.5)
        # s·B₀A₀ is half of W in the columns that the start chose, whatever s is.
        plain, by_name = llama(), llama()
        add_lora(by_name, LoRAConfig(r=4, lora_alpha=28, init_lora_weights="columns"))
        name = "model.layers.1.mlp.down_proj"
        weight, residual = (m.get_submodule(name).weight for m in (plain, by_name))
        chosen = torch.linalg.vector_norm(weight, dim=0).topk(4).indices
        assert float(residual[:, chosen].abs().max()) < 1e-6
        others = [k for k in range(weight.shape[1]) if k not in chosen]
        assert torch.equal(residual[:, others], weight[:, others])
    finally:
        del _REGISTRY["columns"]
    other = llama()
    with pytest.warns(UserWarning, match="not registered here"):
        load_adapter(other, folder / "adapter")
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, trained)
    page = (ROOT / "docs/guide/custom_start.md").read_text().split("## Class attributes")[1]
    listed = set(re.findall(r"^\| `(\w+)", page, re.MULTILINE))
    public = {n for n in {**vars(Initializer), **Initializer.__annotations__} if n[0] != "_"}
    assert listed == public - NOT_LISTED
