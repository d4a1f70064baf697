"""Preference tuning with TRL's DPOTrainer, on a PEFT adapter with a start from lora_kernels.

    python -m examples.trl_dpo

Prints the start, what DPOTrainer logs, and where the adapter is saved. The first loss is log 2: TRL
keeps a copy of the adapter as its reference model, and the copy subtracts the same start. To use
your own model, replace `tiny_model` and `tiny_tokenizer` with `AutoModelForCausalLM` and
`AutoTokenizer`.
"""

from __future__ import annotations

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

import lora_kernels.peft
from examples._tiny import TEXTS, tiny_model, tiny_tokenizer


def main() -> None:
    pairs = [text.split("=") for text in TEXTS]
    rows = [
        {"prompt": f"{question}=", "chosen": answer, "rejected": "+"} for question, answer in pairs
    ]

    peft_config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(tiny_model(), peft_config)
    print(lora_kernels.peft.initialize(model, "loram"))
    lora_kernels.peft.accelerate(model)

    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            "out/run",
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,  # True on a GPU
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.save_model("out/adapter")  # for the original model, like every PEFT adapter
    print("saved to out/adapter")


if __name__ == "__main__":
    main()
