from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_kernels.ops.philox import dropout, dropout_seed, gaussian, philox_words


def words_at(row: int, quad: int, seed: int, device: str) -> list[int]:
    words = philox_words(row + 1, 4 * quad + 4, torch.tensor(seed, device=device))
    return [int(w) for w in words[row, 4 * quad :]]


def oracle(row: int, quad: int, seed: int, purpose: int = 0) -> list[int]:
    """Philox4x32-10 in plain Python integers."""
    c = [quad, purpose, row & 0xFFFFFFFF, row >> 32]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_known_answer(device):
    """The first vector of Random123's kat_vectors: counter 0, key 0."""
    assert words_at(0, 0, 0, device) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("row,quad,seed", [(3, 5, 17), (1, 1, 2**63 - 1), (40, 9, 0xDEADBEEF12)])
def test_matches_plain_integers(row, quad, seed, device):
    assert words_at(row, quad, seed, device) == oracle(row, quad, seed)


def test_the_mask_of_some_columns(device):
    """Those from `col_offset` on, beyond 2³² too."""
    seed = torch.tensor(99, device=device)
    x = torch.randn(5, 40, device=device)
    for begin in (4, 20, 36):
        assert torch.equal(
            dropout(x, 0.5, seed)[:, begin:], dropout(x[:, begin:], 0.5, seed, begin)
        )
    far = 4 * (2**32 + 3)  # the counter holds 32 bits of the quad
    words = philox_words(2, 4, seed, col_offset=far)
    assert words[1].tolist() == oracle(1, 3, 99)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [1, 63, 64, pytest.param(65, marks=pytest.mark.sanitize), 200])
def test_kernel_draws_the_same_mask(dtype, cols, device):
    """With the identity as A, z of the compiled forward is x after dropout."""
    x = torch.randn(9, cols).to(device, dtype)
    seed = torch.tensor(1234567890123, device=device)
    zero = torch.zeros(16, cols, dtype=dtype, device=device)
    eye, B = torch.eye(cols, dtype=dtype, device=device), zero.clone()
    _, z = torch.ops.lora.linear_forward(x, zero, None, eye, B, 1.0, 0.3, seed, None, None, None)
    assert torch.equal(z, dropout(x, 0.3, seed))


def test_seed_is_the_global_generator_s(device):
    """`torch.manual_seed` determines it, and so does the state that checkpointing restores."""
    torch.manual_seed(3)
    first, second = dropout_seed(device), dropout_seed(device)
    torch.manual_seed(3)
    assert dropout_seed(device) == first != second
    assert first.dtype == torch.int64 and first.dim() == 0 and first.device.type == device


def test_rate_and_expectation(device):
    x = torch.ones(400, 500, device=device)
    seed = torch.tensor(7, device=device)
    for p in (0.1, 0.5, 0.9):
        out = dropout(x, p, seed)
        dropped = (out == 0).double().mean().item()
        assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5  # five sigma
        torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)))
    assert (dropout(x, 1.0, seed) == 0).all()


class TestGaussian:
    def test_known_words(self):
        """Counter (quad, 1, row), and the pairs of normals made from pairs of words."""
        normals = gaussian(4, 12, 0xDEADBEEF12)
        for row, quad in [(0, 0), (0, 2), (3, 1)]:
            w = oracle(row, quad, 0xDEADBEEF12, purpose=1)
            want = []
            for radius, angle in (w[:2], w[2:]):
                r = math.sqrt(-2.0 * math.log((radius + 1) / 2**32))
                want += [
                    r * math.cos(math.tau * angle / 2**32),
                    r * math.sin(math.tau * angle / 2**32),
                ]
            # The angle's rounding, 2^-52 of up to 2π, times r < 6.7; then one to float32.
            np.testing.assert_allclose(
                normals[row, 4 * quad : 4 * quad + 4], np.float32(want), rtol=2**-23, atol=1e-14
            )

    def test_is_not_what_dropout_draws(self):
        seed = torch.tensor(5)
        assert not torch.equal(philox_words(8, 8, seed), philox_words(8, 8, seed, purpose=1))

    def test_a_function_of_seed_row_and_column(self):
        normals = gaussian(7, 10, -3)
        assert normals.dtype == torch.float32
        assert normals.shape == (7, 10)
        assert torch.equal(gaussian(20, 33, -3)[:7, :10], normals)
        assert not torch.equal(gaussian(7, 10, -4), normals)
        assert gaussian(0, 5, 1).shape == (0, 5)
        assert gaussian(5, 0, 1).shape == (5, 0)

    def test_is_standard_normal(self):
        """Fixed seeds; each moment within five sigma, and the Kolmogorov-Smirnov distance."""
        x = gaussian(1000, 256, 11).double().flatten().numpy()
        n = x.size
        for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
            assert abs((x**power).mean() - mean) < 5 * (variance / n) ** 0.5
        assert stats.kstest(x, "norm").pvalue > 0.01
        assert np.abs(x).max() > 4.0  # the tails exist: 16 are expected beyond

    def test_columns_and_rows_do_not_correlate(self):
        x = gaussian(4000, 48, 12).double().numpy()
        correlation = np.corrcoef(x, rowvar=False) - np.eye(48)
        assert np.abs(correlation).max() < 5.5 / 4000**0.5  # 1128 pairs
        assert np.abs((x[1:] * x[:-1]).mean()) < 5 / x.size**0.5
