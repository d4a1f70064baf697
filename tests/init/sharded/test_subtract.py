"""What is subtracted from parts of a weight has the bits of what is subtracted from the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lora_kernels.init.sharded.layout import Block, Shards
from lora_kernels.init.sharded.subtract import subtract_factors_here_
from lora_kernels.init.start import ROW_BLOCK, subtract_factors_

ROWS, COLS = 2 * ROW_BLOCK + 37, 61
CUTS = {
    "rows": ([0, 3, 7, ROWS], [0, COLS]),
    "columns": ([0, ROWS], [0, 8, 13, 60, COLS]),
    "both": ([0, ROW_BLOCK, ROW_BLOCK + 1, ROWS], [0, 5, COLS]),
    "whole": ([0, ROWS], [0, COLS]),
}


def parts(weight: Tensor, rows: list[int], cols: list[int]) -> list[Block]:
    """Copies of the rectangles between the given rows and columns."""
    return [
        Block(0, weight[r:to_r, c:to_c].clone(), r, c)
        for r, to_r in pairwise(rows)
        for c, to_c in pairwise(cols)
    ]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_of_the_whole(cut, dtype, transposed):
    draw = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(ROWS, COLS, generator=draw).to(dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    right = torch.randn(7, COLS, generator=draw).to(wide)
    left = torch.randn(ROWS, 7, generator=draw).to(wide)
    blocks = parts(weight, *CUTS[cut])
    device = weight.device
    shards = Shards((ROWS, COLS), blocks, dtype, device, None, primary=True)
    subtract_factors_here_(shards, right, left, 0.7)
    subtract_factors_(weight, right, left, 0.7)
    for _, data, row, col in blocks:
        place = slice(row, row + data.shape[0]), slice(col, col + data.shape[1])
        assert torch.equal(data, weight[place])
