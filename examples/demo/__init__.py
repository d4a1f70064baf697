"""LoRAM, plain LoRA and PiSSA on a real model: `python -m examples.demo`."""
