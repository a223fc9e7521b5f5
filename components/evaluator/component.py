"""Evaluator, the component: TFX's, which is not compared with itself or with nothing."""

from typing import Any

from tfx import types
from tfx.components.evaluator import component, executor
from tfx.dsl.components.base import executor_spec
from tfx.types.standard_component_specs import BASELINE_MODEL_KEY, MODEL_KEY

from components.evaluator.baseline import NONE


class Executor(executor.Executor):
    """TFX's, without a baseline where the service resolved the candidate itself, or nothing.

    Vertex AI resolves the latest blessed model, which in a run that repeats an earlier one is the candidate: it was
    compared with its predecessor then. It is TFX's by inheritance, since the container tells by it that the blessing is
    to name its model, without which no later run finds it.
    """

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See the base class."""
        candidates = {model.uri for model in input_dict[MODEL_KEY]}
        others = [
            model
            for model in input_dict.get(BASELINE_MODEL_KEY, [])
            if model.uri not in candidates and not model.get_int_custom_property(NONE)
        ]
        super().Do({**input_dict, BASELINE_MODEL_KEY: others}, output_dict, exec_properties)


class Evaluator(component.Evaluator):
    """TFX's Evaluator with the executor above."""

    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(Executor)
