"""`lora::row_norms` against exact rows in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.library import opcheck

from lora_kernels.ops.linear.row_norms import row_norms_ref

from ..support.exhaustive import EXHAUSTIVE, thinned
from .compiled import needs_compiled
from .strides import LAYOUTS, lay_out

op = torch.ops.lora.row_norms
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 7, 2), (70, 300, 16), (300, 70, 33), (9, 2500, 3), (33, 40, 0)]


def operands(n, m, k, dtype, device="cpu", factor=torch.float32):
    generator = torch.Generator().manual_seed(n * m + k)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    return make(n, m).to(dtype), (make(k, m) / 4).to(factor), make(n, k).to(factor)


def exact(weight, right, left, scaling):
    rows = weight.double() + scaling * (left.double() @ right.double())
    return rows.square().sum(1).sqrt()


def assert_exact(weight, right, left, scaling):
    got, want = op(weight, right, left, scaling), exact(weight, right, left, scaling)
    wide = torch.float64 in (weight.dtype, right.dtype, left.dtype)
    assert got.dtype == (torch.float64 if wide else torch.float32)
    assert got.shape == weight.shape[:1] and got.device == weight.device
    torch.testing.assert_close(got.double(), want, rtol=1e-10 if wide else 1e-6, atol=0)


@pytest.mark.parametrize(
    ("layout", "dtype", "shape"), thinned(itertools.product(LAYOUTS, DTYPES, SHAPES), 5)
)
def test_matches_float64(shape, dtype, layout, device):
    weight, right, left = operands(*shape, dtype, device)
    assert_exact(lay_out(weight, layout), right, left, 0.7)


@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_factors_of_other_dtypes_and_strides(factor, layout, device):
    weight, right, left = operands(40, 90, 6, torch.bfloat16, device, factor)
    assert_exact(weight, lay_out(right, layout), lay_out(left, layout), -1.3)


@pytest.mark.parametrize("shape", [(4, 3, 2), (70, 300, 16), (40, 2500, 64)])
@pytest.mark.parametrize("residue", [0.3, 1e-4])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rows_that_nearly_cancel(shape, residue, layout, device):
    """To 1e-6 of what remains, in some rows or in all of them."""
    _, right, left = operands(*shape, torch.float32, device)
    product = -0.7 * left.double() @ right.double()
    noise = torch.randn(product.shape, generator=torch.Generator().manual_seed(1)).to(device)
    size = product.square().mean().sqrt()
    weight = (product + residue * size * noise).float()
    assert_exact(lay_out(weight, layout), right, left, 0.7)
    weight[1:] += size.float() * noise[1:]
    assert_exact(lay_out(weight, layout), right, left, 0.7)


def test_factors_that_cancel_each_other(device):
    """Columns of left of both signs, for one row of right: W is all that remains."""
    weight, right, left = operands(20, 200, 4, torch.float32, device)
    right, left = torch.cat([right, right]), torch.cat([left * 300, left * -300], 1)
    got = op(weight, right, left, 1.0)
    torch.testing.assert_close(got, weight.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_special_values(transposed, device):
    weight, right, left = operands(12, 50, 3, torch.float32, device)
    left[0] = 0
    weight[:5] = 0
    left[1:5] = 0
    weight[1, 3], weight[2, 49], weight[3, 0] = math.nan, math.inf, 1e-30
    left[4, 1] = math.inf
    weight[5] *= 1e-26
    left[5] *= 1e-26
    weight[6] *= 1e25
    got = op(weight.T.contiguous().T if transposed else weight, right, left, 0.5)
    assert got[0] == 0 and got[1].isnan() and got[2] == got[4] == math.inf
    want = exact(weight, right, left, 0.5)
    torch.testing.assert_close(got[3], torch.tensor(1e-30, device=device), rtol=1e-6, atol=0)
    torch.testing.assert_close(got[5:].double(), want[5:], rtol=1e-6, atol=0)


def test_norms_of_rows_without_an_update_are_those_of_the_weight(device):
    """To the last bit, whatever the other factor is: a gain is exactly 1 at an untouched start."""
    weight, right, left = operands(70, 300, 16, torch.float32, device)
    none = op(weight, right[:0], left[:, :0], 0.7)
    assert torch.equal(op(weight, right, torch.zeros_like(left), 0.7), none)
    both = op(weight, torch.cat([right, right - right]), torch.cat([left - left, left], 1), 0.7)
    assert torch.equal(both, none)


@needs_compiled("_row_norms")
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_do_not_change_a_bit(transposed):
    weight, right, left = operands(300, 700, 16, torch.float32)
    weight[40:60] = -0.7 * left[40:60] @ right
    weight = weight.T.contiguous().T if transposed else weight
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = op(weight, right, left, 0.7)
        torch.set_num_threads(3)
        many = op(weight, right, left, 0.7)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, many)


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (5, 0, 0)])
def test_empty(shape, device):
    weight, right, left = operands(*shape, torch.float32, device)
    assert torch.equal(op(weight, right, left, 1.0), torch.zeros(shape[0], device=device))


def test_no_gradient_flows(device):
    weight, right, left = operands(6, 5, 2, torch.float32, device)
    for operand in (weight, right, left):
        operand.requires_grad_()
    assert not op(weight, right, left, 1.0).requires_grad


def test_reference_agrees(device):
    given = operands(20, 30, 4, torch.bfloat16, device)
    torch.testing.assert_close(op(*given, 0.5), row_norms_ref(*given, 0.5), rtol=1e-6, atol=0)


def test_opcheck_and_meta(device):
    given = operands(6, 5, 2, torch.float32, device)
    opcheck(op, (*given, 0.5))
    opcheck(torch.ops.lora._row_norms, (*given, 0.5))
    assert op(*(t.to("meta") for t in given), 0.5).shape == (6,)
    with torch.inference_mode():
        assert op(*given, 0.5).is_inference()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    given = operands(6, 5, 2, torch.float32, device)
    options = {"fullgraph": True, "backend": "inductor" if EXHAUSTIVE else "aot_eager"}
    run = torch.compile(lambda *a: op(*a, 0.5) * 2, dynamic=dynamic, **options)
    torch.testing.assert_close(run(*given), op(*given, 0.5) * 2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.ones(5)}, ValueError, "weight must be 2-D"),
        ({"weight": torch.ones(6, 5, dtype=torch.int8)}, TypeError, "weight has dtype"),
        ({"right": torch.ones(2, 4)}, ValueError, r"right must be \[k, 5\]"),
        ({"right": torch.ones(5)}, ValueError, "right"),
        ({"left": torch.ones(6, 3)}, ValueError, r"left must be \[6, 2\]"),
        ({"left": torch.ones(2, 6)}, ValueError, "left"),
        ({"left": torch.ones(6, 2, dtype=torch.int32)}, TypeError, "left must be a real float"),
        ({"right": torch.ones(2, 5, device="meta")}, ValueError, "right is on meta"),
        ({"scaling": math.nan}, ValueError, "scaling must be finite"),
    ],
)
def test_bad_input(change, error, match):
    names = ("weight", "right", "left", "scaling")
    given = dict(zip(names, (*operands(6, 5, 2, torch.float32), 1.0), strict=True)) | change
    with pytest.raises(error, match=match):
        op(*given.values())
