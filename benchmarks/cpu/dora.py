"""What DoRA adds to our LoRA layer, compared with PEFT's DoRA layer, and what its norms cost.

`python -m benchmarks.cpu.dora`. W is frozen, in fp32 or bf16; A, B and the magnitudes are fp32. The
pass "norms" is `lora::row_norms` alone, on W and on a transposed W, compared with reading W once
(`lora::frobenius_stats`) and with torch's norms of W + s·B A.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners import lora as peft_lora
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common.harness import Timing, Variant, dtype_name, environment, interleave
from benchmarks.common.report import RESULTS, print_timings, write_csv
from benchmarks.common.shapes import Shape, shape, shape_name
from benchmarks.cpu.layer import passes_of, peft_layer
from lora_kernels import LoRALinear

SHAPES: tuple[Shape, ...] = ((4096, 4096),)
RANKS = (16,)
TOKENS = 512
OURS, OUR_DORA, PEFT_DORA = "LoRALinear", "LoRALinear, DoRA", "PEFT lora.Linear, DoRA"
READ = "reading W once"


def peft_dora_layer(linear: nn.Linear, r: int) -> nn.Module:
    """PEFT's layer with fp32 A, B and magnitudes."""
    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights="gaussian", use_dora=True)
    layer = peft_lora.Linear(linear, "default", config, r=r, lora_alpha=r)
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        part.float()
    return layer


def layers(size: Shape, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers by name; all share one W, which no layer changes."""
    base = nn.Linear(size[1], size[0], bias=False, dtype=dtype).requires_grad_(False)
    options = {"r": r, "lora_alpha": r, "init_lora_weights": "lora"}
    return {
        OURS: LoRALinear.from_linear(base, **options),
        OUR_DORA: LoRALinear.from_linear(base, **options, use_dora=True),
        "PEFT lora.Linear": peft_layer(base, r),
        PEFT_DORA: peft_dora_layer(base, r),
    }


def norms(size: Shape, r: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The norms of the rows of W + s·B A."""
    W = torch.randn(size).to(dtype)
    by_columns = W.T.contiguous().T
    A, B = torch.randn(r, size[1]) / size[1] ** 0.5, torch.randn(size[0], r)
    return {
        READ: lambda: torch.ops.lora.frobenius_stats([W]),
        "row_norms": lambda: torch.ops.lora.row_norms(W, A, B, 0.5),
        "row_norms, transposed W": lambda: torch.ops.lora.row_norms(by_columns, A, B, 0.5),
        "torch": lambda: torch.linalg.vector_norm(W + 0.5 * (B @ A), dim=1),
    }


def paced(name: str, run: Callable[..., object], dtype: torch.dtype) -> Variant:
    """The variant; PEFT's layers run once, without warm-up, for bfloat16 below AVX-512. There torch
    multiplies scalar by scalar, and each product takes a minute.
    """
    is_slow = dtype == torch.bfloat16 and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return Variant(run, rounds=1, warmup=0) if is_slow and name.startswith("PEFT") else Variant(run)


def measure(
    size: Shape, r: int, dtype: torch.dtype, tokens: int, rounds: int
) -> dict[str, list[Timing]]:
    """The timings of `forward`, `forward + backward` and `norms`."""
    torch.manual_seed(0)
    timings = {}
    for passed, table in passes_of(layers(size, r, dtype), size, dtype, tokens).items():
        variants = {name: paced(name, run, dtype) for name, run in table.items()}
        timings[passed] = interleave(variants, rounds=rounds)
    return timings | {"norms": interleave(norms(size, r, dtype), rounds=rounds)}


def over_our_dora(timings: list[Timing]) -> dict[str, float]:
    """Each layer's time as a multiple of our DoRA layer's: the median over the same rounds."""
    ours = next((t.seconds for t in timings if t.name == OUR_DORA), {})
    rounds = {t.name: [s / ours[i] for i, s in t.seconds.items() if i in ours] for t in timings}
    return {name: float(torch.tensor(of).quantile(0.5)) for name, of in rounds.items() if of}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.dora", description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each configuration as soon as it is measured."""
    options, console = parse(argv), Console()
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    rows: list[dict[str, object]] = []
    for size in options.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for r in options.ranks:
                facts = {"shape": shape_name(size), "tokens": options.tokens, "r": r}
                facts |= {"dtype": dtype_name(dtype), "adapter_dtype": "fp32"}
                results = measure(size, r, dtype, options.tokens, options.rounds)
                for name, timings in results.items():
                    label = f"{shape_name(size)}, {dtype_name(dtype)}, r = {r}, {name}"
                    print_timings(console, label, timings, READ if name == "norms" else OURS)
                    over = over_our_dora(timings)
                    for t in timings:
                        ratio = {"over_our_dora": over.get(t.name, "")}
                        rows.append({**facts, "pass": name, **t.row(), **ratio, **environment()})
    write_csv(options.out / "dora.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
