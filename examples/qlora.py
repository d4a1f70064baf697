"""QLoRA: fine-tune a model whose weights bitsandbytes has quantized to 4 bits, with Trainer.

    python -m examples.qlora

Prints what was adapted, what Trainer logs, where the adapter is saved, and the largest logit
difference between the trained model and a fresh quantized model that has loaded the adapter. The
quantized weights do not change: the layers subtract the start in each forward. To use your own
model, pass its name to `from_pretrained` instead of the folder of the tiny model.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from examples._tiny import TEXTS, largest_difference, save_tiny_model, tiny_tokenizer
from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter
from lora_kernels.trainer import accepted_by_trainer


def main() -> None:
    path, tokenizer = save_tiny_model("out/model"), tiny_tokenizer()
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,  # torch.bfloat16 on a GPU
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=bits)
    print(add_lora(model, LoRAConfig(r=8, lora_alpha=8)))

    arguments = TrainingArguments(
        "out/run",
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with accepted_by_trainer(model):  # Trainer requires PEFT adapters on quantized models
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
    trainer.train()
    save_adapter(model, "out/adapter")
    print("saved to out/adapter")

    fresh = AutoModelForCausalLM.from_pretrained(path, quantization_config=bits)
    load_adapter(fresh, "out/adapter")
    print(f"loaded: largest difference of a logit {largest_difference(model, fresh):.1e}")


if __name__ == "__main__":
    main()
