"""Give PEFT's adapter a start and a fused forward; PEFT trains, switches and saves it.

    python -m examples.peft_bridge

Prints which layers were initialized and accelerated, the loss of each step, and the largest logit
difference in three comparisons: the newly adapted and the original model, the model with its
adapter disabled and the original model, the trained model and plain PEFT with the saved folder
loaded. To use your own model, replace `tiny_model()` with
`AutoModelForCausalLM.from_pretrained(...)`.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lora_kernels.peft
from examples._tiny import batches, largest_difference, tiny_model


def main() -> None:
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(tiny_model(), config)
    print(lora_kernels.peft.initialize(model, "loram"))  # or "pissa", "olora", ...
    print(lora_kernels.peft.accelerate(model))
    print(f"started: {largest_difference(model, tiny_model()):.1e} from the original model")

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches(), start=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    with model.disable_adapter():
        print(f"disabled: {largest_difference(model, tiny_model()):.1e} from the original model")
    model.save_pretrained("out/adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), "out/adapter")
    print(f"loaded by plain PEFT: {largest_difference(loaded, model):.1e} from the trained model")


if __name__ == "__main__":
    main()
