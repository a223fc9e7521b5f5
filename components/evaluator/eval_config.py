"""What TFMA is asked of a model, and what it answered."""

import dataclasses
import json
import math

import tensorflow_model_analysis as tfma
from google.protobuf import wrappers_pb2
from tensorflow_model_analysis.writers import eval_config_writer

from components.evaluator.config import EvaluateConfig
from components.evaluator.metrics import EmbeddingQuality
from components.evaluator.scorecard import METRICS

SIGNATURE = "evaluate"


def make_eval_config(config: EvaluateConfig, code: str) -> tfma.EvalConfig:
    """Returns the EvalConfig of the Evaluator component.

    A model is blessed when none of the scorecard's rules is broken and its `score` is at most `tolerance` below that
    of the last blessed model on the same examples, if there is one.

    Args:
        config: what is measured and asked.
        code: fingerprint of the sources used here. It changes nothing but the cache key of the component.
    """
    rules = tfma.MetricThreshold(
        value_threshold=tfma.GenericValueThreshold(lower_bound=wrappers_pb2.DoubleValue(value=1.0))
    )
    against_baseline = tfma.MetricThreshold(
        change_threshold=tfma.GenericChangeThreshold(
            direction=tfma.MetricDirection.HIGHER_IS_BETTER,
            absolute=wrappers_pb2.DoubleValue(value=-config.tolerance),
        )
    )
    metric = tfma.MetricConfig(
        module=EmbeddingQuality.__module__,
        class_name=EmbeddingQuality.__name__,
        config=json.dumps({"config": dataclasses.asdict(config), "code": code}, sort_keys=True),
    )
    spec = tfma.MetricsSpec(metrics=[metric], thresholds={"rules_passed": rules, "score": against_baseline})
    return tfma.EvalConfig(
        model_specs=[tfma.ModelSpec(model_type=tfma.TF_GENERIC, signature_name=SIGNATURE)],
        metrics_specs=[spec],
        slicing_specs=[tfma.SlicingSpec()],
        options=tfma.Options(include_default_metrics=wrappers_pb2.BoolValue(value=False)),
    )


def read_metrics(evaluation_uri: str, model_name: str = tfma.CANDIDATE_KEY) -> dict[str, float | None]:
    """Returns the metrics of one model; a metric that is NaN, because it does not apply, is None.

    Args:
        evaluation_uri: of the Evaluator's `evaluation` output.
        model_name: `candidate` or `baseline`; the candidate is found also when it was evaluated alone.
    """
    names = (model_name, "") if model_name == tfma.CANDIDATE_KEY else (model_name,)
    metrics: dict[str, float | None] = {}
    for of_slice in tfma.load_metrics(evaluation_uri):
        for pair in of_slice.metric_keys_and_values:
            if pair.key.model_name in names and not pair.key.is_diff and pair.key.name in METRICS:
                value = pair.value.double_value.value
                metrics[pair.key.name] = None if math.isnan(value) else value
    return metrics


def read_validation(evaluation_uri: str) -> list[str]:
    """Returns why a model was not blessed, one sentence a reason; empty when it was.

    Args:
        evaluation_uri: of the Evaluator's `evaluation` output.
    """
    if tfma.load_validation_result(evaluation_uri).validation_ok:
        return []
    metrics = read_metrics(evaluation_uri)
    baseline = read_metrics(evaluation_uri, tfma.BASELINE_KEY)
    config = _read_config(evaluation_uri)
    reasons = _broken_rules(metrics, config) + _fallen_back(metrics, baseline, config)
    return [f"not blessed: {reason}" for reason in reasons or ["the evaluation saw no images"]]


def _read_config(evaluation_uri: str) -> EvaluateConfig:
    eval_config = eval_config_writer.load_eval_run(evaluation_uri)[0]
    return EvaluateConfig(**json.loads(eval_config.metrics_specs[0].metrics[0].config)["config"])


def _broken_rules(metrics: dict[str, float | None], config: EvaluateConfig) -> list[str]:
    sentences = {
        "finite_passed": "some embeddings are NaN or infinite",
        "embedding_std_passed": "the embeddings have collapsed: their spread is {embedding_std_relative:.4f} of a "
        f"uniform one, below {config.min_embedding_std:g}",
        "effective_rank_passed": "the embeddings have collapsed: their effective rank is {effective_rank:.2f}, below "
        f"{config.min_effective_rank:g}, or half of what so few images or dimensions allow",
        "knn_gain_passed": "kNN {knn_top1:.3f} is not above the untrained encoder's "
        + ("{random_init_knn_top1:.3f}" if metrics.get("random_init_knn_top1") is not None else "(not finite)")
        + (f" by more than {config.min_gain:g}" if config.min_gain else ""),
    }
    return [text.format(**metrics) for rule, text in sentences.items() if metrics.get(rule) == 0.0]


def _fallen_back(
    metrics: dict[str, float | None], baseline: dict[str, float | None], config: EvaluateConfig
) -> list[str]:
    now, last = metrics.get("score"), baseline.get("score")
    if now is None or last is None or metrics["finite_passed"] == 0.0 or now - last >= -config.tolerance:
        return []
    name = "effective rank as a share" if metrics.get("knn_top1") is None else "kNN"
    return [f"{name} {now:.3f} is below the last blessed model's {last:.3f} by more than {config.tolerance:g}"]
