"""The scorecard as a metric of TensorFlow Model Analysis."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from numpy.typing import NDArray
from tensorflow_model_analysis import constants
from tensorflow_model_analysis.metrics import metric_types

from components.evaluator.config import EvaluateConfig
from components.evaluator.scorecard import METRICS, Embedded, score
from trainer_module.knn import unit

_FEATURES = ("image/sha256", "image/split", "image/label")
_VECTORS = ("embedding", "untrained_embedding", "pixels")
_BLOCK_ROWS = 1024


class EmbeddingQuality(metric_types.Metric):
    """Metrics of a model's embeddings over the train split (bank) and the eval split (queries) together.

    The model's outputs are `embedding`, `untrained_embedding` and `pixels`, float32 [N, .]; the examples hold
    `image/sha256`, `image/split` and perhaps `image/label`. One metric each is reported for `scorecard.METRICS`.
    """

    def __init__(self, config: Mapping[str, Any], code: str, name: str = "embedding_quality") -> None:
        """Args:
        config: fields of an `EvaluateConfig`.
        code: fingerprint of the sources used here. It changes nothing but the cache key of the component.
        name: of the metric's instance.
        """
        super().__init__(_computations, config=dict(config), code=code, name=name)


def _computations(
    config: Mapping[str, Any],
    code: str,  # noqa: ARG001
    name: str,  # noqa: ARG001
    model_names: Iterable[str] = ("",),
) -> metric_types.MetricComputations:
    inputs: dict[str, dict[str, dict]] = {
        constants.PREDICTIONS_KEY: {},
        constants.FEATURES_KEY: {feature: {} for feature in _FEATURES},
    }
    computations: metric_types.MetricComputations = []
    for model in model_names:
        # TFMA looks thresholds up by keys that say nothing (None) of example weights.
        keys = [metric_types.MetricKey(metric, model_name=model, example_weighted=None) for metric in METRICS]
        preprocessor = metric_types.StandardMetricInputsPreprocessor(inputs, include_default_inputs=False)
        combiner = ScorecardCombineFn(keys, model, EvaluateConfig(**config))
        computations.append(metric_types.MetricComputation(keys, [preprocessor], combiner))
    return computations


class _Row(NamedTuple):
    """One image: rank orders images by a hash, vectors float16 of length 1 in the order of _VECTORS."""

    rank: bytes
    in_bank: bool
    label: bytes | None
    vectors: tuple[NDArray[np.float16], ...]


class _Block(NamedTuple):
    """Many images: rank S32 [N], in_bank bool [N], labels object [N], vectors float16 [N, .] each."""

    rank: NDArray[np.bytes_]
    in_bank: NDArray[np.bool_]
    labels: NDArray[np.object_]
    vectors: tuple[NDArray[np.float16], ...]


@dataclasses.dataclass
class _Accumulator:
    rows: list[_Row] = dataclasses.field(default_factory=list)
    blocks: list[_Block] = dataclasses.field(default_factory=list)


class ScorecardCombineFn(beam.CombineFn):
    """Collects embeddings and scores them at the end.

    Vectors are kept as float16 of length 1, which moves a cosine similarity by less than 1e-3 and halves the memory:
    2 (2 D + P) bytes an image. Past `max_bank` and `max_queries` the images with the smallest hashes stay, so the
    sample, and with it every metric, is the same for any runner, bundling and order.
    """

    def __init__(self, keys: list[metric_types.MetricKey], model_name: str, config: EvaluateConfig) -> None:
        """Args:
        keys: one for each of `scorecard.METRICS`.
        model_name: of the model whose predictions are scored; empty when there is one model alone.
        config: what is measured.
        """
        self._keys = keys
        self._model_name = model_name
        self._config = config

    def create_accumulator(self) -> _Accumulator:
        """Returns an accumulator of no images."""
        return _Accumulator()

    def add_input(self, accumulator: _Accumulator, element: metric_types.StandardMetricInputs) -> _Accumulator:
        """Adds one image."""
        predictions = element[constants.PREDICTIONS_KEY]
        if self._model_name:
            predictions = predictions[self._model_name]
        accumulator.rows.append(_to_row(element[constants.FEATURES_KEY], predictions))
        return self.compact(accumulator) if len(accumulator.rows) >= _BLOCK_ROWS else accumulator

    def merge_accumulators(self, accumulators: Iterable[_Accumulator]) -> _Accumulator:
        """Joins accumulators and drops what is past the limits."""
        merged = _Accumulator()
        for accumulator in accumulators:
            merged.rows += accumulator.rows
            merged.blocks += accumulator.blocks
        return self.compact(merged)

    def compact(self, accumulator: _Accumulator) -> _Accumulator:
        """Turns rows into arrays and, once there are twice too many images, drops what is past the limits."""
        blocks = accumulator.blocks + _to_blocks(accumulator.rows)
        held = sum(len(block.rank) for block in blocks)
        if held > 2 * (self._config.max_bank + self._config.max_queries):
            blocks = [self._sample(_join(blocks))]
        return _Accumulator(blocks=blocks)

    def extract_output(self, accumulator: _Accumulator) -> dict[metric_types.MetricKey, float]:
        """Returns the figure of each key."""
        blocks = self.compact(accumulator).blocks
        if not blocks:
            return dict.fromkeys(self._keys, float("nan"))
        images = self._sample(_join(blocks))
        embedding, untrained, pixels = (vectors.astype(np.float32) for vectors in images.vectors)
        metrics = score(Embedded(embedding, untrained, pixels, images.labels, images.in_bank), self._config)
        return {key: metrics[key.name] for key in self._keys}

    def _sample(self, block: _Block) -> _Block:
        """Returns the images with the smallest hashes, within the limits, in the order of their hashes."""
        order = np.argsort(block.rank, kind="stable")
        in_bank = block.in_bank[order]
        kept = np.where(
            in_bank, np.cumsum(in_bank) <= self._config.max_bank, np.cumsum(~in_bank) <= self._config.max_queries
        )
        chosen = order[kept]
        vectors = tuple(vector[chosen] for vector in block.vectors)
        return _Block(block.rank[chosen], block.in_bank[chosen], block.labels[chosen], vectors)


def _to_row(features: Mapping[str, Any], predictions: Mapping[str, NDArray]) -> _Row:
    split = _value(features, "image/split")
    if split not in (b"train", b"eval"):
        raise ValueError(f"image/split of an evaluated example is {split!r}, neither train nor eval")
    # Hashed once more: the split is made by the first bits of the image's own hash.
    rank = hashlib.sha256(b"scorecard" + (_value(features, "image/sha256") or b"")).digest()
    vectors = tuple(unit(np.reshape(predictions[name], (1, -1)))[0].astype(np.float16) for name in _VECTORS)
    return _Row(rank, split == b"train", _value(features, "image/label"), vectors)


def _value(features: Mapping[str, Any], name: str) -> bytes | None:
    """Returns the one value of a feature, or None when the example has none."""
    values = np.ravel(features[name]) if features.get(name) is not None else np.zeros(0)
    if not values.size or values[0] is None:
        return None
    value = values[0]
    return value if isinstance(value, bytes) else str(value).encode()


def _to_blocks(rows: list[_Row]) -> list[_Block]:
    if not rows:
        return []
    labels = np.empty(len(rows), dtype=object)
    labels[:] = [row.label for row in rows]
    vectors = tuple(np.stack(column) for column in zip(*(row.vectors for row in rows), strict=True))
    rank = np.array([row.rank.hex() for row in rows], dtype="S64")
    return [_Block(rank, np.array([row.in_bank for row in rows]), labels, vectors)]


def _join(blocks: list[_Block]) -> _Block:
    vectors = tuple(np.concatenate(column) for column in zip(*(block.vectors for block in blocks), strict=True))
    rank, in_bank, labels = (np.concatenate(column) for column in list(zip(*blocks, strict=True))[:3])
    return _Block(rank, in_bank, labels, vectors)
