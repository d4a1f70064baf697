"""SmolLM2-135M on a synthetic task that it fails at first: sorting the digits of a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .code import IGNORED, CausalTask

NUMBERS = 10_000
HELD_OUT = 128


class Digits(CausalTask):
    """Lines such as "4172 = 1247" for numbers of four digits; the loss is over the answer and its
    end of line.

    128 numbers are held out, and the other 9,872 are for training. The metric is exact match: each
    token of the answer is the model's first choice after the right tokens before it, so greedy
    decoding writes the right answer. The untouched model gets no answer right.
    """

    name, metric = "digits", "exact match"
    steps, batch = 32, 16

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(NUMBERS, generator=generator).tolist()
        samples = [self._sample(f"{number:04d}") for number in order]
        self.held_out, self.training = samples[:HELD_OUT], samples[HELD_OUT:]

    def samples(self) -> Sequence[tuple[Tensor, Tensor]]:
        return self.training

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        loss = count = right = 0.0
        for batch in self.held_out_batches(32):
            logits, labels = self.predictions(model, batch)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            wrong = (logits.argmax(1) != labels).float()
            row = (batch[1][:, 1:] != IGNORED).nonzero()[:, 0]
            errors = torch.zeros(len(batch[0]), device=row.device).index_add_(0, row, wrong)
            right += (errors == 0).sum().item()
        return loss / count, right / HELD_OUT

    def _sample(self, number: str) -> tuple[Tensor, Tensor]:
        given = self.tokenizer(f"{number} =")["input_ids"]
        answer = self.tokenizer(f" {''.join(sorted(number))}\n")["input_ids"]
        return torch.tensor(given + answer), torch.tensor([IGNORED] * len(given) + answer)
