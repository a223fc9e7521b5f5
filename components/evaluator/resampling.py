"""How far a figure can be trusted: percentile bootstrap intervals and paired tests over the eval images.

Bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Every draw is stateless, so equal
images in equal order give equal intervals; figures of one slice are drawn together, so differences are paired.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DRAWS = 1000
COVERAGE = 0.95
_SEED = 5
_COUNTS_AT_ONCE = 4_000_000


class Estimate(NamedTuple):
    """A figure with its interval; NaN where it does not apply."""

    value: float
    low: float
    high: float


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


def resamples(images: int, draws: int = DRAWS) -> Iterator[NDArray[np.float32]]:
    """Draws the images anew, with replacement.

    Args:
        images: N, at least 1.
        draws: how often.

    Yields:
        float32 [B, N], how often each image was drawn, in as many parts as memory asks for; `draws` rows in all.
    """
    generator = np.random.Generator(np.random.Philox(key=_SEED))
    most = max(1, _COUNTS_AT_ONCE // images)
    for start in range(0, draws, most):
        rows = min(most, draws - start)
        picked = generator.integers(0, images, (rows, images)) + np.arange(rows)[:, None] * images
        yield np.bincount(picked.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float32)


def mean_draws(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Means over each resample of the images.

    Args:
        values: float [N, M]; NaN where an image has no such figure.

    Returns:
        float64 [DRAWS, M]; NaN where a resample has no image with that figure.
    """
    there = np.isfinite(values)
    filled, there = np.where(there, values, 0.0).astype(np.float32), there.astype(np.float32)
    with np.errstate(invalid="ignore"):
        parts = [(counts @ filled) / (counts @ there) for counts in resamples(len(values))]
    return np.concatenate(parts).astype(np.float64)


def interval(draws: NDArray[np.floating]) -> tuple[float, float]:
    """The percentile interval that covers COVERAGE of the draws [DRAWS]; NaN without a finite one."""
    finite = draws[np.isfinite(draws)]
    if not finite.size:
        return float("nan"), float("nan")
    tail = 50.0 * (1.0 - COVERAGE)
    low, high = np.percentile(finite, [tail, 100.0 - tail])
    return float(low), float(high)


def mean_estimates(values: NDArray[np.floating]) -> list[Estimate]:
    """The mean of each column of [N, M] with its interval, resampling rows; NaN entries take no part."""
    values = values.astype(np.float64)
    if not len(values):
        return [NOTHING] * values.shape[1]
    draws = mean_draws(values)
    there = np.isfinite(values)
    means = [
        float(np.mean(column[mask])) if mask.any() else float("nan")
        for column, mask in zip(values.T, there.T, strict=True)
    ]
    return [Estimate(mean, *interval(column)) for mean, column in zip(means, draws.T, strict=True)]


def sign_test(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """The exact sign test of paired figures; of right and wrong answers it is McNemar's (Psychometrika 12, 1947),
    exactly.

    Args:
        first, second: float [N], of the same images, such as 1 where a model is right and 0 where it is wrong; images
            where either is NaN take no part.

    Returns:
        Two-sided p of so unequal a share of wins, were both equally good; 1 where they never differ.
    """
    difference = (first - second)[np.isfinite(first - second)]
    wins, losses = int(np.sum(difference > 0)), int(np.sum(difference < 0))
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
