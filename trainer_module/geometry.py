"""Figures of the embeddings' geometry, which need no labels: spread, rank and uniformity."""

import numpy as np
from numpy.typing import NDArray

_ROWS = 1024


def embedding_std(embeddings: NDArray[np.float32]) -> float:
    """Returns the standard deviation of each dimension of unit embeddings [N, D], averaged over the dimensions.

    0 when all embeddings are the same, about 1 / sqrt(D) when they are uniform on the sphere (arXiv 2011.10566,
    section 4.1).
    """
    return float(np.mean(np.std(embeddings, axis=0, dtype=np.float64)))


def effective_rank(embeddings: NDArray[np.float32]) -> float:
    """Returns RankMe of embeddings [N, D]: exp of the entropy of the singular values, normalised to sum 1.

    Between 1 (one direction) and min(N, D) (all directions alike); 0 when every embedding is zero. Equation 1 of
    arXiv 2210.02885, without its epsilon.
    """
    wide = embeddings.astype(np.float64)
    gram = wide.T @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.T
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None))
    # Below this the roots of rounding errors would count as directions.
    singular = singular[singular > singular.max(initial=0.0) * 1e-6]
    if not singular.size:
        return 0.0
    share = singular / singular.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def uniformity(embeddings: NDArray[np.float32], t: float = 2.0) -> float:
    """Returns log E exp(-t |x - y|^2) over pairs of different rows of unit embeddings [N, D]; NaN when N < 2.

    0 when all embeddings are the same, lower the more uniform they are on the sphere (arXiv 2005.10242, section
    4.1.2).
    """
    count = len(embeddings)
    if count < 2:
        return float("nan")
    total = 0.0
    for start in range(0, count, _ROWS):
        chunk = embeddings[start : start + _ROWS]
        weights = np.exp(t * (2.0 * (chunk @ embeddings.T).astype(np.float64) - 2.0))
        weights[np.arange(len(chunk)), np.arange(start, start + len(chunk))] = 0.0
        total += float(weights.sum())
    return float(np.log(total / (count * (count - 1))))
