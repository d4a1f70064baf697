"""X = R⁻¹ of G = RᵀR, against LAPACK's factor of the kept columns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import solve_triangular

from .emulator import SHARED

EPS = 2.0**-52
TOLERANCE = 1e-8  # on the pivots of unit columns, where a test does not say otherwise


def unit_columns(rng, rows: int, cols: int) -> np.ndarray:
    Z = rng.standard_normal((rows, cols))
    return Z / np.linalg.norm(Z, axis=0)


def oracle(gram: np.ndarray, kept: list[int]) -> np.ndarray:
    """The inverse factor of the kept rows and columns, zero elsewhere."""
    X = np.zeros_like(gram)
    R = np.linalg.cholesky(gram[np.ix_(kept, kept)]).T
    X[np.ix_(kept, kept)] = solve_triangular(R, np.eye(len(kept)))
    return X


def assert_inverse(X: np.ndarray, gram: np.ndarray, kept: list[int]) -> None:
    """The forward error of both is a few b eps κ(R)², and so is the error in XᵀGX = I."""
    size = len(gram)
    assert np.isfinite(X).all()
    assert (np.tril(X, -1) == 0).all()
    dropped = [k for k in range(size) if k not in kept]
    assert (X[dropped] == 0).all()
    assert (X[:, dropped] == 0).all()
    bound = 8 * size * EPS * np.linalg.cond(gram[np.ix_(kept, kept)]) if kept else 0.0
    want = oracle(gram, kept)
    np.testing.assert_allclose(X, want, rtol=0, atol=bound * np.abs(want).max())
    identity = np.zeros(size)
    identity[kept] = 1.0
    assert np.abs(X.T @ gram @ X - np.diag(identity)).max() <= bound


@pytest.mark.parametrize("size", [1, 2, 3, 5, 31, 32, 33, 64, 100, 128])
def test_full_rank(emulator, size):
    Z = unit_columns(np.random.default_rng(size), 3 * size + 5, size)
    gram = Z.T @ Z
    (X,) = emulator.cholesky_inverse(gram[None], TOLERANCE)
    assert_inverse(X, gram, list(range(size)))


def test_makes_columns_orthonormal(emulator):
    Z = unit_columns(np.random.default_rng(0), 300, 64)
    Z[:, 40] = Z[:, 3] + 1e-3 * Z[:, 40]
    gram = Z.T @ Z
    (X,) = emulator.cholesky_inverse(gram[None], 1e-12)
    bound = 8 * EPS * np.linalg.cond(gram)  # lost by rounding the Gram matrix; LAPACK too
    assert np.abs((Z @ X).T @ (Z @ X) - np.eye(64)).max() < bound < 2e-8


def test_reads_the_lower_triangle(emulator):
    Z = unit_columns(np.random.default_rng(1), 60, 20)
    gram = Z.T @ Z
    (X,) = emulator.cholesky_inverse((np.tril(gram) + np.triu(np.full((20, 20), 9.0), 1))[None], 0)
    assert_inverse(X, gram, list(range(20)))


@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
@pytest.mark.parametrize("size", [156, 157, 200])
def test_beyond_shared_memory(emulator, arch, size):
    """The triangle of at most 156 columns fits into 99 KB; larger ones stay in global memory."""
    Z = unit_columns(np.random.default_rng(size), 2 * size, size)
    Z[:, 7] = Z[:, 2]
    gram = Z.T @ Z
    with emulator.machine(shared=SHARED[arch]):
        (X,) = emulator.cholesky_inverse(gram[None], TOLERANCE)
    assert_inverse(X, gram, [k for k in range(size) if k != 7])
    with emulator.machine("reversed", SHARED[arch]):
        assert np.array_equal(emulator.cholesky_inverse(gram[None], TOLERANCE)[0], X)


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-5])
def test_dependent_columns_are_dropped(emulator, distance):
    """Copies and means of earlier columns, and columns within `distance` of them."""
    rng = np.random.default_rng(2)
    Z = unit_columns(rng, 200, 40)
    for column, of in [(5, [1]), (6, [0, 3]), (20, [19, 2, 4]), (39, [5, 6])]:
        Z[:, column] = Z[:, of].sum(1) / len(of) + distance * Z[:, column]
    gram = Z.T @ Z
    (X,) = emulator.cholesky_inverse(gram[None], TOLERANCE)
    assert_inverse(X, gram, [k for k in range(40) if k not in (5, 6, 20, 39)])


def test_the_tolerance_decides(emulator):
    """Unit columns at angles with squared sines of 1e-4 and 1e-6."""
    gram = np.array([[[1.0, (1 - sine) ** 0.5], [(1 - sine) ** 0.5, 1.0]] for sine in (1e-4, 1e-6)])
    X = emulator.cholesky_inverse(gram, 1e-5)
    assert_inverse(X[0], gram[0], [0, 1])
    assert_inverse(X[1], gram[1], [0])
    exactly = np.diag([1.0, 0.25])[None]
    assert emulator.cholesky_inverse(exactly, 0.25)[0, 1, 1] == 0.0
    assert emulator.cholesky_inverse(exactly, 0.2499)[0, 1, 1] == 2.0


def test_zero_columns_and_the_zero_matrix(emulator):
    Z = unit_columns(np.random.default_rng(3), 80, 16)
    Z[:, [0, 8, 15]] = 0
    gram = np.stack([Z.T @ Z, np.zeros((16, 16))])
    X = emulator.cholesky_inverse(gram, TOLERANCE)
    assert_inverse(X[0], gram[0], [k for k in range(16) if k not in (0, 8, 15)])
    assert (X[1] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_column_that_is_not_finite_spoils_no_other(emulator, value):
    Z = unit_columns(np.random.default_rng(4), 80, 24)
    gram = Z.T @ Z
    gram[9, :] = gram[:, 9] = value
    (X,) = emulator.cholesky_inverse(gram[None], TOLERANCE)
    clean = np.where(np.isfinite(gram), gram, 0.0)
    assert_inverse(X, clean, [k for k in range(24) if k != 9])


@pytest.mark.parametrize(
    "gram",
    [
        np.full((4, 4), -1.0),
        np.eye(4)[::-1],  # indefinite, zero pivots
        np.diag([5e-324, 1e308, 1e-308, 0.0]) + 1e-200 * np.ones((4, 4)),
        1e308 * (2 * np.eye(4) - np.ones((4, 4))),
        np.full((4, 4), np.nan),
    ],
)
@pytest.mark.parametrize("tolerance", [0.0, -1.0, np.nan])
def test_is_always_finite(emulator, gram, tolerance):
    """For any input: what is not a column of a factor is dropped."""
    assert np.isfinite(emulator.cholesky_inverse(gram[None], tolerance)).all()


def test_batch_and_order_of_threads(emulator):
    """The bits of a matrix depend neither on its batch nor on the order of the threads."""
    Z = [unit_columns(np.random.default_rng(k), 90, 45) for k in range(3)]
    Z[1][:, 30] = Z[1][:, 4]
    gram = np.stack([z.T @ z for z in Z])
    X = emulator.cholesky_inverse(gram, TOLERANCE)
    for k in range(3):
        assert np.array_equal(emulator.cholesky_inverse(gram[k : k + 1], TOLERANCE)[0], X[k])
    for order in ("reversed", "mixed"):
        with emulator.machine(order):
            assert np.array_equal(emulator.cholesky_inverse(gram, TOLERANCE), X)


def test_empty(emulator):
    assert emulator.cholesky_inverse(np.zeros((0, 4, 4)), 0.0).shape == (0, 4, 4)
    assert emulator.cholesky_inverse(np.zeros((2, 0, 0)), 0.0).shape == (2, 0, 0)
