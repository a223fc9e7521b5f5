"""What TFMA is asked of a model, and what it answered."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_model_analysis as tfma
from google.protobuf import wrappers_pb2
from numpy.typing import NDArray
from tensorflow_model_analysis.proto import config_pb2, metrics_for_slice_pb2

from components.evaluator.config import EvaluateConfig
from components.evaluator.metrics import CLASSES_KEY, CONFUSION_KEY, NOTES_KEY, RULES_KEY, EmbeddingQuality
from components.evaluator.resampling import Estimate
from components.evaluator.rules import Rule
from components.evaluator.scorecard import METRICS, PASSED
from trainer_module import config_json

SIGNATURE = "evaluate"


def make_eval_config(config: EvaluateConfig, code: str) -> config_pb2.EvalConfig:
    """Returns the EvalConfig of the Evaluator component.

    A model is blessed when none of the rules is broken, see components.evaluator.rules. The comparison with the last
    blessed model is one of them, since a threshold of TFMA's on the change knows nothing of noise.

    Args:
        config: what is measured and asked.
        code: fingerprint of the sources used here. It changes nothing but the cache key of the component.
    """
    passed = config_pb2.MetricThreshold(
        value_threshold=config_pb2.GenericValueThreshold(lower_bound=wrappers_pb2.DoubleValue(value=1.0))
    )
    # Said of the overall slice: without a slice TFMA would ask it of each.
    overall = config_pb2.PerSliceMetricThreshold(slicing_specs=[config_pb2.SlicingSpec()], threshold=passed)
    metric = config_pb2.MetricConfig(
        module=EmbeddingQuality.__module__,
        class_name=EmbeddingQuality.__name__,
        config=json.dumps({"config": config_json.dumps(config), "code": code}, sort_keys=True),
    )
    spec = config_pb2.MetricsSpec(
        metrics=[metric], per_slice_thresholds={PASSED: config_pb2.PerSliceMetricThresholds(thresholds=[overall])}
    )
    return config_pb2.EvalConfig(
        model_specs=[config_pb2.ModelSpec(model_type=tfma.TF_GENERIC, signature_name=SIGNATURE)],
        metrics_specs=[spec],
        slicing_specs=[
            config_pb2.SlicingSpec(),
            *(config_pb2.SlicingSpec(feature_keys=[column]) for column in config.slices),
        ],
        options=config_pb2.Options(include_default_metrics=wrappers_pb2.BoolValue(value=False)),
    )


class SliceKey(NamedTuple):
    """Which images: those whose `column` has the `value`; both empty for all."""

    column: str
    value: str


class Confusion(NamedTuple):
    """What kNN takes eval images for.

    Attributes:
        classes: labels.
        counts: int64 [C actual, C predicted].
    """

    classes: tuple[str, ...]
    counts: NDArray[np.int64]


OVERALL = SliceKey("", "")


def read_metrics(
    evaluation_uri: str, model_name: str = tfma.CANDIDATE_KEY, of_slice: SliceKey = OVERALL
) -> dict[str, float | None]:
    """Returns the metrics of one model; a metric that is NaN, because it does not apply, is None.

    Args:
        evaluation_uri: of the Evaluator's `evaluation` output.
        model_name: `candidate` or `baseline`; the candidate is found also when it was evaluated alone.
        of_slice: which images.
    """
    estimates = read_intervals(evaluation_uri, model_name, of_slice)
    return {name: None if math.isnan(estimate.value) else estimate.value for name, estimate in estimates.items()}


def read_intervals(
    evaluation_uri: str, model_name: str = tfma.CANDIDATE_KEY, of_slice: SliceKey = OVERALL
) -> dict[str, Estimate]:
    """Returns the metrics of one model with their 95 % bootstrap intervals; NaN where there is none.

    Args:
        evaluation_uri, model_name, of_slice: see `read_metrics`.
    """
    return read_slices(evaluation_uri, model_name).get(of_slice, {})


def read_slices(evaluation_uri: str, model_name: str = tfma.CANDIDATE_KEY) -> dict[SliceKey, dict[str, Estimate]]:
    """Returns the metrics with intervals of every slice.

    Args:
        evaluation_uri, model_name: see `read_metrics`.
    """
    return {
        key: {name: _estimate(pair) for name, pair in values.items() if name in METRICS}
        for key, values in _read(evaluation_uri, model_name).items()
    }


def read_rules(evaluation_uri: str) -> list[Rule]:
    """Returns each rule of the blessing with its outcome in words; none for an evaluation of another version.

    Args:
        evaluation_uri: of the Evaluator's `evaluation` output.
    """
    return [Rule(*rule) for rule in _read_json(evaluation_uri, RULES_KEY)]


def read_notes(evaluation_uri: str) -> list[str]:
    """Returns sentences on the data that was judged on, such as labels that one split lacks.

    Args:
        evaluation_uri: of the Evaluator's `evaluation` output.
    """
    return list(_read_json(evaluation_uri, NOTES_KEY))


def read_confusion(evaluation_uri: str) -> Confusion:
    """Returns the confusion matrix of kNN over the eval images; without classes for unlabelled ones.

    Args:
        evaluation_uri: of the Evaluator's `evaluation` output.
    """
    classes = tuple(_read_json(evaluation_uri, CLASSES_KEY))
    counts = np.zeros((len(classes), len(classes)), np.int64)
    for of_slice in tfma.load_plots(evaluation_uri):
        for pair in of_slice.plot_keys_and_values:
            if pair.key.name == CONFUSION_KEY:
                for entry in pair.value.multi_class_confusion_matrix_at_thresholds.matrices[0].entries:
                    counts[entry.actual_class_id, entry.predicted_class_id] = round(entry.num_weighted_examples)
    return Confusion(classes, counts)


def read_validation(evaluation_uri: str) -> list[str]:
    """Returns why a model was not blessed, one sentence a reason; empty when it was.

    Args:
        evaluation_uri: of the Evaluator's `evaluation` output.
    """
    if tfma.load_validation_result(evaluation_uri).validation_ok:
        return []
    return [f"not blessed: {rule.text}" for rule in read_rules(evaluation_uri) if rule.holds is False]


def _read(evaluation_uri: str, model_name: str) -> dict[SliceKey, dict[str, Any]]:
    """All metrics of one model as TFMA has them, by slice and name."""
    names = (model_name, "") if model_name == tfma.CANDIDATE_KEY else (model_name,)
    return {
        _slice_key(of_slice.slice_key): {
            pair.key.name: pair
            for pair in of_slice.metric_keys_and_values
            if pair.key.model_name in names and not pair.key.is_diff
        }
        for of_slice in tfma.load_metrics(evaluation_uri)
    }


def _read_json(evaluation_uri: str, name: str) -> Iterator:
    pair = _read(evaluation_uri, tfma.CANDIDATE_KEY).get(OVERALL, {}).get(name)
    return iter(json.loads(pair.value.bytes_value) if pair else ())


def _slice_key(key: metrics_for_slice_pb2.SliceKey) -> SliceKey:
    if not key.single_slice_keys:
        return OVERALL
    (single,) = key.single_slice_keys
    value = getattr(single, single.WhichOneof("kind"))
    return SliceKey(single.column, value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def _estimate(pair: Any) -> Estimate:
    value = pair.value.double_value.value
    if not pair.HasField("confidence_interval"):
        return Estimate(value, math.nan, math.nan)
    interval = pair.confidence_interval
    return Estimate(value, interval.lower_bound.double_value.value, interval.upper_bound.double_value.value)


def as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates as JSON's values: {"knn_top1": {"value": 0.54, "low": 0.49, "high": 0.59}, …}, null for NaN."""
    return {
        name: {key: None if math.isnan(number) else number for key, number in estimate._asdict().items()}
        for name, estimate in estimates.items()
    }
