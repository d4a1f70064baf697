"""Files and their bytes, without LoRA: rewriting in blocks, and writes that survive a kill."""
