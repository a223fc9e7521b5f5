"""What ServingCheck takes and gives."""

from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter


class ServingCheckSpec(ComponentSpec):
    """A model and what its training left in, an InfraBlessing out; configurations are texts of config_json."""

    PARAMETERS = {  # noqa: RUF012
        "config": ExecutionParameter(type=str),
        "precision": ExecutionParameter(type=str),
        "code": ExecutionParameter(type=str),
    }
    INPUTS = {  # noqa: RUF012
        "model": ChannelParameter(type=standard_artifacts.Model),
        "model_run": ChannelParameter(type=standard_artifacts.ModelRun),
    }
    OUTPUTS = {"blessing": ChannelParameter(type=standard_artifacts.InfraBlessing)}  # noqa: RUF012
