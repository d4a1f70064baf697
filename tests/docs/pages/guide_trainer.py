from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels.model.install import adapted_layers

from ...support.running import close, logits, same_bits, token_ids
from ...support.tiny_models import llama, word_tokenizer

PAIRS = [("the", "rank"), ("one", "svd"), ("train", "sines"), ("and", "matrix")]
TEXTS = ["the rank of a matrix", "a basis of sines", "one norm and no svd", "train and resume"]


def quantized_from(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=options, device_map={"": "cpu"}, dtype=torch.float32
    )


def names(folder):
    for package in ("accelerate", "peft", "trl", "bitsandbytes"):
        pytest.importorskip(package)
    from datasets import Dataset

    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "for-4-bits")
    pairs = [{"prompt": f"{a} a", "chosen": f" {b}", "rejected": " norm"} for a, b in PAIRS]
    models = ("model", "base", "peft_base", "sft_base", "sft_model", "dpo_base", "dpo_model")
    return {
        **{name: llama() for name in models},
        "quantized": quantized_from(folder / "for-4-bits"),
        "dataset": [{"input_ids": row, "labels": row} for row in token_ids(8)],
        "texts": Dataset.from_dict({"text": TEXTS}),
        "pairs": Dataset.from_list(pairs),
        "tokenizer": word_tokenizer(TEXTS),
    }


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def in_peft(folder: str) -> torch.Tensor:
    """The logits of plain PEFT on the original base."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(llama(), folder).eval())


def check(names, output, folder):
    model = names["model"].eval()
    assert same_bits(names["base"].state_dict(), model.state_dict())  # resumed
    assert close(in_peft("adapter"), logits(model)) and not close(logits(model), logits(llama()))
    assert close(in_peft("run-peft/checkpoint-4"), logits(names["peft_model"].eval()))
    # The parameters of the quantized model have trained, and its base is what it was.
    assert all(
        not torch.equal(layer.lora_B, layer.start_B)
        for layer in adapted_layers(names["quantized"]).values()
    )
    groups = names["optimizer"].param_groups
    assert groups[1]["lr"] == 16 * groups[0]["lr"]
    # SFT: what PEFT loads is what was trained, by both ways.
    assert close(in_peft("sft-own-adapter"), logits(names["sft_model"].eval()))
    assert close(in_peft("sft-adapter"), in_peft("sft-own-adapter"), roundings=1000)
    # DPO: no margin before the first step, and the same first update by both ways.
    by_peft, own = losses(names["trainer"]), losses(names["own"])
    assert by_peft[0] == pytest.approx(math.log(2), rel=1e-6)
    assert own == pytest.approx(by_peft, rel=1e-5) and own[1] < own[0]
    assert names["own"].ref_model is None
