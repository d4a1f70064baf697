"""The host's time for a forward call of the layer on a GPU: `python -m benchmarks.cpu.host`.

It runs on any machine: the tensors are on "meta", and the launches go to `stand_in`. Two times are
measured: the whole call, and PyTorch's part of it. PyTorch's part is the module call, the dispatch
of an operator with our signature to an empty Python function, an autograd function that saves the
same tensors, and the ATen calls that our operator makes. The difference is the time of our Python
code and of Triton's code up to the driver. The calls of the CUDA driver itself are not included.
For comparison, an `nn.Linear` of the same sizes is timed on "meta" as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.harness import environment
from benchmarks.common.report import RESULTS, write_csv
from benchmarks.cpu.stand_in import stand_in
from lora_kernels import LoRALinear
from lora_kernels.ops._backends import triton as backend
from lora_kernels.triton_kernels.linear import choice, operator

SIZE = 4096
# tokens, r, training, the variant of the kernels that is chosen
CASES = (
    (1, 16, False, "decode"),
    (1, 16, True, "decode"),
    (16, 16, False, "decode"),
    (64, 128, False, "decode"),
    (512, 16, True, "reversed"),
    (2048, 16, True, "fused"),
    (8192, 16, True, "fused"),
    (8192, 16, True, "overlapped"),
    (8192, 128, True, "fused"),
    (8192, 128, True, "reversed"),
)
WHOLE = ("decode", "overlapped")  # variants that compute z and y together


class _Always(dict):
    """A table of choices that always gives the named variant if it is offered."""

    def __init__(self, way: str) -> None:
        self.way = way

    def get(self, key: tuple, default: object = None) -> str | None:
        step = key[0]
        if step in ("z", "dA", "dz"):
            return "library" if self.way == "library" else "kernel"
        return self.way if step in ("y", "dx") or self.way in WHOLE else "steps"


@contextlib.contextmanager
def as_on_a_gpu(way: str) -> Iterator:
    """In the block, meta tensors use the GPU kernels, launched on a stand-in for a Hopper GPU."""
    # Replaces PyTorch's Python implementation for "meta", which takes 350 us that a GPU would not.
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("addmm_", lambda y, *args, **kwargs: y, "Meta", allow_override=True)
    library = torch.library.Library("lora", "IMPL")
    for name in ("linear_forward", "linear_backward"):
        kernel = backend._on_its_device(backend.KERNELS[name])
        library.impl(name, kernel, "Meta", allow_override=True)
    try:
        with (
            stand_in() as seen,
            mock.patch.object(choice, "CHOSEN", _Always(way)),
            mock.patch.object(operator, "_capability", lambda device: (9, 0)),
            mock.patch.object(operator, "_multiprocessors", lambda device: 132),
        ):
            yield seen
    finally:
        library._destroy()
        aten._destroy()


class _Recorder(TorchDispatchMode):
    """Records the ATen calls made in this mode, so that they can be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        self.calls.append((function, args, kwargs))
        return function(*args, **kwargs)


class _Nothing(torch.autograd.Function):
    """Saves the same tensors as the layer's autograd function, and computes nothing."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, R, scaling, dropout, seed, start_A, start_B):
        y, z = torch.ops.lora_host.forward(
            x, weight, bias, A, B, scaling, dropout, seed, start_A, start_B, R
        )
        ctx.save_for_backward(x, weight, A, B, z, seed, start_A, start_B, R)
        return y

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Skeleton(nn.Module):
    """PyTorch's part of a call of the layer; it returns given results and computes nothing."""

    def __init__(self, layer: LoRALinear, results: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = layer.weight, layer.bias, layer.scaling
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        arguments = (
            "(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling, "
            "float dropout, Tensor? seed, Tensor? start_A, Tensor? start_B, Tensor? R)"
        )
        self.library = torch.library.Library("lora_host", "FRAGMENT")
        self.library.define(f"forward{arguments} -> (Tensor, Tensor)")
        self.library.impl("forward", lambda *_: results, "Meta")
        self.library.define(f"linear{arguments} -> Tensor")
        self.library.impl("linear", self._composite, "CompositeImplicitAutograd")

    @staticmethod
    def _composite(x, weight, bias, A, B, scaling, dropout, seed, start_A, start_B, R) -> Tensor:
        extras = (scaling, dropout, seed, start_A, start_B)
        if torch.is_grad_enabled() and A.requires_grad:
            return _Nothing.apply(x, weight, bias, A, B, R, *extras)
        return torch.ops.lora_host.forward(x, weight, bias, A, B, *extras, R)[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.lora_host.linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling,
            0.0, None, None, None, None,
        )  # fmt: skip


def microseconds(call: Callable[[], object], number: int = 1000, rounds: int = 9) -> float:
    """The time of one call, averaged over the fastest round."""
    call()
    return 1e6 * min(timeit.repeat(call, number=number, repeat=rounds)) / number


def measure(tokens: int, r: int, training: bool, way: str) -> dict[str, object]:
    """Measure one case; return its row of host.csv."""
    with torch.device("meta"):
        base = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layer = LoRALinear.from_linear(base, r=r, init_lora_weights="lora")
        x = torch.empty(tokens, SIZE, dtype=torch.bfloat16)
        results = (torch.empty(tokens, SIZE, dtype=torch.bfloat16), torch.empty(tokens, r))
    arguments = (
        x, layer.weight, layer.bias, layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling,
        0.0, None, None, None, None,
    )  # fmt: skip
    with torch.set_grad_enabled(training), as_on_a_gpu(way) as seen:
        layer(x)
        before = seen.launches.total(), seen.binder.total()
        layer(x)
        launches = seen.launches.total() - before[0]
        bound = seen.binder.total() - before[1]
        total = microseconds(lambda: layer(x))
        with torch.no_grad(), _Recorder() as recorder:
            operator.linear_forward(*arguments)
        calls = recorder.calls
        skeleton = Skeleton(layer, results)
        around = microseconds(lambda: skeleton(x))
        skeleton.library._destroy()
        with torch.no_grad():
            aten = microseconds(lambda: [f(*args, **kwargs) for f, args, kwargs in calls])
        plain = microseconds(lambda: base(x))
    return {
        "tokens": tokens,
        "r": r,
        "mode": "training" if training else "inference",
        "way": way,
        "total_us": total,
        "pytorch_us": around + aten,
        "ours_us": total - around - aten,
        "linear_us": plain,
        "launches": launches,
        "through_binder": bound,
        "aten_calls": " ".join(str(f.overloadpacket).removeprefix("aten.") for f, _, _ in calls),
    }


def main() -> None:
    """Measure, print, and write results/host.csv."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "host.csv")
    arguments = parser.parse_args()
    about = {**environment(torch.device("cpu")), "triton": triton.__version__}
    rows = [measure(*case) for case in CASES]
    table = Table("tokens", "r", "mode", "way", "total", "PyTorch", "ours", "nn.Linear", "launches")
    for row in rows:
        numbers = [f"{row[name]:.1f}" for name in ("total_us", "pytorch_us", "ours_us")]
        table.add_row(
            str(row["tokens"]), str(row["r"]), row["mode"], row["way"], *numbers,
            f"{row['linear_us']:.1f}", f"{row['launches']} ({row['through_binder']} bound)",
        )  # fmt: skip
    Console().print(table)
    write_csv(arguments.out, [{**row, **about} for row in rows])


if __name__ == "__main__":
    main()
