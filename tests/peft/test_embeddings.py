"""`initialize` on PEFT's embeddings: starts, files, merging, mixed batches, scaled embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels.model.install import adapted_layers

from ..support.packages import needs_peft
from ..support.peft_models import adapted, initialize
from ..support.running import close, logits, move, token_ids
from ..support.tiny_models import llama

pytestmark = needs_peft

NAME = "model.embed_tokens"


def with_embedding(tied: bool = False) -> nn.Module:
    return adapted(llama(tied), target_modules=["embed_tokens", "q_proj"])


def layer_of(model: nn.Module):
    return model.base_model.model.get_submodule(NAME)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["loram", "pissa", "lora"])
def test_from_start_to_file(method, tied, tmp_path):
    base = llama(tied)
    first = logits(base)
    model = with_embedding(tied).eval()
    report = initialize(model, method)
    assert NAME in report.layers and not report.left
    layer = layer_of(model)
    # As PEFT's own: a start of zeros is in A, and only occurring tokens move.
    assert bool(layer.lora_embedding_A["default"].any()) == (method != "lora")
    assert bool(layer.lora_embedding_B["default"].any())
    assert torch.equal(logits(model), first)
    move(model)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    from peft import PeftModel

    assert close(logits(PeftModel.from_pretrained(llama(tied), tmp_path)), trained)
    ours = llama(tied)
    lora_kernels.load_adapter(ours, tmp_path, progress=False)
    assert close(logits(ours), trained)
    found = adapted_layers(ours)[NAME]
    assert torch.equal(found.lora_A, layer.lora_embedding_A["default"])
    assert torch.equal(found.lora_B, layer.lora_embedding_B["default"])
    again = with_embedding(tied).eval()
    initialize(again, "loram")
    again.load_adapter(tmp_path, "again")
    again.set_adapter("again")
    assert torch.equal(logits(again), trained)
    other = with_embedding(tied).eval()
    initialize(other, "pissa")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), trained)
    report.undo()
    assert not any("lora_start" in key for key in model.state_dict())


def test_merging_and_mixed_batches():
    model = with_embedding().eval()
    base = logits(llama())
    initialize(model, "loram")
    move(model)
    trained = logits(model)
    ids = token_ids()
    mixed = model(input_ids=ids, adapter_names=["default", "__base__", "default"]).logits
    assert close(mixed[0], trained[0]) and close(mixed[2], trained[2])
    assert close(mixed[1], base[1])
    twin = copy.deepcopy(model)
    model.merge_adapter()
    assert close(logits(model), trained)
    model.unmerge_adapter()
    assert close(logits(model), trained)
    assert close(logits(twin.merge_and_unload()), trained)


def test_a_scaled_embedding(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    base = nn.Sequential(Gemma3TextScaledWordEmbedding(40, 16, 0, embed_scale=4.0))
    tokens = torch.randint(0, 40, (2, 5))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0"], r=4))
    initialize(model, "loram")
    assert torch.equal(model(tokens), base(tokens))
    move(model)
    trained = model(tokens)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert close(plain(tokens), trained)
    lora_kernels.load_adapter(base, tmp_path, progress=False)
    assert close(base(tokens), trained)
    assert close(model.merge_and_unload()(tokens), trained)


def test_the_reference_model_of_trl():
    """`add_adapter` with the configuration of an adapter that subtracts."""
    model = with_embedding().eval()
    initialize(model, "loram")
    move(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(logits(model), logits(llama()))
