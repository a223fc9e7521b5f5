"""The scorecard as a metric of TensorFlow Model Analysis: outcomes of eval images to figures, slice by slice."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from numpy.typing import NDArray
from tensorflow_model_analysis import constants
from tensorflow_model_analysis.metrics import metric_types
from tensorflow_model_analysis.proto import config_pb2, metrics_for_slice_pb2

from components.evaluator.config import EvaluateConfig
from components.evaluator.extractor import OUTCOME_KEY
from components.evaluator.outcomes import HITS, REPRESENTATIONS, Outcome, Views
from components.evaluator.scorecard import (
    COUNTS,
    METRICS,
    OF_A_MODEL,
    WITH_INTERVAL,
    Estimate,
    Facts,
    Sample,
    Slice,
    confusion,
    score,
)
from trainer_module import config_json

RULES_KEY = "rules"  # of a metric: JSON, each rule with its outcome in words
NOTES_KEY = "notes"  # of a metric: JSON, sentences on the data
CLASSES_KEY = "classes"  # of a metric: JSON, labels by the index that the confusion matrix has them under
CONFUSION_KEY = "multi_class_confusion_matrix_plot"
_BLOCK_ROWS = 1024


class EmbeddingQuality(metric_types.Metric):
    """Metrics of embeddings, see components.evaluator.scorecard, from the rows of components.evaluator.extractor.

    Those with an interval are told with it. Besides `scorecard.METRICS` there are, of the overall slice, `rules`,
    `notes`, `classes`, and the confusion matrix of kNN as a plot.
    """

    def __init__(self, config: str, code: str, name: str = "embedding_quality") -> None:
        """Args:
        config: an `EvaluateConfig` as trainer_module.config_json writes it.
        code: fingerprint of the sources used here. It changes nothing but the cache key of the component.
        name: of the metric's instance.
        """
        super().__init__(_computations, config=config, code=code, name=name)


def read_config(eval_config: config_pb2.EvalConfig) -> EvaluateConfig:
    """Returns what an EvalConfig of components.evaluator.eval_config asks for."""
    metric = json.loads(eval_config.metrics_specs[0].metrics[0].config)
    return config_json.loads(EvaluateConfig, metric["config"])


def _computations(
    config: str,
    code: str,  # noqa: ARG001 - TFMA hands on all of the metric's configuration
    name: str,  # noqa: ARG001 - likewise
    model_names: Iterable[str] = ("",),
) -> metric_types.MetricComputations:
    # One computation for both models, since they are compared image by image.
    names = list(model_names)
    candidate = names[0] if len(names) == 1 else constants.CANDIDATE_KEY
    baseline = [name for name in names if name != candidate]
    keys = [_key(metric, candidate) for metric in (*METRICS, RULES_KEY, NOTES_KEY, CLASSES_KEY)]
    keys += [_key(metric, model) for model in baseline for metric in (*OF_A_MODEL, *COUNTS)]
    keys.append(metric_types.PlotKey(CONFUSION_KEY, model_name=candidate))
    preprocessor = metric_types.StandardMetricInputsPreprocessor({OUTCOME_KEY: {}}, include_default_inputs=False)
    combiner = ScorecardCombineFn(
        candidate, baseline[0] if baseline else None, config_json.loads(EvaluateConfig, config)
    )
    return [metric_types.MetricComputation(keys, [preprocessor], combiner)]


def _key(metric: str, model: str) -> metric_types.MetricKey:
    # TFMA looks thresholds up by keys that say nothing (None) of example weights.
    return metric_types.MetricKey(metric, model_name=model, example_weighted=None)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Outcomes by column: int64 or uint64 [N], hits [N, .], finite [N, .]; views belong to the ranks beside them."""

    rank: NDArray[np.uint64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    hits: NDArray[np.float32]
    finite: NDArray[np.bool_]


@dataclasses.dataclass
class _Accumulator:
    rows: list[Outcome] = dataclasses.field(default_factory=list)
    blocks: list[_Block] = dataclasses.field(default_factory=list)
    views: list[tuple[int, Mapping[str, Views]]] = dataclasses.field(default_factory=list)
    facts: Facts | None = None


class ScorecardCombineFn(beam.CombineFn):
    """Collects the outcomes of a slice and scores them at the end, in the order of their ranks.

    An image takes about 130 bytes, one of the sample that geometry is measured on its vectors besides. The facts of
    both splits come to the overall slice alone, which is how it is known.
    """

    def __init__(self, candidate: str, baseline: str | None, config: EvaluateConfig) -> None:
        """Args:
        candidate: name of the model; empty when there is one model alone.
        baseline: name of the last blessed model, if there is one.
        config: what is measured.
        """
        self._candidate, self._baseline, self._config = candidate, baseline, config

    def create_accumulator(self) -> _Accumulator:
        """Returns an accumulator of no images."""
        return _Accumulator()

    def add_input(self, accumulator: _Accumulator, element: Mapping[str, Any]) -> _Accumulator:
        """Adds one image, or the facts."""
        outcome = element[OUTCOME_KEY]
        if isinstance(outcome, Facts):
            accumulator.facts = outcome
            return accumulator
        if outcome.views is not None:
            accumulator.views.append((outcome.rank, outcome.views))
        accumulator.rows.append(outcome._replace(views=None))
        return self.compact(accumulator) if len(accumulator.rows) >= _BLOCK_ROWS else accumulator

    def merge_accumulators(self, accumulators: Iterable[_Accumulator]) -> _Accumulator:
        """Joins accumulators."""
        merged = _Accumulator()
        for accumulator in accumulators:
            merged.rows += accumulator.rows
            merged.blocks += accumulator.blocks
            merged.views += accumulator.views
            merged.facts = merged.facts or accumulator.facts
        return self.compact(merged)

    def compact(self, accumulator: _Accumulator) -> _Accumulator:
        """Turns rows into arrays."""
        blocks = accumulator.blocks + ([_to_block(accumulator.rows)] if accumulator.rows else [])
        return _Accumulator(blocks=blocks, views=accumulator.views, facts=accumulator.facts)

    def extract_output(self, accumulator: _Accumulator) -> dict[metric_types.MetricKey, Any]:
        """Returns the figure of each key."""
        images = _slice(self.compact(accumulator))
        scorecard = score(images, self._config)
        figures: dict[metric_types.MetricKey, Any] = {
            _key(name, self._candidate): _told(name, estimate) for name, estimate in scorecard.candidate.items()
        }
        if self._baseline is not None:
            figures |= {
                _key(name, self._baseline): _told(name, estimate) for name, estimate in scorecard.baseline.items()
            }
        if images.facts is not None:
            figures[_key(RULES_KEY, self._candidate)] = json.dumps(scorecard.rules)
            figures[_key(NOTES_KEY, self._candidate)] = json.dumps(scorecard.notes)
            figures[_key(CLASSES_KEY, self._candidate)] = json.dumps(images.facts.classes)
            plot = metric_types.PlotKey(CONFUSION_KEY, model_name=self._candidate)
            figures[plot] = _confusion_plot(confusion(images))
        return figures


def _to_block(rows: Sequence[Outcome]) -> _Block:
    return _Block(
        np.array([row.rank for row in rows], np.uint64),
        np.array([row.label for row in rows], np.int64),
        np.array([row.predicted for row in rows], np.int64),
        np.stack([row.hits for row in rows]),
        np.stack([row.finite for row in rows]),
    )


def _no_rows() -> _Block:
    none = np.zeros(0, np.int64)
    shape = (0, len(REPRESENTATIONS), len(HITS))
    return _Block(none.astype(np.uint64), none, none, np.zeros(shape, np.float32), np.zeros(shape[:2], bool))


def _slice(accumulator: _Accumulator) -> Slice:
    """All outcomes in the order of their ranks."""
    blocks = [_no_rows(), *accumulator.blocks]
    columns = (np.concatenate([getattr(block, field.name) for block in blocks]) for field in dataclasses.fields(_Block))
    joined = _Block(*columns)
    order = np.argsort(joined.rank, kind="stable")
    rank, views = joined.rank[order], sorted(accumulator.views, key=lambda pair: pair[0])
    samples = {}
    for name in REPRESENTATIONS:
        of_name = [(at, of_image[name]) for at, of_image in views if name in of_image]
        if of_name:
            samples[name] = _sample(np.searchsorted(rank, np.array([at for at, _ in of_name], np.uint64)), of_name)
    return Slice(
        joined.label[order],
        joined.predicted[order],
        joined.hits[order],
        joined.finite[order],
        samples,
        accumulator.facts,
    )


def _sample(rows: NDArray[np.int64], views: Sequence[tuple[int, Views]]) -> Sample:
    columns = zip(*(of_image for _, of_image in views), strict=True)
    image, first, second = (
        None if any(vector is None for vector in column) else np.stack(column).astype(np.float32) for column in columns
    )
    assert image is not None
    return Sample(rows, image, first, second)


def _told(name: str, estimate: Estimate) -> Any:
    """A figure with its interval as TFMA writes one; a bare number where the metric has none.

    The kind goes by the metric, since TFMA subtracts the baseline's from a bare number.
    """
    if name not in WITH_INTERVAL:
        return estimate.value
    bounded = metrics_for_slice_pb2.BoundedValue()
    bounded.value.value, bounded.lower_bound.value, bounded.upper_bound.value = estimate
    return bounded


def _confusion_plot(counts: NDArray[np.int64]) -> metrics_for_slice_pb2.MultiClassConfusionMatrixAtThresholds:
    plot = metrics_for_slice_pb2.MultiClassConfusionMatrixAtThresholds()
    matrix = plot.matrices.add(threshold=0.0)
    for actual, predicted in np.argwhere(counts):
        matrix.entries.add(
            actual_class_id=int(actual),
            predicted_class_id=int(predicted),
            num_weighted_examples=float(counts[actual, predicted]),
        )
    return plot
