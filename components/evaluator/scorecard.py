"""From embeddings to metrics, and from metrics to the rules of the blessing. Pure NumPy."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from components.evaluator.config import EvaluateConfig
from components.evaluator.linear_probe import linear_top1
from trainer_module import geometry
from trainer_module.knn import knn_top1, unit

RULES = ("finite_passed", "embedding_std_passed", "effective_rank_passed", "knn_gain_passed")
METRICS = (
    "knn_top1",
    "random_init_knn_top1",
    "pixel_knn_top1",
    "linear_top1",
    "majority_top1",
    "knn_gain",
    "embedding_std",
    "embedding_std_relative",
    "effective_rank",
    "uniformity",
    "bank_images",
    "query_images",
    "score",
    *RULES,
    "rules_passed",
)
_NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Images of both splits, embedded, in an order that tells nothing of label or split.

    Attributes:
        embedding: float [N, D], of the encoder that is judged.
        untrained: float [N, E], of the same network before training.
        pixels: float [N, P], the image itself.
        labels: object [N], bytes or None for an image without label.
        in_bank: bool [N], True for the train split, False for the eval split.
    """

    embedding: NDArray
    untrained: NDArray
    pixels: NDArray
    labels: NDArray[np.object_]
    in_bank: NDArray[np.bool_]


def score(images: Embedded, config: EvaluateConfig) -> dict[str, float]:
    """Measures embeddings and applies the rules.

    A metric that needs labels is NaN when the bank or the queries have none, one of the encoder's embeddings is NaN
    when any of them is not finite, and a rule that does not apply is NaN. `score`, which is compared with the last
    blessed model's, is kNN top-1, or for unlabelled sets the effective rank as a share of what is possible
    (arXiv 2210.02885 shows it to follow downstream accuracy); 0 when an embedding is not finite.

    Returns:
        A figure for each name in `METRICS`; rules are 1.0 (holds) or 0.0 (broken); `rules_passed` is 1.0 when no
        rule is broken.
    """
    metrics = dict.fromkeys(METRICS, _NAN)
    metrics["bank_images"] = float(np.count_nonzero(images.in_bank))
    metrics["query_images"] = float(np.count_nonzero(~images.in_bank))
    embedding = unit(images.embedding)
    finite = bool(len(embedding)) and bool(np.isfinite(embedding).all())
    metrics |= _label_metrics(images, embedding if finite else None, config)
    if finite:
        metrics |= _geometry_metrics(embedding[: config.max_geometry])
    metrics["score"] = _score(metrics, embedding.shape, config) if finite else 0.0
    metrics |= _rules(metrics, finite, embedding.shape, config)
    metrics["rules_passed"] = float(all(metrics[rule] != 0.0 for rule in RULES))
    return metrics


def rank_limit(config: EvaluateConfig, shape: tuple[int, ...]) -> float:
    """Returns the effective rank asked of embeddings [N, D]: half of what is possible where that is less."""
    return min(config.min_effective_rank, _possible_rank(shape, config) / 2)


def _label_metrics(
    images: Embedded, embedding: NDArray[np.float32] | None, config: EvaluateConfig
) -> Mapping[str, float]:
    labelled = np.array([label is not None for label in images.labels], dtype=bool)
    bank, queries = labelled & images.in_bank, labelled & ~images.in_bank
    if not bank.any() or not queries.any():
        return {}
    names, coded = np.unique(images.labels[labelled].astype(bytes), return_inverse=True)
    labels = np.full(len(labelled), -1, dtype=np.int64)
    labels[labelled] = coded

    def knn(vectors: NDArray[np.float32]) -> float:
        if not np.isfinite(vectors).all():
            return _NAN
        k, temperature = config.knn_k, config.knn_temperature
        return knn_top1(vectors[bank], labels[bank], vectors[queries], labels[queries], k, temperature)

    majority = np.bincount(labels[bank], minlength=len(names)).argmax()
    metrics = {
        "random_init_knn_top1": knn(unit(images.untrained)),
        "pixel_knn_top1": knn(unit(images.pixels)),
        "majority_top1": float(np.mean(labels[queries] == majority)),
    }
    if embedding is not None:
        metrics["knn_top1"] = knn(embedding)
        metrics["knn_gain"] = metrics["knn_top1"] - metrics["random_init_knn_top1"]
        if config.linear_probe:
            metrics["linear_top1"] = linear_top1(
                embedding[bank], labels[bank], embedding[queries], labels[queries], config.linear_probe_images
            )
    return metrics


def _geometry_metrics(embedding: NDArray[np.float32]) -> Mapping[str, float]:
    spread = geometry.embedding_std(embedding)
    return {
        "embedding_std": spread,
        "embedding_std_relative": spread * math.sqrt(embedding.shape[1]),
        "effective_rank": geometry.effective_rank(embedding),
        "uniformity": geometry.uniformity(embedding),
    }


def _possible_rank(shape: tuple[int, ...], config: EvaluateConfig) -> int:
    return min(shape[0], shape[1], config.max_geometry)


def _score(metrics: Mapping[str, float], shape: tuple[int, ...], config: EvaluateConfig) -> float:
    if not math.isnan(metrics["knn_top1"]):
        return metrics["knn_top1"]
    return metrics["effective_rank"] / _possible_rank(shape, config)


def _rules(
    metrics: Mapping[str, float], finite: bool, shape: tuple[int, ...], config: EvaluateConfig
) -> Mapping[str, float]:
    if not finite:
        return {"finite_passed": 0.0}
    rules = {
        "finite_passed": 1.0,
        "embedding_std_passed": float(metrics["embedding_std_relative"] >= config.min_embedding_std),
        "effective_rank_passed": float(metrics["effective_rank"] >= rank_limit(config, shape)),
    }
    if not math.isnan(metrics["knn_top1"]):
        # Nothing can gain on an untrained encoder that finds every class already, as in a set with one class.
        perfect = metrics["knn_top1"] == 1.0
        rules["knn_gain_passed"] = float(perfect or metrics["knn_gain"] > config.min_gain)
    return rules
