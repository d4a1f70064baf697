"""How much time an adapter adds to a layer, forward alone and forward + backward.

`python -m benchmarks.cpu.layer`. The baseline is a frozen `nn.Linear` whose input needs a gradient.
W is fp32 or bf16; A and B are always fp32. PEFT's layer is PEFT's own, not a copy of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora as peft_lora
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common.harness import Timing, dtype_name, environment, interleave
from benchmarks.common.report import RESULTS, bar_panels, print_timings, write_csv
from benchmarks.common.shapes import Shape, shape, shape_name
from lora_kernels import LoRALinear
from lora_kernels.peft import accelerate

SHAPES: tuple[Shape, ...] = ((4096, 4096),)
RANKS = (16, 128)
TOKENS = 512
BARE = "frozen nn.Linear"


class Composition(nn.Module):
    """LoRA written by hand with PyTorch operations."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, r) / r**0.5)
        self.scaling = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + s · (x Aᵀ) Bᵀ, computed in x's dtype."""
        lora_A, lora_B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return self.linear(x) + self.scaling * ((x @ lora_A.T) @ lora_B.T)


def peft_layer(linear: nn.Linear, r: int) -> nn.Module:
    """PEFT's layer with fp32 A and B, the default of `get_peft_model`."""
    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights="gaussian")
    layer = peft_lora.Linear(linear, "default", config, r=r, lora_alpha=r)
    for factors in (layer.lora_A, layer.lora_B):
        factors.float()
    return layer


def accelerated_layer(linear: nn.Linear, r: int) -> nn.Module:
    """PEFT's layer after `lora_kernels.peft.accelerate`: its forward calls our operators."""
    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights="gaussian", target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config)
    accelerate(model)
    return model.base_model.model[0]


def layers(size: Shape, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers by name; each has its own W, because LoRAM changes it."""

    def linear() -> nn.Linear:
        return nn.Linear(size[1], size[0], bias=False, dtype=dtype).requires_grad_(False)

    def ours(residual: str) -> LoRALinear:
        return LoRALinear.from_linear(linear(), r=r, lora_alpha=r, residual=residual)

    return {
        BARE: linear(),
        "LoRALinear absorb": ours("absorb"),
        "LoRALinear implicit": ours("implicit"),
        "PEFT lora.Linear": peft_layer(linear(), r),
        "PEFT lora.Linear, accelerated": accelerated_layer(linear(), r),
        "plain composition": Composition(linear(), r),
    }


def forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward call without an autograd graph, as in inference."""

    @torch.no_grad()
    def run() -> Tensor:
        return layer(x)

    return run


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call that computes the gradients of x and of all trainable parameters."""
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def measure(
    size: Shape, r: int, dtype: torch.dtype, tokens: int, rounds: int
) -> dict[str, list[Timing]]:
    """The timings of `forward` and `forward + backward`."""
    torch.manual_seed(0)
    passes = passes_of(layers(size, r, dtype), size, dtype, tokens)
    return {name: interleave(table, rounds=rounds, baseline=BARE) for name, table in passes.items()}


def passes_of(
    known: Mapping[str, nn.Module], size: Shape, dtype: torch.dtype, tokens: int
) -> dict[str, dict[str, Callable[..., object]]]:
    """`forward` and `forward + backward` for layers of one size, with random inputs."""
    x, dy = (torch.randn(tokens, k, dtype=dtype) for k in reversed(size))
    return {
        "forward": {name: forward(layer, x) for name, layer in known.items()},
        "forward + backward": {
            name: forward_backward(layer, x, dy) for name, layer in known.items()
        },
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.layer", description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the CSV and PNG files"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each configuration as soon as it is measured."""
    options, console = parse(argv), Console()
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    rows: list[dict[str, object]] = []
    panels: dict[str, list[Timing]] = {}
    for size in options.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for r in options.ranks:
                facts = {"shape": shape_name(size), "tokens": options.tokens, "r": r}
                facts |= {"dtype": dtype_name(dtype), "adapter_dtype": "fp32"}
                results = measure(size, r, dtype, options.tokens, options.rounds)
                for name, timings in results.items():
                    label = f"{shape_name(size)}, {dtype_name(dtype)}, r = {r}, {name}"
                    print_timings(console, label, timings, "bare")
                    rows += [{**facts, "pass": name, **t.row(), **environment()} for t in timings]
                    panels[label] = timings
    write_csv(options.out / "layer.csv", rows)
    title = f"{options.tokens} tokens, A and B in fp32, {environment()['device']}; (× {BARE})"
    bar_panels(options.out / "layer.png", title, panels, xlabel="ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
