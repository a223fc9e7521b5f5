"""For whom a pipeline is compiled, and what each must be told. Imports no TFX, so that a refusal is quick."""

import enum

from components.evaluator.config import MissingBaseline
from pipeline.cloud.machines import machines
from pipeline.config import Config
from trainer_module.config import StrategyKind
from trainer_module.errors import UserError

_LONGEST_NAME = 58  # TFX takes 63 characters for a pipeline's, which begins with "moco-"


class Target(enum.Enum):
    """For whom a pipeline is compiled."""

    vertex = "vertex"  # a PipelineJob as JSON
    kubeflow = "kubeflow"  # a PipelineSpec as YAML

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of its file."""
        return {Target.vertex: (".json",), Target.kubeflow: (".yaml", ".yml")}[self]


def check(config: Config, target: Target) -> None:
    """Refuses what a pipeline would only find out in the cloud.

    Raises:
        UserError: the first of it.
    """
    cloud = config.cloud
    needed = {"cloud.root": (cloud.root, "gs://BUCKET/moco"), "cloud.image": (cloud.image, "REGION-docker.pkg.dev/…")}
    if machines(cloud.trainer).tpu:
        needed["cloud.tpu_image"] = (cloud.tpu_image, "REGION-docker.pkg.dev/…")
    if target is Target.kubeflow:  # Vertex knows in which project it runs
        needed["cloud.project"] = (cloud.project, "my-project")
    for key, (value, example) in needed.items():
        if not value:
            raise UserError(f"{key} is empty, and --target {target.value} needs it; e.g. {key}={example}")
    if len(config.name) > _LONGEST_NAME:
        raise UserError(
            f"name={config.name}: --target {target.value} has room for {_LONGEST_NAME} characters of a configuration's "
            f"name or its file's; e.g. name={config.name[:_LONGEST_NAME].rstrip('-._')}"
        )
    places = {
        "publish.to": config.publish.to,
        "train.checkpoints": config.train.checkpoints,
        "encoder.weights": config.encoder.weights,
    }
    for key, place in places.items():
        if place and not place.startswith("gs://"):
            raise UserError(f"{key}={place} is on this machine, where no stage of --target {target.value} runs; gs://…")
    own_tpu = config.train.strategy is StrategyKind.tpu and config.train.tpu.name in ("", "local")
    if own_tpu and not machines(cloud.trainer).tpu:
        raise UserError(
            "train.strategy=tpu, and cloud.trainer has no TPU; e.g. cloud.trainer.machine_type=ct5lp-hightpu-8t and "
            "cloud.trainer.topology=2x4, or train.strategy=auto"
        )
    if target is Target.vertex and config.evaluate.missing_baseline is MissingBaseline.skip:
        raise UserError(
            "evaluate.missing_baseline=skip: Vertex AI resolves the latest blessed model by itself and looks at no "
            "files; e.g. evaluate.missing_baseline=refuse"
        )
