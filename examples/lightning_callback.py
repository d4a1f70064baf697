"""Fine-tune a LightningModule: a callback adapts its model and saves the adapter.

    python -m examples.lightning_callback

Prints what was adapted, the losses, the folders of adapters beside the checkpoints, and the largest
logit difference between the trained model and a fresh model that has loaded the last adapter. The
callback works with any LightningModule that has an attribute `model`. A Lightning checkpoint holds
the whole model, with the start subtracted; `fit(..., ckpt_path=)` with the same callback continues
from it.
"""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from examples._tiny import batches, largest_difference, tiny_model
from lora_kernels import LoRAConfig, adapter_names, add_lora, load_adapter, save_adapter


class LoRACallback(lightning.Callback):
    """Adapts `module.model` before the optimizer is made, and saves with every checkpoint."""

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config

    def setup(self, trainer, module, stage) -> None:
        if not adapter_names(module.model):
            print(add_lora(module.model, self.config))

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        save_adapter(module.model, Path(folder) / f"adapter-{trainer.global_step}")


class Sums(lightning.LightningModule):
    """A LightningModule as you have it: a transformers model, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()  # or AutoModelForCausalLM.from_pretrained(...)

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        print(f"step {self.global_step + 1}: loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def main() -> None:
    module, data = Sums(), torch.utils.data.DataLoader(batches(), batch_size=None)
    callbacks = [
        LoRACallback(LoRAConfig(r=8, lora_alpha=8)),
        ModelCheckpoint("out/checkpoints", every_n_train_steps=5, save_top_k=-1),
    ]
    trainer = lightning.Trainer(
        max_steps=10,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)

    print(*sorted(str(path) for path in Path("out/checkpoints").iterdir()), sep="\n")
    fresh = tiny_model()
    load_adapter(fresh, "out/checkpoints/adapter-10")
    print(f"loaded: {largest_difference(fresh, module.model):.1e} from the trained model")


if __name__ == "__main__":
    main()
