"""How much time and memory adapters add to the experts of a mixture: `python -m
benchmarks.cpu.experts`.

The baseline is transformers' experts with frozen weights; x and the routing weights need gradients,
as in a model. PEFT adapts the same parameters with `target_parameters`. Time: the variants take
turns in forward + backward. Memory: the bytes that autograd keeps between forward and backward,
without parameters, and the peak of the process above its size before.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common.harness import Timing, dtype_name, environment, interleave
from benchmarks.common.memory import PeakGrowth
from benchmarks.common.report import RESULTS, print_timings, write_csv
from lora_kernels import LoRAConfig, add_lora
from lora_kernels.model.experts import forward as experts_forward
from lora_kernels.peft import accelerate

BARE, PEFT = "transformers' experts, frozen", "PEFT target_parameters"
ACCELERATED = "PEFT, accelerated"
OURS, PRODUCTS = "LoRAExperts", "LoRAExperts, one operator a product"
MEMORY = ("kept_mib", "kept_ratio", "peak_mib", "peak_ratio")
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Size:
    """E experts [2I, H] and [H, I]; each token uses `k` of them."""

    experts: int
    hidden: int
    inner: int
    k: int
    tokens: int

    def __str__(self) -> str:
        sizes = f"E={self.experts} H={self.hidden} I={self.inner} top-{self.k}"
        return f"{sizes}, {self.tokens} tokens"


SIZES = (
    Size(32, 1024, 512, 4, 512),
    Size(32, 1024, 512, 4, 2048),
    Size(64, 512, 256, 8, 256),
)


def model_of(size: Size, dtype: torch.dtype) -> nn.Module:
    """A module with the experts of Qwen3-MoE."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=size.inner,
        num_experts=size.experts,
        num_experts_per_tok=size.k,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = Qwen3MoeExperts(config).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02).requires_grad_(False)
    return model


def variants(size: Size, dtype: torch.dtype, r: int) -> dict[str, nn.Module]:
    """The experts of each variant, by its name."""
    import peft

    def ours() -> nn.Module:
        model = model_of(size, dtype)
        config = LoRAConfig(r=r, target_modules=None, target_parameters=NAMES)
        add_lora(model, config, progress=False)
        return model.experts

    theirs = peft.LoraConfig(r=r, target_modules=[], target_parameters=NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model_of(size, dtype), theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = peft.get_peft_model(model_of(size, dtype), theirs)
    accelerate(fused)
    return {
        BARE: model_of(size, dtype).experts,
        OURS: ours(),
        PRODUCTS: ours(),
        PEFT: wrapped.base_model.model.experts,
        ACCELERATED: fused.base_model.model.experts,
    }


class Case:
    """The inputs for one size, and the calls of a variant on them."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        self.x = torch.randn(size.tokens, size.hidden, dtype=dtype, requires_grad=True)
        scores = torch.rand(size.tokens, size.experts)
        self.index = scores.topk(size.k).indices
        self.weights = torch.rand(size.tokens, size.k, requires_grad=True)
        self.grad = torch.randn(size.tokens, size.hidden, dtype=dtype)

    def run(self, name: str, experts: nn.Module, backward: bool) -> Callable[[], object]:
        """A forward without a graph, or forward + backward, of one variant."""
        wanted = [self.x, self.weights, *(p for p in experts.parameters() if p.requires_grad)]

        def call() -> object:
            if not backward:
                with torch.no_grad():
                    return experts(self.x, self.index, self.weights)
            return torch.autograd.grad(self.forward(name, experts), wanted, self.grad)

        return call

    def forward(self, name: str, experts: nn.Module) -> Tensor:
        """The output with its graph."""
        if name != PRODUCTS:
            return experts(self.x, self.index, self.weights)
        with mock.patch.object(experts_forward, "_trains_itself", lambda _: True):
            return experts(self.x, self.index, self.weights)

    def kept(self, name: str, experts: nn.Module) -> float:
        """MiB that autograd keeps for the backward, without parameters and inputs."""
        own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        own |= {t.untyped_storage().data_ptr() for t in (self.weights,)}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.forward(name, experts)
        del output
        return sum(found.values()) / 2**20


def memory(case: Case, known: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Rows with the memory that each variant keeps, and its peak in forward + backward."""
    rows: list[dict[str, Any]] = []
    for name, experts in known.items():
        run = case.run(name, experts, backward=True)
        run()
        peaks = []
        for _ in range(3):
            with PeakGrowth(sharp=True) as peak:
                run()
            peaks.append(peak.mib)
        rows.append(
            {"variant": name, "kept_mib": case.kept(name, experts), "peak_mib": sorted(peaks)[1]}
        )
    for row in rows:
        row["kept_ratio"] = row["kept_mib"] / rows[0]["kept_mib"]
        row["peak_ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
    return rows


def measure(
    size: Size, dtype: torch.dtype, r: int, rounds: int
) -> tuple[dict[str, list[Timing]], list[dict[str, Any]]]:
    """The timings of `forward` and `forward + backward`, and the rows with the memory."""
    known, case = variants(size, dtype, r), Case(size, dtype)
    tables = {
        title: interleave(
            {name: case.run(name, experts, backward) for name, experts in known.items()},
            rounds=rounds,
            baseline=BARE,
        )
        for title, backward in (("forward", False), ("forward + backward", True))
    }
    return tables, memory(case, known)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.experts", description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sizes", type=int, nargs="+", default=range(len(SIZES)))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all sizes and dtypes, prints tables and writes the CSV."""
    arguments = parse(argv)
    console, rows = Console(), []
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        for index in arguments.sizes:
            size = SIZES[index]
            tables, kept = measure(size, dtype, arguments.rank, arguments.rounds)
            by_name = {str(row["variant"]): row for row in kept}
            for title, timings in tables.items():
                heading = f"{size}, r={arguments.rank}, {dtype_name(dtype)}: {title}"
                print_timings(console, heading, timings, "bare")
                for timing in timings:
                    own = by_name[timing.name] if title != "forward" else {}
                    rows.append(
                        {
                            "size": str(size),
                            "r": arguments.rank,
                            "dtype": dtype_name(dtype),
                            "pass": title,
                            **timing.row(),
                            **{key: own.get(key, "") for key in MEMORY},
                            **environment(),
                        }
                    )
            for row in kept:
                console.print({k: v if isinstance(v, str) else round(v, 2) for k, v in row.items()})
    write_csv(arguments.out / "experts.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
