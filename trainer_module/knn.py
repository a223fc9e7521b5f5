"""The nearest neighbours of embeddings, and weighted kNN classification by them.

The protocol is that of InstDisc (arXiv 1805.01978, section 3.4). The search is exact, and so are its similarities: the
product of two float16 numbers of at most 1 is a multiple of 2^-48, so float64 holds every partial sum of a dot product
of unit vectors without rounding, whatever its order. Which rows can be among the nearest is told by float32 products,
which are some ten times as fast, with their rounding allowed for. What comes out thus depends neither on how the bank
and the queries are cut into pieces nor on the processor.
"""

import concurrent.futures
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

_CHUNK_BYTES = 64 * 1024 * 1024
_COLUMNS = 4096  # rows of the bank that are held as float64 at once
_CACHED_BYTES = 1 << 19  # of selected rows, as float64: they stay in a core's own cache
_WIDENED_ROWS = 256  # at once, by a core
_GROUPS = 1024
_SMALL = 1 << 30  # multiplications; below that, threads would cost more than they save
_DENSE = 1 / 16  # share of the rows from which on a product of whole matrices is faster than one of selected rows
_SIGN = np.uint32(1 << 31)
_LAST = np.uint64(2**32 - 1)
_HALF = np.uint64(32)

T = TypeVar("T")


def unit(vectors: NDArray) -> NDArray[np.float32]:
    """Returns the rows of [N, D] scaled to length 1; a zero row stays zero, a row with NaN or infinity becomes NaN."""
    wide = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        return (wide / np.maximum(norms, 1e-12)).astype(np.float32)


def encode(similarities: NDArray, rows: NDArray) -> NDArray[np.uint64]:
    """Packs a similarity and the row that has it into one number, the larger the nearer.

    Args:
        similarities: finite, [...]; rounded to float32.
        rows: of the bank, integers [...], from 0 to 2^32 - 1. Of equally similar rows the first has the largest code.

    Returns:
        uint64 [...], never 0, which stands for no row.
    """
    bits = (similarities.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return (ordered.astype(np.uint64) << _HALF) | (_LAST - rows.astype(np.uint64))


def decode(codes: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns what `encode` packed: float32 and int64 [...]; where the code is 0, NaN and 2^32 - 1."""
    ordered = (codes >> _HALF).astype(np.uint32)
    bits = np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered)
    return bits.view(np.float32), (_LAST - (codes & _LAST)).astype(np.int64)


def largest(codes: NDArray[np.uint64], k: int) -> NDArray[np.uint64]:
    """Returns the k largest of each row of [Q, W], uint64 [Q, min(k, W)], the largest first."""
    if codes.shape[1] > k:
        codes = np.partition(codes, codes.shape[1] - k, axis=1)[:, codes.shape[1] - k :]
    return np.sort(codes, axis=1)[:, ::-1]


def widened(pieces: Sequence[NDArray], places: NDArray[np.integer]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Several pieces of a bank as one of float32 in another order, by all cores, and whether each row is finite.

    Args:
        pieces: at least one, [n, D], N rows in all, of length 1, or with NaN or infinity.
        places: int [N], where each of the pieces' rows shall stand: a permutation.

    Returns:
        float32 [N, D] and bool [N], both by place.
    """
    wide, finite = np.empty((len(places), pieces[0].shape[1]), np.float32), np.empty(len(places), np.bool_)
    starts = np.cumsum([0, *map(len, pieces)])
    blocks = [
        (piece[row : row + _WIDENED_ROWS], places[start + row : start + min(row + _WIDENED_ROWS, len(piece))])
        for piece, start in zip(pieces, starts[:-1], strict=True)
        for row in range(0, len(piece), _WIDENED_ROWS)
    ]

    def widen(block: tuple[NDArray, NDArray[np.integer]]) -> None:
        rows, where = block[0].astype(np.float32), block[1]
        wide[where] = rows
        with np.errstate(invalid="ignore"):  # of infinity less infinity
            finite[where] = np.isfinite(rows.sum(axis=1))

    _on_all_cores(widen, blocks)
    return wide, finite


def nearest(
    bank: NDArray,
    queries: NDArray,
    k: int,
    floor: NDArray[np.float32] | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> NDArray[np.uint64]:
    """Finds each query's k nearest rows of a bank by cosine similarity; of equally similar rows the first ones.

    Similarities are exact for float16 vectors, and rounded to float32 only to be compared. A query that is not finite
    has no neighbours.

    Args:
        bank: float16 or float32 [B, D], finite rows of length 1 or 0, at most 2^32.
        queries: float16 or float32 [Q, D], rows of length 1 or 0.
        k: neighbours, at least 1.
        floor: float32 [Q]; rows that are less similar are left out. NaN stands for none.
        chunk_bytes: memory, about, that the similarities of one chunk of queries may take; each core has a chunk.

    Returns:
        Codes uint64 [Q, min(k, B)] (see `decode`), the nearest first; 0 where there are fewer neighbours.
    """
    wide = bank.astype(np.float32, copy=False)
    codes = np.zeros((len(queries), min(k, len(bank))), np.uint64)
    floor = np.full(len(queries), np.nan, np.float32) if floor is None else floor
    chunks = _chunks(len(queries), wide.shape, chunk_bytes)

    def search(chunk: slice) -> None:
        codes[chunk] = _nearest_of_chunk(wide, queries[chunk].astype(np.float32), codes.shape[1], floor[chunk])

    if len(chunks) < 2:
        for chunk in chunks:
            search(chunk)
        return codes
    # A thread for each chunk, and none of BLAS's own: those spin after a product and hold up what comes next.
    with threadpool_limits(1, user_api="blas"):
        _on_all_cores(search, chunks)
    return codes


def _on_all_cores(work: Callable[[T], None], parts: Iterable[T]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_cores()) as pool:
        for _ in pool.map(work, parts):
            pass


def _chunks(queries: int, bank: tuple[int, ...], chunk_bytes: int) -> list[slice]:
    """Equal shares of the queries, as many for each core, whose similarities fit; one where the work is small."""
    if not queries or not bank[0]:
        return []
    cores = _cores()
    count = math.ceil(4 * queries * bank[0] / chunk_bytes)
    if count > 1 or queries * math.prod(bank) > _SMALL:
        count = math.ceil(count / cores) * cores
    step = math.ceil(queries / count)
    return [slice(start, start + step) for start in range(0, queries, step)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nearest_of_chunk(
    bank: NDArray[np.float32], queries: NDArray[np.float32], k: int, floor: NDArray[np.float32]
) -> NDArray[np.uint64]:
    finite = np.all(np.isfinite(queries), axis=1)
    queries = np.where(finite[:, None], queries, np.float32(0))
    rough = queries @ bank.T
    # A float32 sum of D products of unit vectors is wrong by less than D 2^-24; rounding takes the rest. Twice: the
    # bound and what is compared with it.
    slack = np.float32(2 * (bank.shape[1] + 4) * 2.0**-24)
    edge = np.fmax(_bound(rough, k), floor) - slack
    edge[~finite] = np.inf
    chosen = rough >= edge[:, None]
    if np.count_nonzero(chosen) > _DENSE * chosen.size:
        return largest(_codes_of_all(bank, queries, chosen), k)
    found = largest(_codes_of_chosen(bank, queries, chosen), k)
    return np.pad(found, ((0, 0), (0, k - found.shape[1])))


def _bound(values: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Returns float32 [Q]: for each row of [Q, B] a number that k of its values reach.

    Columns are dealt into groups; the k-th largest of the groups' maxima is reached in k groups. With several times as
    many groups as k it lies just below the k-th largest value, and costs far less than that.
    """
    groups = min(values.shape[1], max(_GROUPS, 5 * k))
    whole = values.shape[1] // groups * groups
    maxima = values[:, :whole].reshape(len(values), -1, groups).max(axis=1)
    return np.partition(maxima, groups - k, axis=1)[:, groups - k]


def _codes_of_chosen(
    bank: NDArray[np.float32], queries: NDArray[np.float32], chosen: NDArray[np.bool_]
) -> NDArray[np.uint64]:
    """Returns uint64 [Q, most chosen rows of a query], by products with the chosen rows alone."""
    query, row = np.divmod(np.flatnonzero(chosen), chosen.shape[1])
    counts = np.bincount(query, minlength=len(queries))
    ends = np.cumsum(counts)
    exact, wide = np.empty(len(row)), queries.astype(np.float64)
    step = max(1, _CACHED_BYTES // (8 * bank.shape[1]))
    some, some_wide = np.empty((step, bank.shape[1]), np.float32), np.empty((step, bank.shape[1]))
    for number, (count, end) in enumerate(zip(counts, ends, strict=True)):
        for start in range(end - count, end, step):
            mine = slice(start, min(start + step, end))
            size = mine.stop - start
            np.take(bank, row[mine], axis=0, out=some[:size], mode="clip")  # the other modes copy once more
            some_wide[:size] = some[:size]
            np.dot(some_wide[:size], wide[number], out=exact[mine])
    codes = np.zeros((len(queries), counts.max(initial=0)), np.uint64)
    codes[query, np.arange(len(row)) - (ends - counts)[query]] = encode(exact, row)
    return codes


def _codes_of_all(
    bank: NDArray[np.float32], queries: NDArray[np.float32], chosen: NDArray[np.bool_]
) -> NDArray[np.uint64]:
    """Returns uint64 [Q, B], 0 where a row is not chosen; for banks with very many rows as near as the nearest."""
    codes = np.zeros(chosen.shape, np.uint64)
    wide = queries.astype(np.float64)
    for start in range(0, len(bank), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        rows = np.arange(start, min(start + _COLUMNS, len(bank)))
        codes[:, part] = np.where(chosen[:, part], encode(wide @ bank[part].T.astype(np.float64), rows), 0)
    return codes


def votes(
    similarities: NDArray[np.float32], labels: NDArray[np.int64], classes: int, temperature: float
) -> NDArray[np.float64]:
    """Returns float64 [Q, classes]: what the neighbours of each query give to each class.

    A neighbour gives its class exp(similarity / T), as a share of what the nearest one gives: that keeps exp() in range
    for a small T and changes no order.

    Args:
        similarities: float32 [Q, k], the nearest first, k at least 1.
        labels: int64 [Q, k] of the neighbours, from 0.
        classes: how many there are.
        temperature: T.
    """
    weights = np.exp((similarities.astype(np.float64) - similarities[:, :1]) / temperature)
    cells = np.arange(len(similarities))[:, None] * classes + labels
    given = np.bincount(cells.ravel(), weights.ravel(), minlength=len(similarities) * classes)
    return given.reshape(-1, classes).astype(np.float64, copy=False)


def knn_predict(
    bank: NDArray[np.float32],
    bank_labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    k: int,
    temperature: float,
    chunk_bytes: int = _CHUNK_BYTES,
) -> NDArray[np.int64]:
    """Predicts the class of each query by the weighted vote of its k nearest neighbours (see `votes`).

    Neighbours that are equally similar at the edge of the k are taken in the bank's order; classes with equal votes,
    the smallest first.

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
    classes = int(bank_labels.max()) + 1
    rows = max(1, chunk_bytes // (8 * (classes + k)))
    predictions = [np.zeros(0, np.int64)]
    for start in range(0, len(queries), rows):
        similarities, found = decode(nearest(bank, queries[start : start + rows], k, chunk_bytes=chunk_bytes))
        predictions.append(votes(similarities, bank_labels[found], classes, temperature).argmax(axis=1))
    return np.concatenate(predictions)


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
