"""A short fine-tune of a causal language model, with its loss curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay. The same seed gives the same batches in the same order."""

    steps: int = 30
    batch: int = 4
    lr: float = 2e-5
    seed: int = 0
    clip: float = 1.0

    def batches(self, texts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Texts in random order, epoch after epoch; torch's global generator is not used."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for _ in range(self.steps):
            while len(order) < self.batch:
                order += torch.randperm(len(texts), generator=generator).tolist()
            yield [texts[i] for i in order[: self.batch]]
            del order[: self.batch]

    def validates_at(self, step: int) -> bool:
        """True at the start, half way and at the end."""
        return step in (0, self.steps // 2, self.steps)


@dataclass
class Curve:
    """Mean loss per token by step; step 0 is before training."""

    train: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)


def train(
    model: nn.Module,
    recipe: Recipe,
    training: Sequence[Tensor],
    validation: Sequence[Tensor],
    progress: Callable[[], None] = lambda: None,
) -> Curve:
    """Train every parameter that requires a gradient; call `progress` after each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    curve = Curve(validation={0: evaluate(model, validation)})
    for step, texts in enumerate(recipe.batches(training), start=1):
        total, count = token_loss(model, texts)
        loss = total / count
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        curve.train[step] = loss.item()
        if recipe.validates_at(step):
            curve.validation[step] = evaluate(model, validation)
        progress()
    return curve


@torch.no_grad()
def evaluate(model: nn.Module, texts: Sequence[Tensor], batch: int = 8) -> float:
    """Mean loss per token over all texts."""
    parts = [token_loss(model, texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return float(sum(total for total, _ in parts) / sum(count for _, count in parts))


def token_loss(model: nn.Module, texts: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Next-token cross-entropy: (sum over the tokens, number of tokens).

    The head runs one text at a time and skips padding: with a vocabulary of 49 152 it is a fifth of
    the model's arithmetic, and the logits of one text fit in a CPU's cache.
    """
    ids = pad_sequence(list(texts), batch_first=True)
    labels = pad_sequence(list(texts), batch_first=True, padding_value=IGNORED)[:, 1:]
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    predicted = labels != IGNORED
    losses = [
        nn.functional.cross_entropy(model.lm_head(h[here]), label[here], reduction="sum")
        for h, label, here in zip(hidden[:, :-1], labels, predicted, strict=True)
    ]
    return torch.stack(losses).sum(), int(predicted.sum())
