"""The three starts that the demo compares, all trained through the same `LoRALinear`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import PiSSA

RANK = ALPHA = 16

Method = Callable[[nn.Linear], LoRALinear]


def loram(linear: nn.Linear) -> LoRALinear:
    """Magnitude-driven: a sine basis, scaled by the size of W; no SVD."""
    return LoRALinear.from_linear(linear, r=RANK, lora_alpha=ALPHA, init_lora_weights="loram")


def zero_b(linear: nn.Linear) -> LoRALinear:
    """Plain LoRA: A random, B zero."""
    return LoRALinear.from_linear(linear, r=RANK, lora_alpha=ALPHA, init_lora_weights="lora")


def pissa(linear: nn.Linear) -> LoRALinear:
    """The reference: the leading singular triplets of W, by LAPACK's SVD."""
    exact = PiSSA(method="exact")
    return LoRALinear.from_linear(linear, r=RANK, lora_alpha=ALPHA, init_lora_weights=exact)


METHODS: dict[str, Method] = {
    "LoRAM": loram,
    "LoRA (B=0)": zero_b,
    "PiSSA (SVD)": pissa,
}


def adapt(
    model: nn.Module,
    names: Iterable[str],
    method: Method,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Swaps the named linears for LoRALinears; nothing else is left trainable."""
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, method(model.get_submodule(name)))
        done()
