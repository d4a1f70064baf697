from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_kernels.ops.philox import gaussian


@pytest.mark.parametrize(
    ("rows", "cols", "ld"), [(1, 1, 1), (1, 5, 5), (37, 66, 66), (50, 30, 33), (3, 64, 100)]
)
@pytest.mark.parametrize("seed", [0, 17, 0xFEDCBA9876543210])
def test_matches_the_reference(emulator, rows, cols, ld, seed):
    out = emulator.gaussian(rows, cols, seed, ld, np.float32)
    want = gaussian(rows, cols, np.uint64(seed).astype(np.int64).item()).numpy()
    # sincospi is exact in the angle, 2π w rounds it: 2^-52 of 2π, times r < 6.7. Then a float32
    # rounding, which may fall to the other side.
    np.testing.assert_allclose(out[:, :cols], want, rtol=2.0**-23, atol=1e-14)
    assert np.isnan(out[:, cols:]).all()  # the gap between rows stays untouched


def test_bfloat16_is_the_rounded_float32(emulator):
    exact = emulator.gaussian(40, 70, 5, 72, np.float32)
    bits = emulator.gaussian(40, 70, 5, 72, np.uint16)
    want = torch.from_numpy(exact[:, :70].copy()).bfloat16().view(torch.uint16).numpy()
    assert (bits[:, :70] == want).all()
    assert (bits[:, 70:] == 0xFFFF).all()


def test_more_quads_than_threads(emulator):
    """A launch has at most 4096 blocks of 256 threads, which then do the rest in a second round."""
    rows = 4096 * 256 // 2 + 100
    out = emulator.gaussian(rows, 8, 3, 8, np.float32)
    np.testing.assert_allclose(out, gaussian(rows, 8, 3).numpy(), rtol=2.0**-23, atol=1e-14)


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0)])
def test_empty(emulator, rows, cols):
    assert emulator.gaussian(rows, cols, 1, cols, np.float32).size == 0
