"""Files and their bytes, without LoRA: rewriting in blocks, and writing that survives a kill."""
