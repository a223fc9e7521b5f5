"""Lets the stock Evaluator judge the evaluation export that lies beside the serving export.

TFX's Evaluator looks for `custom_eval_shared_model` in the module that its `module_path` names.
"""

import os
from typing import Any

import tensorflow_model_analysis as tfma
from tfx.utils import path_utils

MODULE_PATH = __name__


def custom_eval_shared_model(
    eval_saved_model_path: str, model_name: str, eval_config: tfma.EvalConfig, **_: Any
) -> tfma.types.EvalSharedModel:
    """Returns the evaluation export of a model for TFMA.

    Args:
        eval_saved_model_path: of the serving export, `<model>/Format-Serving`, as the Evaluator finds it.
        model_name: `candidate` or `baseline`, or empty when there is no baseline.
        eval_config: of the evaluation.
        **_: what the Evaluator passes for estimators.
    """
    model = os.path.dirname(eval_saved_model_path)
    if eval_saved_model_path != path_utils.serving_model_dir(model):
        raise ValueError(f"{eval_saved_model_path} is not the serving export of a model artifact")
    return tfma.default_eval_shared_model(
        eval_saved_model_path=path_utils.eval_model_dir(model), model_name=model_name, eval_config=eval_config
    )
