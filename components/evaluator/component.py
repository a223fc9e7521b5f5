"""Evaluator, the component: TFX's, which compares no model with itself or with nothing, and says why it blesses."""

import json
import posixpath
from typing import Any

from tfx import types
from tfx.components.evaluator import component, executor
from tfx.dsl.components.base import executor_spec
from tfx.types import artifact_utils
from tfx.types.standard_component_specs import BASELINE_MODEL_KEY, BLESSING_KEY, EVALUATION_KEY, MODEL_KEY
from tfx.utils import io_utils

from components.evaluator.baseline import NONE
from components.evaluator.eval_config import read_rules

RULES_FILE = "rules.json"  # in the blessing, beside TFX's own mark


class Executor(executor.Executor):
    """TFX's, with each rule's outcome in the blessing, and without a baseline where none was resolved.

    The rules are a list of {"name": …, "holds": true, false or null where a rule does not apply, "text": …}.

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
        evaluation, blessing = (
            artifact_utils.get_single_instance(output_dict[key]).uri for key in (EVALUATION_KEY, BLESSING_KEY)
        )
        rules = [rule._asdict() for rule in read_rules(evaluation)]
        io_utils.write_string_file(posixpath.join(blessing, RULES_FILE), json.dumps(rules, indent=2) + "\n")


class Evaluator(component.Evaluator):
    """TFX's Evaluator with the executor above."""

    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(Executor)
