"""ServingCheck, the component."""

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.types import standard_artifacts

from components.serving_check.config import ServingCheckConfig
from components.serving_check.executor import Executor
from components.serving_check.spec import ServingCheckSpec
from trainer_module import config_json
from trainer_module.config import Precision


class ServingCheck(base_component.BaseComponent):
    """Blesses a model that answers, in a process with TensorFlow alone, as the trainer's own network does.

    Example:
        check = ServingCheck(model=trainer.outputs["model"], model_run=trainer.outputs["model_run"])
        Pusher(model_blessing=evaluator.outputs["blessing"], infra_blessing=check.outputs["blessing"], ...)

    It needs no docker. Where there is docker or Kubernetes, TFX's InfraValidator does the same with a real server, and
    emits the same artifact.

    Output `blessing`: InfraBlessing with the stock InfraValidator's files and properties: INFRA_BLESSED or
    INFRA_NOT_BLESSED, `blessed`, `has_model`. A blessed one holds the model with TensorFlow Serving's warm-up
    requests beside it, of drawn pictures; a Pusher that is given no `model` publishes it. serving_check.json has
    reasons and figures.
    """

    SPEC_CLASS = ServingCheckSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(Executor)

    def __init__(
        self,
        model: types.BaseChannel,
        model_run: types.BaseChannel,
        config: ServingCheckConfig = ServingCheckConfig(),
        precision: Precision = Precision.float32,
        code: str = "",
    ):
        """Makes the node.

        Args:
            model: of the Trainer.
            model_run: of the same Trainer; it holds real images with the embeddings that its network gave.
            config: limits.
            precision: of the network's activations.
            code: fingerprint of the code; it takes part in the cache key and in nothing else.
        """
        super().__init__(
            ServingCheckSpec(
                model=model,
                model_run=model_run,
                config=config_json.dumps(config),
                precision=precision.name,
                code=code,
                blessing=types.Channel(type=standard_artifacts.InfraBlessing),
            )
        )
