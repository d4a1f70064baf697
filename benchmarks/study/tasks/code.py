"""SmolLM2-135M on the problems and solutions of HumanEval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import smollm2

from .base import Task, frozen, padded

TOKENS = 64
IGNORED = -100


class CausalTask(Task):
    """A causal language model on vectors of token ids. A sample is (ids, labels), both [length];
    the labels of given tokens, which are not predicted, are `IGNORED`.
    """

    held_out: Sequence[tuple[Tensor, Tensor]]

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokenizer = smollm2.load_tokenizer()
        self.model = frozen(smollm2.load_model(), device)
        self.targets = list(smollm2.target_projections(self.model))

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        ids, labels = zip(*samples, strict=True)
        # Padding comes after every predicted token, so no predicted token attends to padding.
        return padded(ids, 0).to(self.device), padded(labels, IGNORED).to(self.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits, labels = self.predictions(model, batch)
        return functional.cross_entropy(logits, labels)

    def predictions(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits [tokens, vocabulary] of the predicted tokens, and these tokens [tokens]."""
        ids, labels = batch
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        counts = labels[:, 1:] != IGNORED
        return model.lm_head(hidden[counts]), labels[:, 1:][counts]

    def held_out_batches(self, size: int = 8) -> list[tuple[Tensor, Tensor]]:
        parts = range(0, len(self.held_out), size)
        return [self.collate(self.held_out[i : i + size]) for i in parts]


class Code(CausalTask):
    """The last 64 tokens of each problem with its solution: solutions have 59 on average.

    148 texts are for training and 16 for the held-out part. The metric is the share of held-out
    tokens that are the model's first choice.
    """

    name, metric = "code", "next-token accuracy"
    steps, batch = 24, 4

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        parts = smollm2.load_texts()
        self.training, self.held_out = ([self._sample(text) for text in part] for part in parts)

    def samples(self) -> Sequence[tuple[Tensor, Tensor]]:
        return self.training

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        loss = right = count = 0.0
        for batch in self.held_out_batches():
            logits, labels = self.predictions(model, batch)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
        return loss / count, right / count

    def _sample(self, text: str) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(self.tokenizer(text)["input_ids"][-TOKENS:])
        return ids, ids
