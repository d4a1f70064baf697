"""Counts what a call of the layer makes the host do: `python -m tests.triton_kernels.host`.

Runs in a process of its own, without the interpreter, and prints one JSON object.
"""

from __future__ import annotations

import json
import os
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton import knobs

from benchmarks.cpu.host import as_on_a_gpu
from benchmarks.cpu.stand_in import Seen, stand_in
from lora_kernels.triton_kernels import integers, launcher
from lora_kernels.triton_kernels.linear import gemm, rank, shrink

BF16 = torch.bfloat16
FIRST_TENSOR = 9  # after grid, stream, function, metadata and hooks
WAYS = {
    "decode": 8,
    "reversed": 512,
    "fused": 2048,
    "fused pair": 2048,
    "overlapped": 2048,
}  # implementation: tokens


def layer(way: str, tokens: int, sizes: int = 512) -> dict[str, object]:
    """Three calls of the layer with one implementation: what the first and the later ones do."""
    options = {"dtype": BF16, "device": "meta"}
    x, W = torch.empty(tokens, sizes, **options), torch.empty(sizes, sizes, **options)
    A, B = torch.empty(16, sizes, device="meta"), torch.empty(sizes, 16, device="meta")
    counts = []
    slow = mock.Mock(side_effect=AssertionError("a kernel's function called by the host"))
    with (
        torch.no_grad(),
        as_on_a_gpu(way) as seen,
        mock.patch.object(triton, "cdiv", slow),
        mock.patch.object(triton, "next_power_of_2", slow),
    ):
        for scaling in (1.0, 2.0, 2.0):  # no plan contains the scaling
            before = Seen(seen.launches.copy(), seen.binder.copy(), seen.compiled.copy())
            torch.ops.lora.linear(x, W, None, A, B, scaling)
            counts.append(
                {
                    "launches": dict(seen.launches - before.launches),
                    "binder": dict(seen.binder - before.binder),
                    "compiled": dict(seen.compiled - before.compiled),
                }
            )
    return {"first": counts[0], "second": counts[1], "third": counts[2]}


def reduction() -> launcher.Launch:
    """The launch of a small kernel that has not run yet: 4 parts [600]."""
    return rank._reduction.__wrapped__(4, 600)


def arguments() -> dict[str, object]:
    """A direct launch passes what Triton's own launch passes, with pointers as addresses."""
    different = []
    parts, out = torch.empty(4, 600), torch.empty(600)
    with stand_in(keep_arguments=True) as seen:
        launch = reduction()
        for _ in range(2):
            launch((parts, out), (0.5,))
        a, W, bias = (torch.empty(256, 256, dtype=BF16) for _ in range(3))
        z, B = torch.empty(256, 16, dtype=BF16), torch.empty(256, 16)
        for _ in range(2):
            gemm.gemm("fused", 132, a, W, False, z, B, 0.5, bias[0])
    for (name, bound), (_, direct) in zip(seen.arguments[::2], seen.arguments[1::2], strict=True):
        if len(bound) != len(direct):
            different.append((name, "count"))
        for i, (theirs, ours) in enumerate(zip(bound, direct, strict=False)):
            if i in (7, 8):  # hooks, of which there are none
                same = ours is None and not theirs.calls
            elif isinstance(theirs, torch.Tensor):
                same = ours == theirs.data_ptr()
            elif hasattr(theirs, "block_shape"):
                # The third belongs to the result, a new tensor in each call.
                same = type(ours) is type(theirs) and all(
                    list(getattr(ours, field)) == list(getattr(theirs, field))
                    for field in ("shape", "strides", "block_shape", "padding")
                )
                same &= i == FIRST_TENSOR + 2 or ours.base is theirs.base
            else:
                same = ours == theirs
            if not same:
                different.append((name, i))
    return {"different": different, "compared": [name for name, _ in seen.arguments[1::2]]}


def specialization() -> dict[str, object]:
    """Changes that need another compilation cause one, and other changes do not."""
    A, seed = torch.empty(16, 256), torch.zeros((), dtype=torch.int64)

    def compilations(*calls, offset=0) -> int:
        shrink._plan.cache_clear()
        with stand_in() as seen:
            for x, A_, p in calls:
                shrink.shrink_parts(x, A_, None, p, seed, col_offset=offset)
                offset *= 4
        return seen.compiled.total()

    memory = torch.empty(256 * 256 + 8, dtype=BF16)
    x, odd = memory[: 256 * 256].view(256, 256), memory[1 : 256 * 256 + 1].view(256, 256)
    other = memory[8 : 256 * 256 + 8].view(256, 256)
    return {
        "same alignment": compilations((x, A, 0.0), (other, A, 0.0)),
        "another alignment": compilations((x, A, 0.0), (odd, A, 0.0)),
        "another dtype": compilations((x, A, 0.0), (x, A.half(), 0.0)),
        "another stride": compilations((x, A, 0.0), (x, A.T.contiguous().T, 0.0)),
        "another number of rows": compilations((x, A, 0.0), (x[:250], A, 0.0)),
        "another offset": compilations((x, A, 0.1), (x, A, 0.1), (x, A, 0.1), offset=4),
        "another p": compilations((x, A, 0.1), (x, A, 0.5), (x, A, 0.9)),
    }


def paths() -> dict[str, object]:
    """Whether a second launch bypasses the binder or goes through it."""
    parts, out = torch.empty(4, 600), torch.empty(600)

    def through_binder() -> int:
        launch = reduction()
        with stand_in() as seen:
            for _ in range(3):
                launch((parts, out), (0.5,))
        assert seen.launches.total() == 3
        return seen.binder.total()

    usual = through_binder()
    with mock.patch.object(launcher, "DIRECT", False):
        unknown = through_binder()
    knobs.runtime.launch_enter_hook.add(print_nothing := lambda *_: None)
    watched = through_binder()
    knobs.runtime.launch_enter_hook.remove(print_nothing)
    return {"known": launcher.DIRECT, "usual": usual, "unknown": unknown, "watched": watched}


def mixed_devices() -> str:
    """The error of a launch whose tensors are on two devices, which addresses do not show."""
    launch = reduction()
    with stand_in(), mock.patch.object(torch.Tensor, "get_device", lambda t: t.dim()):
        try:
            launch((torch.empty(4, 600), torch.empty(600)), (0.5,))
        except ValueError as error:
            return str(error)
    return ""


def main() -> None:
    facts = {
        "layer": {way: layer(way, tokens) for way, tokens in WAYS.items()},
        "arguments": arguments(),
        "specialization": specialization(),
        "paths": paths(),
        "mixed_devices": mixed_devices(),
        "integers": all(
            integers.cdiv(a, b) == triton.cdiv(a, b)
            and integers.next_power_of_2(a) == triton.next_power_of_2(a)
            for a in range(1, 300)
            for b in range(1, 70)
        ),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
