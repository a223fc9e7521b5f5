"""What the stages before have left of a model in files and metadata, read for its card."""

import functools
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfx import types
from tfx.components.evaluator.constants import ARTIFACT_PROPERTY_BLESSED_KEY
from tfx.components.example_gen import utils
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio

from components.evaluator.config import EvaluateConfig
from components.evaluator.eval_config import read_metrics, read_validation
from components.evaluator.scorecard import RULES
from components.model_card.card import Artifact, Data, Evaluation, Figure, Lineage, Metric, Rule, Training
from trainer_module.alarms import History, Interval, judge
from trainer_module.config import TrainConfig
from trainer_module.run_fn import TRAINING_FILE

_INGEST_FILE = "ingest.json"
_PACKAGES = (
    "tensorflow",
    "keras",
    "tfx",
    "apache-beam",
    "tensorflow-transform",
    "tensorflow-data-validation",
    "tensorflow-model-analysis",
    "numpy",
    "scikit-learn",
    "pillow",
)

_UNTRAINED, _PIXELS = "random_init_", "pixel_"
# What counts, judges or sums up and is no metric of its own.
_NO_METRICS = frozenset(("bank_images", "query_images", "score", "rules_passed", *RULES))
_TITLES = {
    "knn_top1": "kNN top-1",
    "linear_top1": "linear probe top-1",
    "majority_top1": "always the most frequent class, top-1",
    "knn_gain": "kNN top-1 above the untrained network's",
    "embedding_std": "embedding std per dimension",
    "embedding_std_relative": "embedding std as a share of a uniform one",
    "effective_rank": "effective rank (RankMe)",
    "uniformity": "uniformity",
}


def read_data(examples: types.Artifact) -> Data:
    """The images, by the files and the metadata of ImageExampleGen's `examples`."""
    counts = read_json(f"{examples.uri}/{_INGEST_FILE}")
    labels = counts.pop("labels")
    span, version = (
        examples.get_int_custom_property(name) if examples.has_custom_property(name) else None
        for name in (utils.SPAN_PROPERTY_NAME, utils.VERSION_PROPERTY_NAME)
    )
    fingerprint = examples.get_string_custom_property(utils.FINGERPRINT_PROPERTY_NAME)
    return Data(span, version, fingerprint or None, counts, labels)


def read_training(model_run: types.Artifact, intervals: Sequence[Interval], config: TrainConfig) -> Training:
    """What the Trainer did.

    Args:
        model_run: of the Trainer.
        intervals: of its metrics.jsonl.
        config: of the training.
    """
    result = read_json(f"{model_run.uri}/{TRAINING_FILE}")
    return Training(
        steps=result["steps"],
        epochs=config.epochs,
        global_batch=config.global_batch,
        replicas=result["replicas"],
        strategy=result["strategy"],
        key_bn=config.key_bn.mode.name,
        final_loss=result["final_loss"],
        pretext_top1=result["pretext_top1"],
        alignment=result["alignment"],
        alarms=alarms_of(intervals, config),
    )


def alarms_of(intervals: Iterable[Interval], config: TrainConfig) -> tuple[str, ...]:
    """What was said while these intervals were measured, oldest first."""
    texts: list[str] = []

    def add(history: History, interval: Interval) -> History:
        after, alarms = judge(history, interval, config)
        texts.extend(alarm.text for alarm in alarms)
        return after

    functools.reduce(add, intervals, History())
    return tuple(texts)


def read_evaluation(evaluation: types.Artifact, blessing: types.Artifact, config: EvaluateConfig) -> Evaluation:
    """What the Evaluator found.

    Args:
        evaluation, blessing: its outputs.
        config: of the evaluation.
    """
    metrics, baseline = read_metrics(evaluation.uri), read_metrics(evaluation.uri, "baseline")
    reasons = tuple(reason.removeprefix("not blessed: ") for reason in read_validation(evaluation.uri))
    blessed = blessing.get_int_custom_property(ARTIFACT_PROPERTY_BLESSED_KEY) == 1
    return Evaluation(blessed, reasons, tuple(_rules(metrics, baseline, config)), make_metrics(metrics, baseline))


def make_metrics(
    metrics: Mapping[str, float | None],
    baseline: Mapping[str, float | None],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[Metric, ...]:
    """The metrics of a model, each with the same number for the untrained network and the raw pixels.

    Args:
        metrics: by the Evaluator's names; `random_init_…` and `pixel_…` stand beside the metric that they end with.
        baseline: of the last blessed model; empty where there was none.
        intervals: ends of the 95 % interval of those that have one.
    """

    def of(name: str, among: Mapping[str, float | None]) -> Figure | None:
        if name not in among:
            return None
        return Figure(among[name], *(intervals or {}).get(name, (None, None)) if among is metrics else (None, None))

    own = [name for name in metrics if name not in _NO_METRICS and not name.startswith((_UNTRAINED, _PIXELS))]
    return tuple(
        Metric(
            name,
            _TITLES.get(name, name.replace("_", " ")),
            of(name, metrics) or Figure(None),
            of(_UNTRAINED + name, metrics),
            of(_PIXELS + name, metrics),
            of(name, baseline),
        )
        for name in sorted(own, key=_place)
    )


def _place(name: str) -> tuple[int, str]:
    titles = list(_TITLES)
    return (titles.index(name) if name in titles else len(titles), name)


def _rules(
    metrics: Mapping[str, float | None], baseline: Mapping[str, float | None], config: EvaluateConfig
) -> list[Rule]:
    words = {
        "finite_passed": "all embeddings are finite",
        "embedding_std_passed": f"not collapsed: the spread is at least {config.min_embedding_std:g} of a uniform one",
        "effective_rank_passed": "not collapsed: the effective rank is at least "
        f"{config.min_effective_rank:g}, or half of what so few images allow",
        "knn_gain_passed": "kNN top-1 is above the untrained network's"
        + (f" by more than {config.min_gain:g}" if config.min_gain else ""),
    }
    rules = [Rule(words.get(name, name.replace("_", " ")), _holds(metrics.get(name))) for name in RULES]
    now, last = metrics.get("score"), baseline.get("score")
    kept = None if now is None or last is None else now - last >= -config.tolerance
    return [*rules, Rule(f"the score is at most {config.tolerance:g} below the last blessed model's", kept)]


def _holds(value: float | None) -> bool | None:
    return None if value is None else value == 1.0


def versions(project: str) -> dict[str, str]:
    """Of what the card was made with; the model was, too, since another version of a package makes another cache key.

    Args:
        project: version of this project.
    """
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "moco": project, **packages}


def lineage(context: base_executor.BaseExecutor.Context | None, artifacts: Mapping[str, types.Artifact]) -> Lineage:
    """The ids of what the card is made from.

    Args:
        context: of the executor; None outside of a pipeline.
        artifacts: its inputs.
    """
    known = {key: Artifact(one.type_name, one.id or None, one.name or None) for key, one in artifacts.items()}
    if context is None:
        return Lineage(None, None, None, known)
    pipeline = context.pipeline_info.id if context.pipeline_info else None
    # TFX has no other way to the number of the execution.
    return Lineage(pipeline, context.pipeline_run_id or None, context._unique_id or None, known)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object in a file of any file system that TFX knows."""
    with fileio.open(path, "r") as file:
        return json.loads(file.read())
