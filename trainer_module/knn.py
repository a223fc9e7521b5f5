"""Weighted kNN classification of embeddings by the protocol of InstDisc (arXiv 1805.01978, section 3.4)."""

import numpy as np
from numpy.typing import NDArray

_CHUNK_BYTES = 256 * 1024 * 1024
_BYTES_PER_SIMILARITY = 16  # the float32 similarity, its copy that is partitioned, masks and running counts of ties


def unit(vectors: NDArray) -> NDArray[np.float32]:
    """Returns the rows of [N, D] scaled to length 1; a zero row stays zero, a row with NaN or infinity becomes NaN."""
    wide = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        return (wide / np.maximum(norms, 1e-12)).astype(np.float32)


def knn_predict(
    bank: NDArray[np.float32],
    bank_labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    k: int,
    temperature: float,
    chunk_bytes: int = _CHUNK_BYTES,
) -> NDArray[np.int64]:
    """Predicts the class of each query by the weighted vote of its k nearest neighbours.

    A neighbour votes for its class with weight exp(cosine similarity / T). Neighbours that are equally similar at
    the edge of the k are taken in the bank's order; classes with equal votes, the smallest first.

    Args:
        bank: float32 [B, D] rows of length 1, B at least 1.
        bank_labels: int64 [B], from 0.
        queries: float32 [Q, D] rows of length 1.
        k: neighbours; clipped to B.
        temperature: T.
        chunk_bytes: memory, about, that the similarities of one chunk of queries may take.

    Returns:
        int64 [Q].
    """
    k = min(k, len(bank))
    classes = int(bank_labels.max()) + 1
    rows = max(1, chunk_bytes // (len(bank) * _BYTES_PER_SIMILARITY + classes * 8))
    predictions = [
        _vote(queries[start : start + rows] @ bank.T, bank_labels, classes, k, temperature)
        for start in range(0, len(queries), rows)
    ]
    return np.concatenate([np.zeros(0, np.int64), *predictions])


def knn_top1(
    bank: NDArray[np.float32],
    bank_labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    query_labels: NDArray[np.int64],
    k: int,
    temperature: float,
) -> float:
    """Returns the share of queries whose class `knn_predict` finds; NaN when the bank or the queries are empty.

    Args:
        bank: float32 [B, D] rows of length 1.
        bank_labels: int64 [B], from 0.
        queries: float32 [Q, D] rows of length 1.
        query_labels: int64 [Q]; a class that the bank lacks counts as not found.
        k: neighbours; clipped to B.
        temperature: T.
    """
    if not len(bank) or not len(queries):
        return float("nan")
    return float(np.mean(knn_predict(bank, bank_labels, queries, k, temperature) == query_labels))


def _vote(
    similarity: NDArray[np.float32], labels: NDArray[np.int64], classes: int, k: int, temperature: float
) -> NDArray[np.int64]:
    neighbours = _nearest(similarity, k)
    nearest = np.take_along_axis(similarity, neighbours, axis=1).astype(np.float64)
    # Dividing all the weights of a query by the largest keeps exp() in range for a small T and changes no vote.
    weights = np.exp((nearest - nearest.max(axis=1, keepdims=True)) / temperature)
    cells = np.arange(len(similarity))[:, None] * classes + labels[neighbours]
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(similarity) * classes)
    return votes.reshape(-1, classes).argmax(axis=1)


def _nearest(similarity: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Returns int64 [Q, k]: for each row of [Q, B] the columns of its k largest values, in the order of columns."""
    edge = np.partition(similarity, -k, axis=1)[:, -k, None]
    above = similarity > edge
    tied = similarity == edge
    room = k - above.sum(axis=1, keepdims=True)
    chosen = above | (tied & (np.cumsum(tied, axis=1, dtype=np.int32) <= room))
    return np.nonzero(chosen)[1].reshape(-1, k)
