"""What the stages before have left of a model in files and metadata, read for its card."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import tensorflow_model_analysis as tfma
from tfx import types
from tfx.components.evaluator.constants import ARTIFACT_PROPERTY_BLESSED_KEY
from tfx.components.example_gen import utils
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio

from components.evaluator.eval_config import (
    read_confusion,
    read_intervals,
    read_notes,
    read_rules,
    read_validation,
)
from components.model_card.card import Artifact, Data, Evaluation, Figure, Lineage, Rule, Training
from components.model_card.metrics import make_metrics
from components.model_card.pictures import recall
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


def read_data(examples: types.Artifact) -> Data:
    """The images, by the files and the metadata of ImageExampleGen's `examples`."""
    counts = read_json(f"{examples.uri}/{_INGEST_FILE}")
    labels, manifest = counts.pop("labels"), counts.pop("manifest", None)
    span, version = (
        examples.get_int_custom_property(name) if examples.has_custom_property(name) else None
        for name in (utils.SPAN_PROPERTY_NAME, utils.VERSION_PROPERTY_NAME)
    )
    fingerprint = examples.get_string_custom_property(utils.FINGERPRINT_PROPERTY_NAME)
    return Data(span, version, fingerprint or None, manifest, counts, labels)


def read_training(model_run: types.Artifact, config: Mapping[str, Any]) -> Training:
    """What the Trainer did.

    Args:
        model_run: of the Trainer.
        config: {"train.epochs": 200, …}.
    """
    result = read_json(f"{model_run.uri}/{TRAINING_FILE}")
    return Training(
        steps=result["steps"],
        epochs=result.get("epochs", config["train.epochs"]),
        global_batch=config["train.global_batch"],
        replicas=result["replicas"],
        strategy=result["strategy"],
        key_bn=config["train.key_bn.mode"],
        final_loss=result["final_loss"],
        pretext_top1=result["pretext_top1"],
        alignment=result["alignment"],
        alarms=result.get("alarms"),
    )


def read_evaluation(evaluation: types.Artifact, blessing: types.Artifact) -> Evaluation:
    """What the Evaluator found, by its outputs."""
    figures, baseline = (
        {name: Figure(*estimate) for name, estimate in read_intervals(evaluation.uri, model).items()}
        for model in (tfma.CANDIDATE_KEY, tfma.BASELINE_KEY)
    )
    return Evaluation(
        blessed=blessing.get_int_custom_property(ARTIFACT_PROPERTY_BLESSED_KEY) == 1,
        reasons=tuple(reason.removeprefix("not blessed: ") for reason in read_validation(evaluation.uri)),
        rules=tuple(Rule(*rule) for rule in read_rules(evaluation.uri)),
        notes=tuple(read_notes(evaluation.uri)),
        metrics=make_metrics(figures, baseline),
        recall=tuple(recall(*read_confusion(evaluation.uri))),
    )


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
