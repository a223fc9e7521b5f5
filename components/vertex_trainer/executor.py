"""What VertexTrainer's container does: it starts the custom job and waits for its end."""

import argparse
import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from tfx import types
from tfx.components.trainer.executor import GenericExecutor as Training
from tfx.extensions.google_cloud_ai_platform.trainer import executor
from tfx.types import artifact_utils
from tfx.types.standard_component_specs import CUSTOM_CONFIG_KEY, EXAMPLES_KEY, TRANSFORM_GRAPH_KEY
from tfx.utils import json_utils

from components.vertex_trainer import host
from trainer_module.checkpoints import clear
from trainer_module.driver import RESULT_FILE
from trainer_module.errors import UserError
from trainer_module.run_fn import LOGS, Experiment

EPOCHS = "epochs"  # execution property
HOSTS = host.HOSTS
_INPUTS = (EXAMPLES_KEY, TRANSFORM_GRAPH_KEY)


class Executor(executor.GenericExecutor):
    """TFX's, with the parameters of the run in the job's configuration, and checkpoints of its own for each training.

    A job that begins again, since a spot machine was taken back, finds its checkpoints; so does a new run of the
    pipeline with the same settings and the same views, after one that failed. Others never meet them.
    """

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See the base class.

        Raises:
            UserError: the job has no project.
        """
        told = json_utils.loads(exec_properties[CUSTOM_CONFIG_KEY])
        seen = [artifact_utils.get_single_uri(input_dict[key]) for key in _INPUTS]
        experiment = of_this_run(Experiment.from_custom_config(told), exec_properties[EPOCHS], seen)
        told |= experiment.to_custom_config()
        job = told[executor.TRAINING_ARGS_KEY]
        job["project"] = job["project"] or _project(self._extra_flags or [])
        super().Do(input_dict, output_dict, {**exec_properties, CUSTOM_CONFIG_KEY: json_utils.dumps(told)})
        clear(experiment.checkpoints, LOGS, RESULT_FILE)

    def _GetExecutorClass(self) -> type[Training]:
        return host.Executor


def of_this_run(experiment: Experiment, epochs: int, inputs: Sequence[str]) -> Experiment:
    """The experiment with the epochs of this run and a folder of checkpoints that no other training has.

    Args:
        experiment: as compiled.
        epochs: of this run.
        inputs: URIs of what it is trained on.
    """
    changed = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, epochs=epochs))
    folder = posixpath.join(experiment.checkpoints, _digest(changed.identity(), inputs))
    return dataclasses.replace(changed, checkpoints=folder)


def _digest(identity: Mapping[str, Any], inputs: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([identity, inputs], sort_keys=True).encode()).hexdigest()[:16]


def _project(flags: Sequence[str]) -> str:
    """The project in which the pipeline runs, which Vertex fills into the container's arguments."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--project", default="")
    project = parser.parse_known_args(flags)[0].project
    if not project:
        raise UserError("cloud.project is empty, so the training job belongs to no project; set it and compile again")
    return project
