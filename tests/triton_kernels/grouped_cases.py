"""Inputs of `lora::grouped_linear`, and its results in float64."""

from __future__ import annotations

import numpy as np
import torch

from lora_kernels.ops.philox import dropout as drop

from ..ops.test_linear import formula, largest_ratio
from ..support.oracle import assert_close, to_numpy

op = torch.ops.lora.grouped_linear
LEARNED = ("x", "bias", "lora_A", "lora_B")
Case = dict[str, torch.Tensor | None]


def inputs(
    counts: tuple[int, ...],
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    tail: int = 0,
    tokens: int | None = None,
    transposed: bool = False,
    bias: bool = True,
    start: bool = False,
    device: str = "cpu",
) -> Case:
    """Experts with `counts` rows, then `tail` rows of none. With `tokens` the rows are drawn from
    as many, in any order and with repeats. `transposed`: W is stored as [E, K, N].
    """
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    make = lambda *shape: torch.randn(*shape).to(device)  # noqa: E731
    E, S = len(counts), sum(counts) + tail
    W = (make(E, n, k) / k**0.5).to(dtype)
    return {
        "x": make(S if tokens is None else tokens, k).to(dtype),
        "weight": W.transpose(1, 2).contiguous().transpose(1, 2) if transposed else W,
        "bias": make(E, n).to(dtype) if bias else None,
        "ends": torch.tensor(counts).cumsum(0).to(device, torch.int32),
        "rows": None if tokens is None else torch.randint(tokens, (S,)).to(device),
        "lora_A": (make(E, r, k) / k**0.5).to(factor),
        "lora_B": make(E, n, r).to(factor),
        "start_A": (make(E, r, k) / k**0.5).to(factor) if start else None,
        "start_B": make(E, n, r).to(factor) if start else None,
    }


def call(t: Case, scaling: float, dropout: float = 0.0, seed: torch.Tensor | None = None):
    names = ("x", "weight", "bias", "ends", "rows", "lora_A", "lora_B")
    return op(*(t[name] for name in names), scaling, dropout, seed, t["start_A"], t["start_B"])


def oracle(
    t: Case, dy: torch.Tensor, s: float, dropout: float, seed: torch.Tensor | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(result, size) of y and the gradients as in `ops.test_linear`, expert by expert."""
    given = ("weight", "bias", "lora_A", "lora_B", "start_A", "start_B")
    f = {name: to_numpy(t[name].to(t["x"].dtype)) for name in given if t[name] is not None}
    x, g, S = to_numpy(t["x"]), to_numpy(dy), dy.shape[0]
    rows = np.arange(S) if t["rows"] is None else t["rows"].cpu().numpy()
    mask = np.ones((S, x.shape[1]))
    if dropout:
        mask = to_numpy(drop(torch.from_numpy(mask), dropout, seed.cpu()))
    ends = t["ends"].tolist()
    results = []
    for power, sign in ((1, -1), (2, 1)):  # the formula, and the sum of its terms' squares
        want = {name: np.zeros(t[name].shape) for name in LEARNED if t[name] is not None}
        want["y"] = np.zeros(g.shape)
        for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            part = slice(begin, end)
            own = {name: value[e] ** power for name, value in f.items()}
            own["x"] = x[rows[part]] ** power
            values = formula(own, g[part] ** power, mask[part] ** power, s**power, sign)
            want["y"][part] = values["y"]
            np.add.at(want["x"], rows[part], values["x"])
            for name in want.keys() - {"x", "y"}:
                want[name][e] = values[name]
        results.append(want)
    return results[0], {name: np.sqrt(value) for name, value in results[1].items()}


def check(
    t: Case, scaling: float, dropout: float = 0.0, seed: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Compare y and all gradients with the oracle, and return them."""
    dtype, S = t["x"].dtype, len(t["x"] if t["rows"] is None else t["rows"])
    (_, n, k), r, used = t["weight"].shape, t["lora_A"].shape[1], int(t["ends"][-1])
    leaves = {name: t[name].requires_grad_() for name in LEARNED if t[name] is not None}
    y = call(t, scaling, dropout, seed)
    assert y.dtype == dtype and y.shape == (S, n)
    assert not y[used:].any()
    dy = torch.randn(S, n, dtype=dtype).to(y.device)
    dy[used:] = float("nan")  # rows of no expert: their gradient is not read
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    got = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
    want, size = oracle(t, dy.nan_to_num(), scaling, dropout, seed)
    most = int(t["ends"].diff(prepend=t["ends"][:1] * 0).max())
    for name, value in got.items():
        assert name == "y" or (value.dtype, value.shape) == (t[name].dtype, t[name].shape)
        if not value.numel():
            continue
        # dx is rounded for each row of the product, and once more after repeated rows were added.
        ratio = largest_ratio(dtype, max(most, 1), n, k, max(r, 1), value.numel(), core=name == "x")
        assert_close(to_numpy(value), want[name], size[name], ratio, dtype)
    return got
