"""The record of blessed models, for orchestrators that cannot be asked for the latest one.

Kubeflow Pipelines of the open source runs no resolvers ("resolver not implemented yet", its argocompiler/argo.go). So a
stage after the Evaluator writes each blessed model into a folder, one small file each, named so that they sort by
time, or after the last one where the clock was put back, and a stage before it reads there.
"""

import hashlib
import json
import posixpath
import time
from typing import Any, ClassVar

from tfx import types
from tfx.components.evaluator.constants import ARTIFACT_PROPERTY_BLESSED_KEY
from tfx.dsl.components.base import base_component, base_executor, executor_spec
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter
from tfx.utils import io_utils, path_utils

from components.evaluator.baseline import NONE
from components.evaluator.config import MissingBaseline

_EXPORT = "saved_model.pb"


class BlessedModelsSpec(ComponentSpec):
    """A model, its blessing, and the folder of the record."""

    PARAMETERS: ClassVar = {"record": ExecutionParameter(type=str)}
    INPUTS: ClassVar = {
        "model": ChannelParameter(type=standard_artifacts.Model),
        "blessing": ChannelParameter(type=standard_artifacts.ModelBlessing),
    }
    OUTPUTS: ClassVar[dict[str, ChannelParameter]] = {}


class BlessedModelsExecutor(base_executor.BaseExecutor):
    """See BlessedModels."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See the base class."""
        self._log_startup(input_dict, output_dict, exec_properties)
        blessing = artifact_utils.get_single_instance(input_dict["blessing"])
        uri = artifact_utils.get_single_uri(input_dict["model"])
        record = exec_properties["record"]
        if blessing.get_int_custom_property(ARTIFACT_PROPERTY_BLESSED_KEY) and blessed_models(record)[:1] != [uri]:
            fileio.makedirs(record)
            newest = max((int(name.partition("-")[0]) for name in fileio.listdir(record)), default=0)
            moment = max(time.time_ns(), newest + 1)
            name = f"{moment:020d}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.json"
            io_utils.write_string_file(posixpath.join(record, name), json.dumps({"model": uri}))


class BlessedModels(base_component.BaseComponent):
    """Writes a blessed model into the record."""

    SPEC_CLASS = BlessedModelsSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(BlessedModelsExecutor)

    def __init__(self, *, model: types.BaseChannel, blessing: types.BaseChannel, record: str):
        """Makes the node.

        Args:
            model: of the Trainer.
            blessing: of the Evaluator.
            record: folder, local or on gs://.
        """
        super().__init__(BlessedModelsSpec(model=model, blessing=blessing, record=record))


class LatestOtherBlessedModelSpec(ComponentSpec):
    """A candidate and the folder of the record to a model."""

    PARAMETERS: ClassVar = {"record": ExecutionParameter(type=str), "missing": ExecutionParameter(type=str)}
    INPUTS: ClassVar = {"candidate": ChannelParameter(type=standard_artifacts.Model)}
    OUTPUTS: ClassVar = {"model": ChannelParameter(type=standard_artifacts.Model)}


class LatestOtherBlessedModelExecutor(base_executor.BaseExecutor):
    """See LatestOtherBlessedModel."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See the base class."""
        self._log_startup(input_dict, output_dict, exec_properties)
        candidate = artifact_utils.get_single_uri(input_dict["candidate"])
        model = artifact_utils.get_single_instance(output_dict["model"])
        missing = MissingBaseline(exec_properties["missing"])
        others = (uri for uri in blessed_models(exec_properties["record"]) if uri != candidate)
        found = next((uri for uri in others if missing is MissingBaseline.refuse or _is_there(uri)), None)
        if found is None:
            model.set_int_custom_property(NONE, 1)
        else:
            model.uri = found


class LatestOtherBlessedModel(base_component.BaseComponent):
    """What LatestOtherBlessedModelStrategy finds in ML Metadata, found in the record.

    Output `model`: the model, by its URI; with the custom property `none` where there is no other one.
    """

    SPEC_CLASS = LatestOtherBlessedModelSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(LatestOtherBlessedModelExecutor)

    def __init__(self, *, candidate: types.BaseChannel, record: str, missing: MissingBaseline):
        """Makes the node.

        Args:
            candidate: of the Trainer.
            record: folder, local or on gs://.
            missing: what is done where the files of the latest are gone.
        """
        super().__init__(
            LatestOtherBlessedModelSpec(
                candidate=candidate,
                record=record,
                missing=missing.value,
                model=types.Channel(type=standard_artifacts.Model),
            )
        )


def blessed_models(record: str) -> list[str]:
    """URIs of the blessed models, newest first.

    Args:
        record: folder of the record; may be missing.
    """
    names = sorted(fileio.listdir(record), reverse=True) if fileio.exists(record) else []
    return [json.loads(io_utils.read_string_file(posixpath.join(record, name)))["model"] for name in names]


def _is_there(model: str) -> bool:
    return fileio.exists(posixpath.join(path_utils.eval_model_dir(model), _EXPORT))
