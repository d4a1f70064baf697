"""The support matrix: each engine's result for adapters of every start, base dtype and residual.

`python -m benchmarks.cpu.serving`. A Llama with two small blocks is adapted, moved and saved, and
`lora-kernels check` checks the folder for each engine. A row has the outcome, and the largest error
of a layer's update after the engine's cast. "plain" rows are PEFT's own folders with the same
options.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.harness import environment
from benchmarks.common.report import RESULTS, write_csv
from lora_kernels import LoRAConfig, add_lora, save_adapter
from lora_kernels.files.serving.check import Result, check
from lora_kernels.init import get_initializer, initializer_names

ENGINES = ("vllm", "sglang", "llama.cpp", "ollama", "peft")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"r": 8, "lora_alpha": 12, "use_rslora": True, "rank_pattern": {"v_proj": 4}}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(dtype: torch.dtype, folder: Path) -> LlamaForCausalLM:
    """A small Llama; its configuration is written to the folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 64}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, dtype=dtype
    )
    made = LlamaForCausalLM(config).to(dtype)
    made.config.architectures = ["LlamaForCausalLM"]
    made.config.save_pretrained(folder)
    return made


def move(parameters: Iterator[torch.nn.Parameter]) -> None:
    """Change the parameters, as a stand-in for training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))


def of_starts(folder: Path) -> Iterator[tuple[dict[str, object], Path, Path]]:
    """(facts, adapter, base) for every start, dtype and residual."""
    for dtype in DTYPES:
        for start in initializer_names():
            initializer = get_initializer(start)
            if initializer.rewrites_base:  # LoftQ's adapter belongs to the base that LoftQ makes
                continue
            for residual in ("absorb", "implicit"):
                base, out = folder / f"{dtype}", folder / f"{dtype}-{start}-{residual}"
                adapted = model(dtype, base)
                gradients = None
                if initializer.needs_gradient:
                    layers = dict(adapted.named_modules())
                    gradients = {
                        name: torch.randn(module.weight.shape)
                        for name, module in layers.items()
                        if name.rpartition(".")[2] in TARGETS
                    }
                config = LoRAConfig(
                    init_lora_weights=start, residual=residual, target_modules=TARGETS, **OPTIONS
                )
                add_lora(adapted, config, gradients=gradients, progress=False)
                move(adapted.parameters())
                save_adapter(adapted, out)
                facts = {"start": start, "base_dtype": dtype, "residual": residual}
                yield facts | {"file": "save_adapter"}, out, base


def of_peft(folder: Path) -> Iterator[tuple[dict[str, object], Path, Path]]:
    """(facts, adapter, base) for PEFT's own folders."""
    cases = {
        "plain": {"lora_alpha": 16, "r": 8},
        "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 8},
        "alpha_pattern": {"r": 8, "lora_alpha": 8, "alpha_pattern": {"q_proj": 32}},
        "rank_pattern": {"r": 8, "lora_alpha": 8, "rank_pattern": {"q_proj": 4}},
        "fractional alpha": {"r": 8, "lora_alpha": 8.5},
        "modules_to_save": {"r": 8, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
        "use_dora": {"r": 8, "lora_alpha": 8, "use_dora": True},
        "pissa": {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"},
    }
    for name, options in cases.items():
        base, out = folder / "peft", folder / f"peft-{name}"
        plain = model(torch.bfloat16, base)
        adapted = peft.get_peft_model(plain, peft.LoraConfig(target_modules=TARGETS, **options))
        move(adapted.parameters())
        adapted.save_pretrained(out)
        facts = {"start": name, "base_dtype": torch.bfloat16, "residual": ""}
        yield facts | {"file": "PEFT"}, out, base


def row(facts: dict[str, object], result: Result) -> dict[str, object]:
    error = result.worst_error
    return facts | {
        "base_dtype": str(facts["base_dtype"]).removeprefix("torch."),
        "engine": result.engine,
        "rules": result.as_of,
        "outcome": result.outcome,
        "right_layers": sum(layer.is_right for layer in result.layers),
        "layers": len(result.layers),
        "worst_error": "" if error is None else f"{error:.2e}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and write serving.csv."""
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.serving", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    options, rows = parser.parse_args(argv), []
    table = Table("start", "base", "residual", "file", *ENGINES)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for cases in (of_starts(folder), of_peft(folder)):
            for facts, adapter, base in cases:
                results = check(adapter, base, ENGINES)
                found = [row(facts, result) for result in results]
                rows += [each | environment() for each in found]
                cells = [f"{each['outcome']} {each['worst_error']}" for each in found]
                known = [found[0][key] for key in ("start", "base_dtype", "residual", "file")]
                table.add_row(*map(str, known), *cells)
    Console(width=180).print(table, markup=False)
    write_csv(options.out / "serving.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
