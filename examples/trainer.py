"""Fine-tune with transformers' Trainer, and resume from a checkpoint.

    python -m examples.trainer --steps 4
    python -m examples.trainer --steps 8 --resume

Prints what Trainer logs, and where the adapter is saved. The second command continues at step 5. A
checkpoint of Trainer holds the whole model, with the start subtracted: load it into an adapted
model, as here, and share the folder that `save_adapter` writes. To use your own model, replace
`tiny_model` and `tiny_tokenizer` with `AutoModelForCausalLM` and `AutoTokenizer`.
"""

from __future__ import annotations

import argparse

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from examples._tiny import TEXTS, tiny_model, tiny_tokenizer
from lora_kernels import LoRAConfig, add_lora, save_adapter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4, help="(default 4)")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    options = parser.parse_args()

    model, tokenizer = tiny_model(), tiny_tokenizer()
    add_lora(model, LoRAConfig(r=8, lora_alpha=8))  # before Trainer makes the optimizer

    arguments = TrainingArguments(
        "out/run",
        max_steps=options.steps,
        save_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=options.resume)

    save_adapter(model, "out/adapter")
    print("saved to out/adapter")


if __name__ == "__main__":
    main()
