"""What ViewAugmenter takes and gives."""

from typing import ClassVar

from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter


class ViewAugmenterSpec(ComponentSpec):
    """Examples in, views out; the configurations are JSON texts of trainer_module.config_json."""

    PARAMETERS: ClassVar = {
        "image": ExecutionParameter(type=str),
        "augment": ExecutionParameter(type=str),
        "sample": ExecutionParameter(type=str),
        "seed": ExecutionParameter(type=int),
        "code": ExecutionParameter(type=str),
    }
    INPUTS: ClassVar = {"examples": ChannelParameter(type=standard_artifacts.Examples)}
    OUTPUTS: ClassVar = {"views": ChannelParameter(type=standard_artifacts.Examples)}
