"""What ModelCard takes and gives."""

from typing import ClassVar

from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter

from components.model_card import artifact


class ModelCardSpec(ComponentSpec):
    """All that is known of a model in, its card out; the parameters are JSON texts, see the component."""

    PARAMETERS: ClassVar = {
        "name": ExecutionParameter(type=str),
        "statement": ExecutionParameter(type=str),
        "config": ExecutionParameter(type=str),
        "code": ExecutionParameter(type=str),
        "project": ExecutionParameter(type=str),
    }
    INPUTS: ClassVar = {
        "model": ChannelParameter(type=standard_artifacts.Model),
        "model_run": ChannelParameter(type=standard_artifacts.ModelRun),
        "examples": ChannelParameter(type=standard_artifacts.Examples),
        "evaluation": ChannelParameter(type=standard_artifacts.ModelEvaluation),
        "blessing": ChannelParameter(type=standard_artifacts.ModelBlessing),
    }
    OUTPUTS: ClassVar = {"model_card": ChannelParameter(type=artifact.ModelCard)}
