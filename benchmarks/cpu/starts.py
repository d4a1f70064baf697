"""How long each start takes, compared with PEFT's: `python -m benchmarks.cpu.starts`.

One layer of 4096 × 4096, and all linear layers of SmolLM2-135M. The time is from the model to the
adapted model. For data-driven starts, it includes capturing inputs or gradients, here from 4096
tokens. Both packages use the same weights and data, and take turns.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoftQConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, KasaConfig
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common.harness import Timing, Variant, environment, interleave
from benchmarks.common.report import RESULTS, print_timings, write_csv
from benchmarks.cpu.init import frozen_linear, pretrained_like
from lora_kernels import LoRAConfig, add_lora, capture_activations, capture_gradients
from lora_kernels.init import (
    QERA,
    CorDA,
    Initializer,
    LoRAXS,
    get_initializer,
)

TOKENS = 4096
Start = str | Initializer

if find_spec("attr") is None:  # PEFT's CorDA uses only this decorator of it
    sys.modules["attr"] = SimpleNamespace(dataclass=dataclass)  # type: ignore[assignment]


@dataclass
class Case:
    """A model, the data for its starts, and the names of the layers to adapt."""

    name: str
    model: nn.Module
    batches: list[Any]
    targets: list[str]
    forward: Callable[[nn.Module, Any], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    rounds: int
    slow_rounds: int


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = frozen_linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_layer(size: int, rounds: int, slow_rounds: int) -> Case:
    """One layer, and inputs with a decaying spectrum and a nonzero mean."""
    generator = torch.Generator().manual_seed(0)
    scale = (1 + torch.arange(size)).float().pow(-0.5)
    rows = torch.randn(TOKENS, size, generator=generator) * scale + 0.1 * scale
    model = OneLayer(pretrained_like((size, size), torch.float32))

    def forward(model: nn.Module, batch: Tensor) -> Any:
        return model(batch)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    batches = list(rows.split(TOKENS // 8))
    return Case(f"{size}×{size}", model, batches, ["linear"], forward, loss, rounds, slow_rounds)


def smollm2(rounds: int, slow_rounds: int) -> Case:
    """SmolLM2-135M, and 32 texts of 128 tokens, some of them padded."""
    from benchmarks.common.smollm2 import (
        MAX_TOKENS,
        PROJECTIONS,
        load_model,
        load_texts,
        load_tokenizer,
        tokenize,
    )

    count = TOKENS // MAX_TOKENS
    texts = tokenize(load_tokenizer(), load_texts()[0][:count])
    ids = torch.zeros(count, MAX_TOKENS, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    batches = [
        {"input_ids": own, "attention_mask": other, "labels": own.where(other == 1, -100)}
        for own, other in zip(ids.split(4), mask.split(4), strict=True)
    ]

    def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        return model(**batch, use_cache=False)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return forward(model, batch).loss

    model, targets = load_model(), list(PROJECTIONS)
    return Case("SmolLM2-135M", model, batches, targets, forward, loss, rounds, slow_rounds)


def ours(case: Case, start: Start, r: int, model: nn.Module) -> nn.Module:
    """Adapt the model with this package, as a user does."""
    initializer = get_initializer(start)
    data: dict[str, Any] = {}
    if initializer.needs_activations:
        data["activations"] = capture_activations(
            model, case.batches, case.targets, forward=case.forward, progress=False
        )
    if initializer.needs_gradient:
        data["gradients"] = capture_gradients(
            model, case.batches, case.targets, loss=case.loss, progress=False
        )
    config = LoRAConfig(
        r=r, lora_alpha=r, target_modules=case.targets, init_lora_weights=initializer
    )
    add_lora(model, config, progress=False, **data)
    return model


def theirs(case: Case, options: Mapping[str, Any], r: int, model: nn.Module) -> nn.Module:
    """Adapt the model with PEFT, as in PEFT's documentation."""
    config = LoraConfig(r=r, lora_alpha=r, target_modules=case.targets, **options)
    if options.get("corda_config"):
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=lambda: _run(case, model))
    if options.get("lora_ga_config"):
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config, lambda: _train(case, model))
    try:
        adapted = get_peft_model(model, config)
    except AssertionError as error:  # PEFT's LoftQ runs only on CUDA
        raise RuntimeError(str(error)) from error
    if options.get("eva_config"):
        from peft import initialize_lora_eva_weights

        own: dict[str, Any] = {}
        if not isinstance(case.batches[0], Mapping):
            own = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
        initialize_lora_eva_weights(
            adapted, case.batches, forward_fn=case.forward, show_progress_bar=False, **own
        )
    return adapted


@torch.no_grad()
def _run(case: Case, model: nn.Module) -> None:
    """Run one text at a time, without padding, as PEFT's CorDA requires."""
    for batch in case.batches:
        if not isinstance(batch, Mapping):
            case.forward(model, batch)
            continue
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            case.forward(model, {"input_ids": ids[None, : int(mask.sum())]})


def _train(case: Case, model: nn.Module) -> None:
    for batch in case.batches:
        case.loss(model, batch).backward()


def _lora_ga_config() -> Any:
    from peft.tuners.lora.config import LoraGAConfig

    return LoraGAConfig()


# name: our start, PEFT's options if PEFT has the start, and whether PEFT takes seconds
STARTS: dict[str, tuple[Start, dict[str, Any] | None, bool]] = {
    "lora": ("lora", {"init_lora_weights": True}, False),
    "gaussian": ("gaussian", {"init_lora_weights": "gaussian"}, False),
    "orthogonal": ("orthogonal", {"init_lora_weights": "orthogonal"}, False),
    "loram": ("loram", None, False),
    "olora": ("olora", {"init_lora_weights": "olora"}, True),
    "pissa": ("pissa", {"init_lora_weights": "pissa"}, True),
    "pissa_niter_16": ("pissa", {"init_lora_weights": "pissa_niter_16"}, False),
    "milora": ("milora", None, True),
    "mica": ("mica", {"init_lora_weights": "mica"}, True),
    "kasa": ("kasa", {"kasa_config": KasaConfig()}, True),
    "lora_xs": ("lora_xs", None, False),
    "lora_xs, bottom": (LoRAXS(retain_part="bottom"), None, True),
    "loftq": (
        "loftq",
        {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4, loftq_iter=5)},
        True,
    ),
    "lora_ga": ("lora_ga", {"init_lora_weights": "lora_ga", "lora_ga_config": True}, True),
    "lora_one": ("lora_one", None, True),
    "lora_sb": ("lora_sb", None, True),
    "eva": ("eva", {"init_lora_weights": "eva", "eva_config": EvaConfig()}, True),
    "corda, ipm": (
        CorDA("ipm"),
        {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")},
        True,
    ),
    "corda, kpm": (
        CorDA("kpm"),
        {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
        True,
    ),
    "lora_null": ("lora_null", None, True),
    "qera, exact": (QERA(), None, True),
    "qera, approx": (QERA(exact=False), None, True),
}


def measured(case: Case, name: str, r: int) -> list[Timing]:
    """The times of our start and of PEFT's start."""
    start, options, slow = STARTS[name]
    rounds = case.slow_rounds if slow else case.rounds
    copied = partial(copy.deepcopy, case.model)
    variants = {"lora_kernels": Variant(partial(ours, case, start, r), copied, rounds, 1)}
    if options is not None:
        if options.get("lora_ga_config"):
            options = {**options, "lora_ga_config": _lora_ga_config()}
        run = partial(theirs, case, options, r)
        variants["PEFT"] = Variant(run, copied, rounds, 0 if slow else 1)
    return interleave(variants, rounds=rounds, baseline="lora_kernels")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.starts", description=__doc__)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--size", type=int, default=4096, help="of the one layer; 0 for none")
    parser.add_argument("--no-model", dest="model", action="store_false")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=2, help="of starts that take seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print each start's times as soon as they are measured."""
    warnings.filterwarnings("ignore", module="peft")
    options, console = parse(argv), Console()
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    rounds = options.rounds, options.slow_rounds
    makers = [partial(one_layer, options.size, *rounds)] if options.size else []
    makers += [partial(smollm2, *rounds)] if options.model else []
    rows: list[dict[str, object]] = []
    for make in makers:
        case = make()
        for name in options.starts:
            timings = measured(case, name, options.r)
            print_timings(console, f"{case.name}, {name}, r = {options.r}", timings, "ours")
            facts = {"model": case.name, "start": name, "r": options.r, "dtype": "fp32"}
            rows += [{**facts, **environment(), **timing.row()} for timing in timings]
            write_csv(options.out / "starts.csv", rows)  # after each start: a run takes long
    return 0


if __name__ == "__main__":
    sys.exit(main())
