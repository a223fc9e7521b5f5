"""Lets the stock Evaluator judge the evaluation export that lies beside the serving export, image by image.

TFX's Evaluator looks for `custom_eval_shared_model` and `custom_extractors` in the module that its `module_path` names.
"""

import os
from typing import Any

import tensorflow_model_analysis as tfma
from tensorflow_model_analysis.proto import config_pb2
from tfx.dsl.io import fileio
from tfx.utils import path_utils

from components.evaluator.batches import FixedBatches
from components.evaluator.config import EvaluateConfig
from components.evaluator.extractor import JudgeImages
from components.evaluator.metrics import read_config
from trainer_module.errors import UserError

MODULE_PATH = __name__


def custom_eval_shared_model(
    eval_saved_model_path: str, model_name: str, eval_config: config_pb2.EvalConfig, **_: Any
) -> tfma.types.EvalSharedModel:
    """Returns the evaluation export of a model for TFMA.

    Args:
        eval_saved_model_path: of the serving export, `<model>/Format-Serving`, as the Evaluator finds it.
        model_name: `candidate` or `baseline`, or empty when there is no baseline.
        eval_config: of the evaluation.
        **_: what the Evaluator passes for estimators.

    Raises:
        UserError: the export is gone.
    """
    model = os.path.dirname(eval_saved_model_path)
    if eval_saved_model_path != path_utils.serving_model_dir(model):
        raise ValueError(f"{eval_saved_model_path} is not the serving export of a model artifact")
    path = path_utils.eval_model_dir(model)
    if not fileio.exists(os.path.join(path, "saved_model.pb")):
        raise UserError(_gone(path, model_name))
    return tfma.default_eval_shared_model(eval_saved_model_path=path, model_name=model_name, eval_config=eval_config)


def custom_extractors(
    eval_shared_model: Any, eval_config: config_pb2.EvalConfig, tensor_adapter_config: Any
) -> list[tfma.extractors.Extractor]:
    """Returns TFMA's default extractors with ours: of batches, first, and of judging, before the one that makes slices,
    so that it sees eval images alone.

    Args:
        eval_shared_model: one model, or candidate and baseline.
        eval_config: of the evaluation.
        tensor_adapter_config: see TFMA.
    """
    extractors = tfma.default_extractors(
        eval_shared_model=eval_shared_model, eval_config=eval_config, tensor_adapter_config=tensor_adapter_config
    )
    config: EvaluateConfig = read_config(eval_config)
    names = {spec.name for spec in eval_config.model_specs}
    both = len(names) == 2
    judge = JudgeImages(
        config,
        candidate=tfma.CANDIDATE_KEY if both else "",
        baseline=tfma.BASELINE_KEY if both else "",
        columns=sorted({key for spec in eval_config.slicing_specs for key in spec.feature_keys}),
    )
    batches = tfma.extractors.Extractor(stage_name="FixedBatches", ptransform=FixedBatches())
    ours = tfma.extractors.Extractor(stage_name="JudgeImages", ptransform=judge)
    return [batches, *extractors[:-1], ours, extractors[-1]]


def _gone(path: str, model_name: str) -> str:
    if model_name != tfma.BASELINE_KEY:
        return f"the model's evaluation export {path} is gone; train again"
    return (
        f"the last blessed model {path} is gone, so nothing can be compared with it; restore it, or compare with the "
        "latest whose files are there, if any, by --set evaluate.missing_baseline=skip"
    )
