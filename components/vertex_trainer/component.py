"""VertexTrainer, the component: TFX's Trainer, whose training is a custom job of Vertex AI."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.extensions.google_cloud_ai_platform import constants
from tfx.extensions.google_cloud_ai_platform.trainer.executor import TRAINING_ARGS_KEY
from tfx.orchestration.data_types import RuntimeParameter
from tfx.proto import trainer_pb2
from tfx.types import standard_artifacts
from tfx.types.component_spec import ExecutionParameter
from tfx.types.standard_component_specs import TrainerSpec as StockSpec
from tfx.utils import json_utils

from components.vertex_trainer.executor import EPOCHS, HOSTS, Executor
from trainer_module import run_fn
from trainer_module.run_fn import Experiment


class VertexTrainerSpec(StockSpec):
    """The stock Trainer's, and the number of epochs, which a run may set."""

    PARAMETERS: ClassVar = {**StockSpec.PARAMETERS, EPOCHS: ExecutionParameter(type=int)}


class VertexTrainer(base_component.BaseComponent):
    """Starts a custom job of Vertex AI that trains, waits for it, and fails if it fails.

    It is TFX's `tfx.extensions.google_cloud_ai_platform.Trainer` and not a task of the pipeline with an accelerator:
    such a task has neither a slice's topology, nor several hosts, nor spot machines with a restart.

    Outputs `model` and `model_run`: the stock Trainer's.
    """

    SPEC_CLASS = VertexTrainerSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(Executor)

    def __init__(
        self,
        *,
        examples: types.BaseChannel,
        transform_graph: types.BaseChannel,
        experiment: Experiment,
        epochs: int | RuntimeParameter,
        job: Mapping[str, Any],
        region: str,
        hosts: int,
    ):
        """Makes the node.

        Args:
            examples: of ViewAugmenter.
            transform_graph: of Transform.
            experiment: what is trained; its checkpoints name the folder below which each training has its own.
            epochs: takes the place of the experiment's.
            job: google.cloud.aiplatform_v1.types.CustomJob as a dictionary, with the `project` it belongs to.
            region: of the job.
            hosts: machines of the job that work together, one of which coordinates, see components.vertex_trainer.host.
        """
        told = {
            **experiment.to_custom_config(),
            HOSTS: hosts,
            TRAINING_ARGS_KEY: dict(job),
            constants.ENABLE_VERTEX_KEY: True,
            constants.VERTEX_REGION_KEY: region,
        }
        super().__init__(
            VertexTrainerSpec(
                run_fn=f"{run_fn.__name__}.run_fn",
                examples=examples,
                transform_graph=transform_graph,
                # The loop counts epochs, not TFX's steps; views exist of the train split alone.
                train_args=trainer_pb2.TrainArgs(splits=["train"]),
                eval_args=trainer_pb2.EvalArgs(splits=["train"]),
                custom_config=json_utils.dumps(told),
                epochs=epochs,
                model=types.Channel(type=standard_artifacts.Model),
                model_run=types.Channel(type=standard_artifacts.ModelRun),
            )
        )
