"""Differences of bits: whatever two tensors hold, one is made from the other to the last bit."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.files.io.differences import changed, difference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (64, 65), (3, 5, 2), (0, 4)])
def test_any_two_tensors(dtype, shape):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        want, got = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        where = torch.rand(shape, generator=generator) < seed / 3
        want = torch.where(where, want, got)
        text = difference(want, got)
        assert bool(text) == (not torch.equal(bits(want), bits(got)))
        back = changed(got, text) if text else got
        assert back.dtype == dtype and back.shape == got.shape
        assert torch.equal(bits(back), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(dtype):
    numbers = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 2, 1.0, -1.0]
    want = torch.tensor(numbers, dtype=dtype)
    got = want.flip(0).clone()
    assert torch.equal(bits(changed(got, difference(want, got))), bits(want))


def test_strided_tensors_and_escapes():
    want, got = torch.randn(6, 4).T, torch.randn(4, 6)
    text = difference(want, got)
    assert torch.equal(changed(got, text), want)
    assert not set(text) & set('"\\') and text.isascii()


def test_roundings_are_short():
    """Half of the numbers differ in the last bit: about two bits a number."""
    got = torch.randn(100_000)
    step = torch.randint(-1, 2, got.shape, dtype=torch.int32)
    want = (got.view(torch.int32) + step).view(torch.float32)
    assert len(difference(want, got)) < 100_000 * 0.45


@pytest.mark.parametrize("text", ["", "x", "zzzzz", "|||||||||||", "~~~"])
def test_damaged_text(text):
    with pytest.raises(ValueError, match="are damaged"):
        changed(torch.randn(9), text)


def test_another_size():
    text = difference(torch.randn(64), torch.randn(64))
    with pytest.raises(ValueError, match="are damaged"):
        changed(torch.randn(65), text)
    with pytest.raises(ValueError, match="are damaged"):
        changed(torch.randn(8), text)
