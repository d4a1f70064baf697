"""A UNet of diffusers, adapted, trained, saved for diffusers and loaded back by diffusers."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, disable_adapters, load_adapter, merge_lora, save_adapter
from lora_kernels.layers.linear import LoRAConv

from ..support.running import quiet

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("diffusers", "peft"))), reason="needs diffusers and peft"
)

FILE = "pytorch_lora_weights.safetensors"
# Attention, the convolutions of resnets, of the ends, of samplers and around attentions.
TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"),
]


def unet(**options) -> nn.Module:
    """As Stable Diffusion's, with 0.8 million parameters."""
    from diffusers import UNet2DConditionModel

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
        **options,
    )


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def predicted(model: nn.Module) -> torch.Tensor:
    text = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(9))
    return model(noise(), torch.tensor([1, 500]), text).sample


def _convolutions(model: nn.Module, cls: type[nn.Module]) -> int:
    return sum(isinstance(module, cls) for module in model.modules())


def trained(model: nn.Module, steps: int = 3) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    for _ in range(steps):
        loss = (predicted(model) - noise(1)).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("residual", "options"),
    [("absorb", {}), ("implicit", {"use_linear_projection": True})],
    ids=["absorb", "implicit, linear projections"],
)
def test_trains_and_is_loaded_by_diffusers(residual, options, tmp_path):
    model = unet(**options)
    before, count = predicted(model).detach(), _convolutions(model, nn.Conv2d)
    quiet(model, LoRAConfig(r=4, target_modules=TARGETS, residual=residual))
    assert _convolutions(model, LoRAConv) == count > 20
    assert (predicted(model) - before).abs().max() <= 1e-5
    losses = trained(model)
    assert losses[-1] < 0.9 * losses[0]
    y = predicted(model).detach()
    assert (y - before).abs().max() > 0.1

    save_adapter(model, tmp_path, format="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    other = unet(**options)
    other.load_lora_adapter(tmp_path, prefix="unet", weight_name=FILE)
    assert (predicted(other) - y).abs().max() <= 1e-5
    other = unet(**options)
    load_adapter(other, tmp_path, progress=False)  # to train on
    assert torch.equal(predicted(other), y)
    with disable_adapters(model):
        assert (predicted(model) - before).abs().max() <= 1e-5
    assert (predicted(merge_lora(copy.deepcopy(model))) - y).abs().max() <= 1e-5


def test_a_pipeline_loads_it(tmp_path):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    class Pipeline(StableDiffusionLoraLoaderMixin):
        """What `load_lora_weights` needs of a pipeline."""

        components: dict[str, object] = {}  # noqa: RUF012
        text_encoder = None
        hf_device_map = None

        def __init__(self) -> None:
            self.unet = unet()

    model = unet()
    quiet(model, LoRAConfig(r=2, target_modules=["to_q", "conv1"]))
    trained(model, steps=1)
    save_adapter(model, tmp_path, format="diffusers", dtype="float32")
    pipeline = Pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert (predicted(pipeline.unet) - predicted(model)).abs().max() <= 1e-5


def test_trains_on_what_diffusers_saved(tmp_path):
    from peft import LoraConfig

    model = unet()
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    )
    y = predicted(model).detach()
    model.save_lora_adapter(tmp_path)
    other = unet()
    load_adapter(other, tmp_path, progress=False)
    assert (predicted(other) - y).abs().max() <= 1e-5
    losses = trained(other)
    assert losses[-1] < losses[0]
