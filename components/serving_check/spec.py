"""What ServingCheck takes and gives."""

from typing import ClassVar

from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter


class ServingCheckSpec(ComponentSpec):
    """A model and what its training left in, an InfraBlessing out; configurations are texts of config_json."""

    PARAMETERS: ClassVar = {
        "config": ExecutionParameter(type=str),
        "precision": ExecutionParameter(type=str),
        "code": ExecutionParameter(type=str),
    }
    INPUTS: ClassVar = {
        "model": ChannelParameter(type=standard_artifacts.Model),
        "model_run": ChannelParameter(type=standard_artifacts.ModelRun),
    }
    OUTPUTS: ClassVar = {"blessing": ChannelParameter(type=standard_artifacts.InfraBlessing)}
