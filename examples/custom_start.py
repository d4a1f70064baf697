"""Add your own start: a dataclass that turns a weight into A and B.

    python -m examples.custom_start

Prints what was adapted, the largest logit difference between the adapted and the original model,
the loss of each step, and the largest logit difference between the trained model and a fresh model
that has loaded the adapter. The layers subtract the start, and the files contain it. To use your
own model, replace `tiny_model()` with `AutoModelForCausalLM.from_pretrained(...)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from examples._tiny import batches, largest_difference, tiny_model
from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter
from lora_kernels.init import Initializer, Start, register_initializer


@dataclass(frozen=True)
class Rotation(Initializer):
    """Random B and A with orthogonal columns and rows, and ‖BA‖_F = share · ‖W‖_F."""

    share: float = 0.5
    seed: int = 0

    changes_base = True  # BA is not zero: it is subtracted from W
    reads_weight = True

    def make_start(self, request):
        (out, in_), r = request.shape, request.r
        draw = torch.Generator(request.weight.device).manual_seed(self.seed)
        B = torch.linalg.qr(request.empty(out, r).normal_(generator=draw)).Q
        A = torch.linalg.qr(request.empty(in_, r).normal_(generator=draw)).Q.T
        norm = request.weight.norm(dtype=request.factor_dtype)
        scale = (self.share * norm / r**0.5).sqrt()  # ‖BA‖_F is √r before scaling
        return Start(lora_A=scale * A, lora_B=scale * B)


def main() -> None:
    register_initializer("rotation", Rotation)
    model = tiny_model()
    print(add_lora(model, LoRAConfig(r=8, lora_alpha=8, init_lora_weights="rotation")))
    # or with options: init_lora_weights=Rotation(share=0.1)
    print(f"started: {largest_difference(model, tiny_model()):.1e} from the original model")

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step, batch in enumerate(batches(), start=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    save_adapter(model, "out/adapter")
    fresh = tiny_model()
    load_adapter(fresh, "out/adapter")
    print(f"loaded: {largest_difference(fresh, model):.1e} from the trained model")


if __name__ == "__main__":
    main()
