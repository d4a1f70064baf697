"""docs/troubleshooting.md: its headings are messages of the package, and most are raised here."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from lora_kernels._utils.errors import needed

from ..support import ROOT
from ..support.adapters import write_plain
from ..support.packages import needs_peft
from ..support.quantized import OnlyForward
from ..support.running import quiet

PAGE = ROOT / "docs/troubleshooting.md"
TITLES = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
VARIABLE = "…"


def pattern(title: str) -> re.Pattern[str]:
    """Of a message, whose variable parts the title shows as "…"."""
    return re.compile(".*".join(re.escape(part.strip()) for part in title.split(VARIABLE)))


def text_of(node: ast.AST) -> str | None:
    """A string expression, with "…" for what is computed; None for other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VARIABLE for part in node.values)
    return None


def messages() -> list[str]:
    """All strings of the package, each joined over its pieces."""
    found = []
    for file in (*sorted((ROOT / "lora_kernels").rglob("*.py")), ROOT / "setup.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (text := text_of(node)) is not None:
                found.append(" ".join(text.split()))
    return found


def test_every_title_is_a_message():
    known = messages()
    for title in TITLES:
        assert any(pattern(title).search(message) for message in known), title
    assert len(TITLES) == len(set(TITLES)) >= 25


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(24, 32), nn.Linear(32, 24)
        self.small = nn.Linear(24, 2)

    def forward(self, x):
        return self.small(self.two(self.one(x)))


class Reader(nn.Module):
    """Multiplies with the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def adapted(**options) -> nn.Module:
    model = Net()
    quiet(model, LoRAConfig(**{"r": 4} | options))
    return model


def changed(change: Callable[[nn.Linear], object], **options) -> None:
    """Adapts a model after `change` of one layer."""
    model = Net()
    with torch.no_grad():
        change(model.one)
    quiet(model, LoRAConfig(**{"r": 4} | options))


def second_adapter(folder: Path) -> None:
    quiet(adapted(), LoRAConfig(r=4), adapter_name="second")


def quantized(folder: Path) -> None:
    linear = nn.Linear(8, 8)
    model = nn.Sequential(OnlyForward(linear.weight.detach(), linear.bias, torch.float32))
    quiet(model, LoRAConfig(r=2))
    merge_lora(model)


def resized(folder: Path) -> None:
    model = nn.Sequential(nn.Embedding(20, 8))
    quiet(model, LoRAConfig(r=2, target_modules=["0"]))
    model[0].num_embeddings = 21


def on_meta(folder: Path) -> None:
    with torch.device("meta"):
        model = Net()
    quiet(model, LoRAConfig(r=2))
    model(torch.zeros(1, 24, device="meta"))


def partitioned(linear: nn.Linear) -> None:
    linear.weight.ds_id, linear.weight.ds_shape = 0, linear.weight.shape
    linear.weight.data = torch.empty(0)


def another_model(folder: Path) -> None:
    save_adapter(adapted(), folder)
    load_adapter(nn.Sequential(nn.Linear(24, 32)), folder, progress=False)


def another_base(folder: Path) -> None:
    save_adapter(adapted(), folder)
    model = Net()
    with torch.no_grad():
        model.one.weight.mul_(3)
    load_adapter(model, folder, progress=False)


def of_pissa(folder: Path) -> None:
    write_plain(folder, target_modules=["q"], init_lora_weights="pissa")
    load_adapter(nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(6, 5)})}), folder)


def of_peft(folder: Path) -> None:
    model = Net()
    model.peft_config = {}
    add_lora(model)


EXAMPLES: dict[str, Callable[[Path], object]] = {
    "… needs the package …: pip install": lambda _: needed("no_such_package", "this", "cli"),
    "no module is called": lambda _: adapted(target_modules=["won"]),
    "is larger than min(out, in)": lambda _: adapted(target_modules=["small"]),
    "is left to adapt": lambda _: adapted(exclude_modules=".*"),
    "target_modules names": lambda _: quiet(
        Reader(), LoRAConfig(r=2, target_modules=["called", "read"])
    ),
    "has no option": lambda _: LoRAConfig(lora_aplha=16),
    "matches no adapted layer": lambda _: adapted(rank_pattern={"three": 2}),
    "was added with residual='absorb'": second_adapter,
    "before it is wrapped in": lambda _: add_lora(torch.compile(Net())),
    "cannot be resized": resized,
    "so its magnitude gives no scale": lambda _: changed(lambda layer: layer.weight.zero_()),
    "holds NaN or Inf": lambda _: changed(lambda layer: layer.weight.fill_(torch.nan)),
    "has numerical rank": lambda _: changed(
        lambda layer: layer.weight.fill_(1.0), init_lora_weights="pissa"
    ),
    "could overflow": lambda _: changed(lambda layer: layer.half(), lora_alpha=8e7),
    "alpha_sqrt": lambda _: adapted(scaling="alpha_sqrt"),
    "starts from the": lambda _: adapted(init_lora_weights="lora_ga"),
    "would erase the update": quantized,
    "nothing casts it": lambda _: changed(lambda layer: layer.to(torch.float8_e4m3fn)),
    "is on the meta device": lambda _: changed(lambda layer: layer.to("meta")),
    "waits for its start": on_meta,
    "by DeepSpeed ZeRO-3": lambda _: changed(partitioned),
    "is not a folder": lambda folder: load_adapter(Net(), folder / "someone/adapter"),
    "contains a layer": another_model,
    "the norm of": another_base,
    "that PEFT changed": of_pissa,
    "and vLLM takes": lambda folder: save_adapter(
        adapted(r=9, target_modules=["one", "two"]), folder
    ),
    "this model has PEFT's adapters": of_peft,
}


def title_with(part: str) -> str:
    (title,) = [title for title in TITLES if part in title]
    return title


def raised(example: Callable[[Path], object], folder: Path) -> str:
    """The error or the warnings of an example."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            example(folder)
        except (ImportError, OSError, TypeError, ValueError) as error:
            return str(error)
    return "\n".join(str(warning.message) for warning in told)


@pytest.mark.parametrize("part", EXAMPLES)
def test_it_is_raised(part, tmp_path):
    assert pattern(title_with(part)).search(raised(EXAMPLES[part], tmp_path))


@needs_peft
@pytest.mark.parametrize(
    ("part", "options", "merged"),
    [
        ("has rewritten the base", {"init_lora_weights": "olora"}, False),
        ("merged into the base", {}, True),
    ],
)
def test_it_is_raised_inside_peft(part, options, merged, tmp_path):
    import peft

    import lora_kernels.peft

    config = peft.LoraConfig(r=2, target_modules=["one", "two"], **options)
    model = peft.get_peft_model(Net(), config)
    if merged:
        model.merge_adapter()
    with pytest.raises((RuntimeError, ValueError), match=pattern(title_with(part)).pattern):
        lora_kernels.peft.initialize(model, "loram", progress=False)
