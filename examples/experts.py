"""Adapt the experts of a mixture, train them, and load the adapter in PEFT.

    python -m examples.experts

Prints what was adapted, the loss of each step, and the largest logit difference between the trained
model and plain PEFT with the adapter loaded. To use your own model, replace `tiny_mixture()`, for
example with `AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype="auto")`.
"""

from __future__ import annotations

import torch
from peft import PeftModel

from examples._tiny import batches, largest_difference, tiny_mixture
from lora_kernels import LoRAConfig, add_lora, save_adapter, with_expert_rank


def main() -> None:
    model = tiny_mixture()
    config = LoRAConfig(
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    config = with_expert_rank(model, config)  # r // 2 in each expert: a token uses two experts
    print(add_lora(model, config))

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches(), start=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    save_adapter(model, "out/adapter")
    loaded = PeftModel.from_pretrained(tiny_mixture(), "out/adapter")
    print(f"loaded by plain PEFT: {largest_difference(loaded, model):.1e} from the trained model")


if __name__ == "__main__":
    main()
