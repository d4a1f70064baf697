"""docs/faq.md on a tiny Llama, whose folder is models/base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ...support import ROOT
from ...support.tiny_models import llama

SENTENCES = 6  # of an answer, at most
END = re.compile(r"[.!?](?=\s+[A-Z`\"]|\s*$)")


def names(folder: Path) -> dict:
    pytest.importorskip("peft")
    llama().save_pretrained(folder / "models/base")
    model, fresh = (_from(folder / "models/base") for _ in range(2))
    ids = torch.randint(model.config.vocab_size, (2, 12))

    def train(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    batch = {"input_ids": ids, "labels": ids}
    return {"model": model, "fresh": fresh, "batch": batch, "train": train}


def _from(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def check(names: dict, output: str, folder: Path) -> None:
    assert "learning rate" in output and "rank 8" in output
    with torch.no_grad():
        want = names["model"](names["batch"]["input_ids"]).logits
        for other in (names["served"].eval(), _from(folder / "merged")):
            got = other(input_ids=names["batch"]["input_ids"]).logits
            assert (got - want).abs().max() < 1e-4
    answers_are_short()


def answers_are_short() -> None:
    """At most six sentences each, and a link to another page."""
    page = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    for part in page.split("\n### ")[1:]:
        title, _, answer = part.partition("\n")
        answer = re.sub(r"```.*?```", "", answer.partition("\n## ")[0], flags=re.DOTALL)
        assert re.search(r"\]\([\w/]+\.md", answer), title
        assert len(END.findall(answer.strip())) <= SENTENCES, title
