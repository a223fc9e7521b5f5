"""What the picture page shows, computed from embeddings: neighbours, a map, recall of each class, thumbnails."""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from components.model_card.card import Recall

_FEWEST_FOR_TSNE = 10
_PERPLEXITY = 30.0
_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one split with their embeddings.

    Attributes:
        embedding: float32 [N, D], finite, rows of length 1.
        labels: of each image; None where it has none.
        thumbnails: of each image; none at all where images must not be shown.
        dropped: images more, whose embedding is NaN or infinite.
    """

    embedding: NDArray[np.float32]
    labels: tuple[str | None, ...]
    thumbnails: tuple[Image.Image, ...]
    dropped: int = 0


def nearest(bank: Split, queries: Split, k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The images of the bank that are most similar to each query.

    Args:
        bank: B images.
        queries: Q images.
        k: neighbours; at most B are given.

    Returns:
        Rows of the bank, int [Q, k], the nearest first, and their cosine similarities, float32 [Q, k].
    """
    similarity = queries.embedding @ bank.embedding.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(similarity, order, axis=1)


def recall(classes: Sequence[str], counts: NDArray[np.int64]) -> list[Recall]:
    """The share of each class's images that are found, with Wilson's interval (1927).

    Args:
        classes: labels.
        counts: int64 [C actual, C predicted].

    Returns:
        The classes that have images, in their order.
    """
    return [_recall(classes, int(row), counts[row]) for row in np.flatnonzero(counts.sum(axis=1))]


def _recall(classes: Sequence[str], own: int, taken: NDArray[np.int64]) -> Recall:
    hits, images = int(taken[own]), int(taken.sum())
    interval = binomtest(hits, images).proportion_ci(method="wilson")
    wrong = np.where(np.arange(len(taken)) == own, 0, taken)
    confused = classes[int(wrong.argmax())] if wrong.any() else None
    return Recall(classes[own], images, hits / images, float(interval.low), float(interval.high), confused)


def project(embedding: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
    """A map of embeddings in the plane.

    t-SNE (van der Maaten and Hinton 2008) from the principal components, or for a few images these alone. One thread,
    since sums in another order would give another map.

    Args:
        embedding: float [N, D], finite.

    Returns:
        float64 [N, 2] in 0 to 1, and the method's name.
    """
    start = _principal(embedding)
    if len(embedding) < _FEWEST_FOR_TSNE or np.ptp(start) < 1e-6:
        return _in_unit_square(start), "principal components"
    perplexity = min(_PERPLEXITY, (len(embedding) - 1) / 3)
    init = (start / start[:, 0].std() * 1e-4).astype(np.float32)
    with threadpool_limits(1):
        points = TSNE(perplexity=perplexity, init=init, max_iter=_STEPS, random_state=0, n_jobs=1).fit_transform(
            embedding
        )
    return _in_unit_square(points.astype(np.float64)), "t-SNE"


def _principal(embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    """The first two principal components, float64 [N, 2]; zero where there are fewer."""
    wide = embedding.astype(np.float64)
    centred = wide - (wide.mean(axis=0) if len(wide) else 0.0)
    with threadpool_limits(1):
        left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    # A component may point either way: its largest coordinate shall be positive.
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)]) if right.size else np.ones(len(right))
    points = np.zeros((len(wide), 2))
    points[:, : min(2, len(sizes))] = (left * sizes * signs)[:, :2]
    return points


def _in_unit_square(points: NDArray[np.float64]) -> NDArray[np.float64]:
    if not len(points):
        return points
    low, size = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1e-12)
    return (points - low) / size


def spread(points: NDArray[np.float64], gap: float) -> list[int]:
    """Rows of points that lie well apart, as many as find room in their order.

    Args:
        points: float64 [N, 2] in 0 to 1.
        gap: least distance along one of the axes at least.
    """
    chosen: list[int] = []
    for row, point in enumerate(points):
        if not chosen or np.abs(points[chosen] - point).max(axis=1).min() >= gap:
            chosen.append(row)
    return chosen


def thumbnail(encoded: bytes, side: int) -> Image.Image:
    """A JPEG or PNG shrunk to fit into a square of so many pixels."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (2 * side, 2 * side))  # a JPEG need not be decoded in full
        return smaller(image.convert("RGB"), side)


def smaller(image: Image.Image, side: int) -> Image.Image:
    """A copy that fits into a square of so many pixels."""
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def data_uri(image: Image.Image) -> str:
    """An image as a JPEG inside of a page."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
