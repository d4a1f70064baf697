"""Eigenvalues against LAPACK's, and eigenvectors by the equations that they satisfy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ...support.exhaustive import EXHAUSTIVE, thinned
from .emulator import SHARED, CudaError

EPS = 2.0**-52


def with_spectrum(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A symmetric matrix with these eigenvalues, to rounding of the largest."""
    Q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def wishart(size: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    X = rng.standard_normal((size, rank))
    return X @ X.T


def graded(size: int, rng: np.random.Generator) -> np.ndarray:
    """D H D, H with eigenvalues in [1, 2] and D from 1e-10 to 1e10."""
    D = rng.permutation(np.logspace(-10, 10, size))
    return D[:, None] * with_spectrum(np.linspace(1, 2, size), rng) * D


SPECTRA = {
    "generic": lambda size, rng: wishart(size, size + 3, rng),
    "rank a third": lambda size, rng: wishart(size, max(1, size // 3), rng),
    "rank 1": lambda size, rng: np.ones((size, size)),
    "geometric": lambda size, rng: with_spectrum(np.logspace(0, -20, size), rng),
    "two clusters": lambda size, rng: with_spectrum(
        np.where(np.arange(size) < size // 2, 1.0, 1e-5), rng
    ),
    "graded": graded,
    "diagonal": lambda size, rng: np.diag(rng.permutation(np.logspace(-20, 20, size))),
    "identity": lambda size, rng: np.eye(size),
    "zero": lambda size, rng: np.zeros((size, size)),
    "zero rows": lambda size, rng: np.pad(wishart(size - size // 2, size, rng), (0, size // 2)),
}


def assert_decomposed(A: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> None:
    """Two columns count as orthogonal below 2 √l eps. Each rotation is orthogonal to rounding, and
    the errors of the thousands applied to a column grow like the root of their number.
    """
    size = len(A)
    bound = 8 * size**0.5 * EPS
    norm = np.linalg.norm(A, 2)
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert (np.diff(values) <= 0).all()
    assert np.abs(values - np.linalg.eigvalsh(A)[::-1]).max() <= bound * norm
    assert np.abs(A @ vectors - vectors * values).max() <= bound * norm
    assert np.abs(vectors.T @ vectors - np.eye(size)).max() <= min(bound, 1e-13)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 65, *([64, 96] if EXHAUSTIVE else [])])
def test_spectra(emulator, size, spectrum):
    A = SPECTRA[spectrum](size, np.random.default_rng(size))
    values, vectors = emulator.eigh(A[None])
    assert_decomposed(A, values[0], vectors[0])


@pytest.mark.parametrize("spectrum", thinned(["rank a third", "generic"]))
def test_large(emulator, spectrum):
    """Eight blocks of 25 columns, four at a time."""
    A = SPECTRA[spectrum](200, np.random.default_rng(0))
    values, vectors = emulator.eigh(A[None])
    assert_decomposed(A, values[0], vectors[0])


def test_columns_longer_than_the_registers_hold(emulator):
    """Registers hold 256 of 272 entries; blocks have 23 columns where 99 KB are allowed."""
    A = graded(272, np.random.default_rng(0))
    with emulator.machine(shared=SHARED["sm_86"]):
        values, vectors = emulator.eigh(A[None])
    assert_decomposed(A, values[0], vectors[0])


@pytest.mark.parametrize("size", [5, 9, 16, 17, 23, 33])
@pytest.mark.parametrize("columns", [2, 4, 10])
def test_any_number_of_blocks(emulator, size, columns):
    """Little shared memory, so that few columns are processed at a time, down to single columns and
    empty last blocks.
    """
    stride = (size + 15) // 16 * 16
    A = wishart(size, size + 1, np.random.default_rng(size))
    with emulator.machine(shared=max(8 * columns * stride, 28 * size + 64 * 8)):
        values, vectors = emulator.eigh(A[None])
    assert_decomposed(A, values[0], vectors[0])


def test_too_large_for_shared_memory(emulator):
    with (
        emulator.machine(shared=2 * 8 * 48 - 1),
        pytest.raises(CudaError, match="invalid value"),
    ):
        emulator.eigh(np.eye(40)[None])


def test_small_eigenvalues_of_graded_blocks_are_accurate(emulator):
    """Accurate relative to each block's own size, 1e-12 and 1e-24 of the largest, where LAPACK on
    the whole matrix returns noise.
    """
    rng = np.random.default_rng(0)
    blocks = [scale * with_spectrum(np.linspace(1, 2, 8), rng) for scale in (1.0, 1e-12, 1e-24)]
    want = np.concatenate([np.linalg.eigvalsh(block)[::-1] for block in blocks])
    A = np.zeros((24, 24))
    for k, block in enumerate(blocks):
        A[8 * k : 8 * k + 8, 8 * k : 8 * k + 8] = block
    mixed = rng.permutation(24)
    values, _ = emulator.eigh(A[np.ix_(mixed, mixed)][None])
    np.testing.assert_allclose(values[0], want, rtol=8 * 24**0.5 * EPS)


def test_singular_matrix_has_zeros(emulator):
    """Exact zeros for zero rows, and zeros to rounding elsewhere."""
    A = np.zeros((20, 20))
    A[4:9, 4:9] = wishart(5, 9, np.random.default_rng(0))
    values, _ = emulator.eigh(A[None])
    assert (values[0, 5:] == 0).all()
    assert (values[0, :5] > 0).all()


@pytest.mark.parametrize("exponent", [-900, -300, 300, 900])
def test_a_power_of_two_only_scales_the_values(emulator, exponent):
    A = SPECTRA["generic"](20, np.random.default_rng(0))
    values, vectors = emulator.eigh(A[None])
    scaled_values, scaled_vectors = emulator.eigh(np.ldexp(A, exponent)[None])
    assert np.array_equal(scaled_values, np.ldexp(values, exponent))
    assert np.array_equal(scaled_vectors, vectors)


def test_reads_the_lower_triangle(emulator):
    A = SPECTRA["generic"](20, np.random.default_rng(0))
    values, vectors = emulator.eigh((np.tril(A) + np.triu(np.full((20, 20), np.nan), 1))[None])
    assert_decomposed(A, values[0], vectors[0])


@pytest.mark.parametrize(
    "bad",
    {
        "nan": np.diag([1.0, np.nan, 2.0]),
        "inf": np.diag([1.0, 2.0, np.inf]),
        "nan beside the diagonal": np.eye(3) + np.diag([np.nan, 0.0], -1),
        "negative": -np.eye(3),
        "indefinite": np.diag([1.0, -1.0, 2.0]),
        "indefinite, zero diagonal": np.eye(3)[::-1] - np.diag([0.0, 1.0, 0.0]),
        "indefinite and tiny": 1e-100 * (np.eye(3)[::-1] - np.diag([0.0, 1.0, 0.0])),
        "indefinite and huge": 1e200 * (np.eye(3)[::-1] - np.diag([0.0, 1.0, 0.0])),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_has_no_answer_gives_nan(emulator, bad):
    """The other matrices of the batch get the same bits as alone."""
    good = wishart(3, 5, np.random.default_rng(0))
    values, vectors = emulator.eigh(np.stack([good, bad[1], good]))
    assert np.isnan(values[1]).all()
    assert np.isnan(vectors[1]).all()
    for k in (0, 2):
        assert_decomposed(good, values[k], vectors[k])


@pytest.mark.parametrize("size", [1, 30, 70])
def test_batch_and_order_of_threads(emulator, size):
    """The bits of a matrix depend neither on its batch nor on the order of threads and blocks."""
    rng = np.random.default_rng(0)
    names = ("generic", "rank a third", "zero", "graded")
    matrices = np.stack([SPECTRA[name](size, rng) for name in names])
    values, vectors = emulator.eigh(matrices)
    for k, matrix in enumerate(matrices):
        assert_decomposed(matrix, values[k], vectors[k])
        alone = emulator.eigh(matrix[None])
        assert np.array_equal(alone[0][0], values[k])
        assert np.array_equal(alone[1][0], vectors[k])
    for order in ("reversed", "mixed"):
        with emulator.machine(order):
            again = emulator.eigh(matrices)
        assert np.array_equal(again[0], values)
        assert np.array_equal(again[1], vectors)


def test_empty(emulator):
    assert emulator.eigh(np.zeros((0, 4, 4)))[0].shape == (0, 4)
    assert emulator.eigh(np.zeros((2, 0, 0)))[0].shape == (2, 0)


EIGENVALUE = st.one_of(st.just(0.0), st.just(1.0), st.floats(-20, 20).map(lambda x: 10.0**x))


@given(spectrum=st.lists(EIGENVALUE, min_size=1, max_size=24), seed=st.integers(0, 2**32 - 1))
def test_any_spectrum(emulator, spectrum, seed):
    A = with_spectrum(np.array(spectrum), np.random.default_rng(seed))
    values, vectors = emulator.eigh(A[None])
    assert_decomposed(A, values[0], vectors[0])
