"""What became of one eval image: found or not, by each representation. Pure NumPy."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer_module.knn import votes

# The representations of an image by the candidate's export, and how the names of their metrics begin.
PREFIXES: Mapping[str, str] = {"embedding": "", "untrained_embedding": "random_init_", "pixels": "pixel_"}
EMBEDDING = "embedding"
BASELINE = "baseline"  # the last blessed model's embedding
REPRESENTATIONS = (*PREFIXES, BASELINE)

HITS = ("knn_top1", "knn_top5", "linear_top1", "linear_top5", "recall_at_1", "recall_at_5", "recall_at_10")
RETRIEVED = 10  # neighbours that the deepest recall looks at
NO_LABEL = -1


class Views(NamedTuple):
    """Embeddings of an image and of two augmented views of it, float16 [D] each; the views are None without."""

    image: NDArray[np.float16]
    first: NDArray[np.float16] | None
    second: NDArray[np.float16] | None


class Outcome(NamedTuple):
    """One eval image.

    Attributes:
        rank: orders images by a hash.
        label: index of its class, NO_LABEL without.
        predicted: class that kNN of the candidate's embedding finds, NO_LABEL where it was not asked.
        hits: float32 [representations, len(HITS)], 1 found, 0 not, NaN not asked; in the order of REPRESENTATIONS.
        finite: bool [representations], whether the vector is finite; True where there is no such representation.
        views: of each representation, if the image is in the sample on which geometry is measured.
    """

    rank: int
    label: int
    predicted: int
    hits: NDArray[np.float32]
    finite: NDArray[np.bool_]
    views: Mapping[str, Views] | None


def nothing_asked() -> NDArray[np.float32]:
    """The hits of an image without label: [representations, len(HITS)]."""
    return np.full((len(REPRESENTATIONS), len(HITS)), np.nan, np.float32)


def vote(
    similarities: NDArray[np.floating], labels: NDArray[np.int64], k: int, temperature: float, count: int
) -> NDArray[np.int64]:
    """The classes with the most votes of weighted kNN, see trainer_module.knn; of equal ones the smallest first.

    Args:
        similarities: [n], of the neighbours, the nearest first.
        labels: int64 [n], theirs.
        k: neighbours that vote.
        temperature: T.
        count: classes at the most.
    """
    if not len(labels):
        return np.zeros(0, np.int64)
    classes, which = np.unique(labels[:k], return_inverse=True)
    given = votes(similarities[None, :k], which[None], len(classes), temperature)[0]
    return classes[np.argsort(-given, kind="stable")[:count]]


def hits_of(label: int, voted: NDArray, retrieved: NDArray, ranked: NDArray | None) -> NDArray[np.float32]:
    """What one representation finds of an image with that label: float32 [len(HITS)].

    Args:
        label: its class.
        voted: classes by kNN, the likeliest first, see `vote`.
        retrieved: labels of its neighbours, the nearest first. recall@k: whether one of the k nearest images of the
            train split has its label (Jegou et al., TPAMI 33, 2011; arXiv 1511.06452, section 6).
        ranked: classes by the linear probe, the likeliest first; None without a probe.
    """
    linear = (np.nan, np.nan) if ranked is None else (label in ranked[:1], label in ranked[:5])
    recalls = (label in retrieved[:depth] for depth in (1, 5, RETRIEVED))
    return np.array((label in voted[:1], label in voted[:5], *linear, *recalls), np.float32)
