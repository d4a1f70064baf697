"""The kernels of DoRA: `lora::row_norms` and the passes over y and dy, through the operators."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels.ops.linear.dora import dora_scale_backward_ref, dora_scale_ref

from ..ops.strides import LAYOUTS, lay_out
from ..ops.test_dora import check as check_layer
from ..ops.test_dora import dora_inputs
from ..ops.test_row_norms import assert_exact, exact, operands
from ..support.exhaustive import ALL_KERNELS

ops = torch.ops.lora
op = ops.row_norms
SHAPES = [(1, 1, 1), (33, 300, 16), (17, 129, 0), (20, 130, 40)]
SHAPES += [(5, 7, 2), (40, 130, 70), (9, 600, 20)] if ALL_KERNELS else []


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS if ALL_KERNELS else ("contiguous", "transposed"))
def test_matches_float64(shape, layout, dtypes, device):
    for dtype in (*dtypes, torch.float64):
        weight, right, left = operands(*shape, dtype, device)
        assert_exact(lay_out(weight, layout), right, left, 0.7)


def test_factors_of_other_dtypes_and_strides(dtypes, device):
    for factor in (*dtypes[1:], torch.float64):
        weight, right, left = operands(20, 90, 6, torch.float32, device, factor)
        assert_exact(weight, right.T.contiguous().T, lay_out(left, "both_strided"), -1.3)


@pytest.mark.parametrize("residue", [0.3, 1e-4])
@pytest.mark.parametrize("shape", [(20, 300, 16), (18, 140, 40)])
def test_rows_that_nearly_cancel(shape, residue, device):
    _, right, left = operands(*shape, torch.float32, device)
    weight = -0.7 * left.double() @ right.double()
    weight *= 1 + residue * torch.randn(weight.shape).double().to(device)
    weight[::3] += torch.randn(weight.shape)[::3].double().to(device)
    assert_exact(weight.float(), right, left, 0.7)


def test_special_values(device):
    weight, right, left = operands(20, 50, 3, torch.float32, device)
    weight[:5] = 0
    left[:5] = 0
    weight[1, 3], weight[2, 49], weight[3, 0] = math.nan, math.inf, 1e-30
    left[4, 1] = math.inf
    weight[6] *= 1e25
    got = op(weight, right, left, 0.5)
    assert got[0] == 0 and got[1].isnan() and got[2] == got[4] == math.inf
    torch.testing.assert_close(got[3], torch.tensor(1e-30, device=device), rtol=1e-6, atol=0)
    want = exact(weight, right, left, 0.5)[5:]
    torch.testing.assert_close(got[5:].double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2)])
def test_empty(shape, device):
    norms = op(*operands(*shape, torch.float32, device), 1.0)
    assert torch.equal(norms, torch.zeros(shape[0], device=device))


def test_the_same_bits_twice(device):
    given = operands(40, 300, 16, torch.float32, device)
    assert torch.equal(op(*given, 0.7), op(*given, 0.7))


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [1, 140])
@pytest.mark.parametrize("columns", [37, 520])
def test_passes_agree_with_their_references(rows, columns, dtypes, device):
    for dtype in (*dtypes, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        y0, dy = (torch.randn(rows, columns).to(device, dtype) for _ in range(2))
        gain, bias = torch.rand(columns).to(device, wide), torch.randn(columns).to(device, dtype)
        for shift in (bias, None):
            got = ops._dora_scale(y0, gain, shift)
            torch.testing.assert_close(got, dora_scale_ref(y0, gain, shift))
        for args in ((dy, y0, gain, True, True), (dy, None, gain, False, True)):
            got = ops._dora_scale_backward(*args)
            torch.testing.assert_close(got, dora_scale_backward_ref(*args))
        got = ops._dora_scale_backward(dy[:1].expand_as(dy), y0, gain, True, False)
        want = dora_scale_backward_ref(dy[:1].expand_as(dy), y0, gain, True, False)
        torch.testing.assert_close(got, want)


def test_layer(dtypes, device):
    """All kernels together, with a start and dropout."""
    seed = torch.tensor(5, device=device)
    for dtype in dtypes:
        t = dora_inputs((2, 10), 24, 40, 4, dtype, start=True, device=device)
        check_layer(t, 0.7, 0.25, seed)
