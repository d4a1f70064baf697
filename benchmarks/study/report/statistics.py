"""The statistics of the design: paired differences, Holm's method, and interpolation between the
rates of a grid. Nothing here depends on files, methods or tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial
from scipy import stats

LEVEL = 0.95  # of intervals; a clear difference has an adjusted p below 1 - LEVEL
SHARE = 0.01  # of the best loss: the robustness of a method
COVERED = 0.9  # of the cells, by a spread
DEGREE = 3  # of the curve that is fitted to losses

Point = tuple[float, float]


class Difference(NamedTuple):
    """A mean difference in percent, the ends of its interval, and the p of Student's t test."""

    mean: float
    low: float
    high: float
    p: float


class Width(NamedTuple):
    """A range in decades, and whether the grid ends before the range."""

    decades: float
    clipped_low: bool
    clipped_high: bool


class Fit(NamedTuple):
    """A curve fitted to points, and the share of their variance that it explains."""

    curve: Polynomial
    r_squared: float


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> Difference:
    """By how many percent `losses` differ from `reference`, pair by pair: the mean, its 95 %
    interval and the two-sided p, by Student's t with one degree of freedom fewer than pairs.

    Raises:
        ValueError: there are fewer than two pairs, or the two lengths differ.

    """
    if len(losses) != len(reference) or len(losses) < 2:
        raise ValueError(
            f"a paired difference needs at least two pairs; got {len(losses)} losses and "
            f"{len(reference)} of the reference"
        )
    percent = 100 * (np.asarray(losses) / np.asarray(reference) - 1)
    mean, half = mean_interval(percent)
    if half == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    p = 2 * float(stats.t.sf(abs(mean) / half * _quantile(len(percent)), len(percent) - 1))
    return Difference(mean, mean - half, mean + half, p)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two or more values, and half the width of its 95 % interval (Student's t)."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), _quantile(len(values)) * error


def _quantile(count: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


def holm(p: Sequence[float]) -> list[float]:
    """The p of a family of comparisons, adjusted by Holm's method (1979), in the same order."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def verdict(mean: float, p: float) -> str:
    """The verdict on a difference of losses, given its adjusted p."""
    if p >= 1 - LEVEL:
        return "no clear difference"
    return "better" if mean < 0 else "worse"


def width_near_best(losses: Mapping[float, float]) -> Width:
    """The range around the best position in which the loss is within 1 % of the best.

    `losses` has the loss at each position in decades, infinite if the run diverged. Between two
    positions the loss is linear; next to a diverged run, the range ends at the finite position.

    Raises:
        ValueError: no loss is finite.

    """
    positions = sorted(losses)
    best = min(positions, key=lambda x: losses[x])
    if not math.isfinite(losses[best]):
        raise ValueError("no run has a finite loss, so there is no best rate")
    level, at = (1 + SHARE) * losses[best], positions.index(best)
    low, clipped_low = _reach(positions[at::-1], losses, level)
    high, clipped_high = _reach(positions[at:], losses, level)
    return Width(high - low, clipped_low, clipped_high)


def _reach(
    positions: Sequence[float], losses: Mapping[float, float], level: float
) -> tuple[float, bool]:
    """Where the loss first passes `level`, going along `positions`; and whether it never does."""
    for near, far in itertools.pairwise(positions):
        if losses[far] > level:
            part = (level - losses[near]) / (losses[far] - losses[near])
            return near + part * (far - near), False
    return positions[-1], True


def vertex(points: Sequence[Point]) -> float | None:
    """The abscissa of the minimum of the parabola through three points; None if there is no such
    minimum: a loss is infinite, or the middle loss is not below one of the others.
    """
    (x0, y0), (x1, y1), (x2, y2) = points
    if not all(map(math.isfinite, (y0, y1, y2))) or y1 > min(y0, y2) or y0 == y1 == y2:
        return None
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    return x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)


def first_reaching(curve: Sequence[Point], level: float) -> float | None:
    """The abscissa at which a curve, linear between its points, is first at or below a level."""
    if curve and curve[0][1] <= level:
        return curve[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= level:
            return x0 + (y0 - level) / (y0 - y1) * (x1 - x0)
    return None


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def spread(values: Sequence[float]) -> float:
    """The smallest factor f such that 90 % of the values lie between c/f and c·f, where c is their
    geometric mean.
    """
    center = geometric_mean(values)
    distances = sorted(abs(math.log(value / center)) for value in values)
    return math.exp(distances[math.ceil(COVERED * len(distances)) - 1])


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The cubic polynomial of least squares, and its R².

    Raises:
        ValueError: the number of different abscissas is not larger than the number of coefficients.

    """
    if len(set(x)) <= DEGREE + 1:
        raise ValueError(f"a cubic needs more than {DEGREE + 1} abscissas; got {len(set(x))}")
    curve = Polynomial.fit(x, y, DEGREE)
    residual = np.asarray(y) - curve(np.asarray(x))
    total = np.asarray(y) - np.mean(y)
    return Fit(curve, 1 - float(residual @ residual) / float(total @ total))
