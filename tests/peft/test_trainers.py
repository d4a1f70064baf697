"""Hugging Face's Trainer, and TRL's SFTTrainer and DPOTrainer, on an initialized model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ..support.packages import needs_trainer, needs_trl
from ..support.peft_models import accelerate, adapted, initialize
from ..support.running import close, logits, same_bits, token_ids, training_arguments, weights_of
from ..support.tiny_models import llama, word_tokenizer

STEPS = 6
PAIRS = [("the", "rank"), ("one", "svd"), ("train", "sines"), ("and", "matrix")]
TEXTS = ["the rank of a matrix", "a basis of sines", "one norm and no svd", "train and resume"]


class _Losses:
    """The losses logged by a Trainer."""

    def __init__(self, trainer) -> None:
        self.steps = {
            line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line
        }


def model_to_train(dropout: float = 0.1) -> nn.Module:
    model = adapted(llama(), lora_dropout=dropout)
    initialize(model, "loram")
    accelerate(model)
    return model


def trainer(model: nn.Module, folder, **options):
    from transformers import Trainer

    rows = [{"input_ids": row, "labels": row} for row in token_ids(16, seed=4)]
    arguments = training_arguments(
        folder, max_steps=STEPS, logging_steps=1, save_steps=3, **options
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])


@needs_trainer
def test_resume_is_uninterrupted_training(tmp_path):
    """The same losses and the same adapter to the last bit, dropout included."""
    whole = trainer(model_to_train(), tmp_path / "whole")
    whole.train()
    want = _Losses(whole).steps
    assert want[STEPS] < want[1] and len(want) == STEPS

    resumed = trainer(model_to_train(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    got = _Losses(resumed).steps
    assert got == want
    assert same_bits(weights_of(resumed.model), weights_of(whole.model))


@needs_trainer
def test_checkpoints_are_adapters_for_plain_peft(tmp_path):
    from peft import PeftModel

    run = trainer(model_to_train(), tmp_path)
    run.train()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / f"checkpoint-{STEPS}").eval()
    assert close(logits(loaded), logits(run.model.eval()))


@needs_trainer
def test_best_model_at_the_end(tmp_path):
    """The best model is defined as the one with the largest loss, the first; it is restored
    completely.
    """
    run = trainer(
        model_to_train(0.0),
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="loss",
        greater_is_better=True,
        gradient_checkpointing=True,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-3")
    other = model_to_train(0.0)
    other.load_adapter(best, "default")
    assert torch.equal(logits(other), logits(run.model.eval()))


@pytest.fixture
def tokenizer():
    return word_tokenizer(TEXTS)


@needs_trl
def test_sft_trainer(tmp_path, tokenizer):
    """One more line in a user's script; the losses are those without our forward."""
    from datasets import Dataset
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

    losses = []
    for fused in (True, False):
        model = adapted(llama())
        initialize(model, "loram")
        if fused:
            accelerate(model)
        run = SFTTrainer(
            model,
            SFTConfig(
                str(tmp_path / str(fused)),
                per_device_train_batch_size=2,
                max_steps=3,
                learning_rate=1e-2,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                max_length=16,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
        )
        run.train()
        losses.append(_Losses(run).steps)
        run.save_model(tmp_path / "saved")
        trained = copy.deepcopy(run.model).eval()
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
        assert close(logits(loaded), logits(trained))
    assert losses[0][3] < losses[0][1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@needs_trl
def test_dpo_trainer_refers_to_the_same_start(tmp_path, tokenizer):
    """TRL's reference is a copy of the adapter: before the first step there is no margin."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = adapted(llama())
    initialize(model, "pissa")
    accelerate(model)
    rows = [{"prompt": f"{a} a", "chosen": f" {b}", "rejected": " norm"} for a, b in PAIRS]
    run = DPOTrainer(
        model,
        args=DPOConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    run.train()
    losses = _Losses(run).steps
    # -log(sigmoid(0)); the sums of log-probabilities are equal to the bit.
    assert losses[1] == pytest.approx(math.log(2), rel=1e-6)
    assert losses[2] < losses[1]
