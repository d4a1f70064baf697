"""docs/guide/data.md on a tiny model, with padded batches."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_kernels import capture_activations

from ...support.tiny_models import llama

Q, K = (f"model.layers.1.self_attn.{name}_proj" for name in "qk")


def names(folder: Path) -> dict:
    ids = torch.randint(96, (3, 2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    batches = [{"input_ids": own, "attention_mask": mask, "labels": own} for own in ids]
    return {"model": llama(), "batches": batches}


def check(names: dict, output: str, folder: Path) -> None:
    batches, gradients = names["batches"], names["gradients"]
    assert gradients.keys() == {
        f"model.layers.{k}.self_attn.{name}_proj" for k in range(2) for name in "qv"
    }
    for found, loss in (
        (gradients[Q], lambda model, batch: model(**batch).loss),
        (names["last"][Q], names["loss"]),
    ):
        plain = llama()
        for batch in batches:
            loss(plain, batch).backward()
        torch.testing.assert_close(found, plain.get_submodule(Q).weight.grad)
    activations = names["activations"]
    assert activations[Q] is activations[K]
    assert activations[Q].count == 3 * (20 + 15)  # without padding
    assert activations[Q].gram.shape == (32, 32)
    rows = capture_activations(llama(), batches, sketch=8, progress=False)[Q]
    assert rows.gram is None and rows.sketch.shape[1] == 32
    ranks = {row.r for row in names["report"].adapted}
    assert len(ranks) > 1 and sum(row.r for row in names["report"].adapted) == 14 * 8
