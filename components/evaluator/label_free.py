"""The metrics that need no label, with intervals: geometry of the embeddings, and what two views of an image share.

| metric | formula | source |
|---|---|---|
| embedding_std | standard deviation of each dimension of unit vectors, averaged | arXiv 2011.10566, section 4.1 |
| effective_rank | exp of the entropy of the singular values, normalised to sum 1 (RankMe) | arXiv 2210.02885, eq. 1 |
| uniformity | log of the mean of exp(-2 squared distance) over pairs of images | arXiv 2005.10242, section 4.1.2 |
| alignment | mean squared distance of two views of the same image | arXiv 2005.10242, section 4.1.1 |
| neighbour_consistency | mean share of the k nearest images that two views of an image have in common | below |

Neighbour consistency: among the images' own embeddings, each view's image left out, k = 10 or a tenth of the images
where that is fewer; by chance k / (n - 1) is shared. Unlike alignment it does not gain by mapping everything to one
point, and unlike rank it does not gain by noise.

Intervals come of resampled images. Of the rank, the directions stay those of all images and their variances are drawn
anew (a first-order perturbation of the eigenvalues): drawn with repetition, few images span fewer directions, which
would put the whole interval below the figure. For the same reason, that repetition shrinks them, the draws of spread,
rank and uniformity are moved so that their mean is the figure.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from components.evaluator.resampling import Estimate, interval, mean_estimates, resamples
from trainer_module import geometry

NAMES = (
    "embedding_std",
    "embedding_std_relative",
    "effective_rank",
    "uniformity",
    "alignment",
    "neighbour_consistency",
)
_NEIGHBOURS = 10
_COLUMNS = 1024
_T = 2.0  # of uniformity


def geometry_estimates(vectors: NDArray[np.float32]) -> dict[str, Estimate]:
    """Spread, rank and uniformity of unit vectors [n, D]; nothing of fewer than two."""
    if len(vectors) < 2:
        return {}
    centred = vectors - vectors.mean(axis=0)
    along = _along_directions(vectors)
    spreads, ranks, uniformities = [], [], []
    for counts in resamples(len(vectors)):
        share = counts / len(vectors)
        variance = share @ centred**2 - (share @ centred) ** 2
        spreads.append(np.sqrt(np.maximum(variance, 0.0)).mean(axis=1))
        ranks.append(_rank_of(counts @ along))
        uniformities.append(_uniformity_draws(counts, vectors))
    spread = _around(geometry.embedding_std(vectors), spreads)
    root = float(np.sqrt(vectors.shape[1]))
    return {
        "embedding_std": spread,
        "embedding_std_relative": Estimate(*(figure * root for figure in spread)),
        "effective_rank": _around(geometry.effective_rank(vectors), ranks),
        "uniformity": _around(geometry.uniformity(vectors, _T), uniformities),
    }


def _around(value: float, parts: Sequence[NDArray[np.float64]]) -> Estimate:
    """The interval of draws that are moved so that their mean is the value."""
    draws = np.concatenate(parts)
    finite = draws[np.isfinite(draws)]
    return (
        Estimate(value, *interval(finite + (value - finite.mean()))) if finite.size else Estimate(value, value, value)
    )


def view_estimates(
    vectors: NDArray[np.float32], first: NDArray[np.float32], second: NDArray[np.float32]
) -> tuple[dict[str, Estimate], NDArray[np.float64]]:
    """Alignment and neighbour consistency.

    Args:
        vectors: float32 [n, D], of images, of length 1 as the others.
        first, second: float32 [n, D], of two views of each image.

    Returns:
        The estimates, and the share of common neighbours of each image, float64 [n]; NaN each where there are fewer
        than three images.
    """
    shared = shared_neighbours(vectors, first, second)
    distance = np.sum((first.astype(np.float64) - second) ** 2, axis=1)
    alignment, consistency = mean_estimates(np.stack([distance, shared], axis=1))
    return {"alignment": alignment, "neighbour_consistency": consistency}, shared


def shared_neighbours(
    vectors: NDArray[np.float32], first: NDArray[np.float32], second: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The share of the k nearest images that two views of each image have in common: float64 [n]; see the module."""
    count = len(vectors)
    if count < 3:
        return np.full(count, np.nan)
    k = max(1, min(_NEIGHBOURS, (count - 1) // 10))
    shared = [
        _shared(vectors, first[start : start + _COLUMNS], second[start : start + _COLUMNS], start, k)
        for start in range(0, count, _COLUMNS)
    ]
    return np.concatenate(shared)


def _shared(vectors: NDArray, first: NDArray, second: NDArray, start: int, k: int) -> NDArray[np.float64]:
    chosen = []
    for views in (first, second):
        similarity = views @ vectors.T
        similarity[np.arange(len(views)), np.arange(start, start + len(views))] = -np.inf
        mask = np.zeros(similarity.shape, bool)
        # A stable sort decides between equally similar images by their order, as a collapsed encoder makes them.
        np.put_along_axis(mask, np.argsort(-similarity, axis=1, kind="stable")[:, :k], True, axis=1)
        chosen.append(mask)
    return np.sum(chosen[0] & chosen[1], axis=1) / k


def _along_directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The squared length of each vector along each principal direction of all: float32 [n, min(n, D)]."""
    wide = vectors.astype(np.float64)
    if len(wide) > wide.shape[1]:
        _, directions = np.linalg.eigh(wide.T @ wide)
        return np.square(wide @ directions).astype(np.float32)
    energy, weights = np.linalg.eigh(wide @ wide.T)
    return (np.maximum(energy, 0.0) * np.square(weights)).astype(np.float32)


def _rank_of(energy: NDArray[np.float32]) -> NDArray[np.float64]:
    """Effective ranks of singular values whose squares are [B, P]; 0 where all are."""
    singular = np.sqrt(np.maximum(energy, 0.0).astype(np.float64))
    singular[singular <= 1e-6 * singular.max(axis=1, keepdims=True)] = 0.0
    total = singular.sum(axis=1, keepdims=True)
    share = singular / np.where(total > 0, total, 1.0)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1)
    return np.where(total[:, 0] > 0, np.exp(entropy), 0.0)


def _uniformity_draws(counts: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Uniformity of each resample [B, n]; an image and its copy are no pair."""
    total = np.zeros(len(counts))
    for start in range(0, len(vectors), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        weights = np.exp(_T * (2.0 * (vectors @ vectors[columns].T) - 2.0))
        width = weights.shape[1]
        weights[np.arange(start, start + width), np.arange(width)] = 0.0
        total += np.sum((counts @ weights) * counts[:, columns], axis=1, dtype=np.float64)
    pairs = counts.sum(axis=1, dtype=np.float64) ** 2 - np.sum(counts**2, axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(total / pairs)
