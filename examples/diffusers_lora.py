"""Adapt a diffusers UNet, and save a file that `pipeline.load_lora_weights` reads.

    python -m examples.diffusers_lora

Prints what was adapted, the loss of each step, the saved file, and the largest difference between
the outputs of the trained UNet and of a UNet into which diffusers has loaded the file. To use your
own model, replace `tiny_unet()` with `pipeline.unet` or `pipeline.transformer`, and load with
`pipeline.load_lora_weights("out/adapter")`.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from lora_kernels import LoRAConfig, add_lora, save_adapter

FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it


def tiny_unet() -> UNet2DConditionModel:
    """A UNet like Stable Diffusion's, with random weights and 0.8 million parameters."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def main() -> None:
    unet = tiny_unet()
    # Attention, and the convolutions of the resnets.
    names = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    print(add_lora(unet, LoRAConfig(r=4, lora_alpha=4, target_modules=names)))

    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32)
    noise, times = torch.randn_like(latents), torch.tensor([1, 500])
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, 5):
        loss = (unet(latents, times, text).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    save_adapter(unet, "out/adapter", format="diffusers")
    print(f"saved to out/adapter/{FILE}")

    other = tiny_unet()
    other.load_lora_adapter("out/adapter", prefix="unet", weight_name=FILE)
    with torch.no_grad():
        ours, theirs = (model(latents, times, text).sample for model in (unet, other))
    print(f"loaded by diffusers: largest difference {float((ours - theirs).abs().max()):.1e}")


if __name__ == "__main__":
    main()
