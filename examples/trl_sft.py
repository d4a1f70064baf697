"""Supervised fine-tuning with TRL's SFTTrainer on prompts and completions.

    python -m examples.trl_sft

Prints what SFTTrainer logs, and where the adapter is saved. SFTTrainer gets no `peft_config`,
because `add_lora` has already adapted the model. To use your own model, replace `tiny_model` and
`tiny_tokenizer` with `AutoModelForCausalLM` and `AutoTokenizer`.
"""

from __future__ import annotations

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from examples._tiny import TEXTS, tiny_model, tiny_tokenizer
from lora_kernels import LoRAConfig, add_lora, save_adapter


def main() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [text.split("=") for text in TEXTS]
    rows = [{"prompt": f"{question}=", "completion": answer} for question, answer in pairs]

    add_lora(model, LoRAConfig(r=8, lora_alpha=8))
    trainer = SFTTrainer(
        model,
        SFTConfig(
            "out/run",
            max_steps=8,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            max_length=16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,  # True on a GPU
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()

    save_adapter(model, "out/adapter")
    print("saved to out/adapter")


if __name__ == "__main__":
    main()
