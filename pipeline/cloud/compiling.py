"""`./moco compile`: the pipeline as Vertex AI and Kubeflow take it. Needs no network, no credentials and no project.

TFX's KubeflowV2DagRunner writes the specification (schema 2.1 for both). What it leaves to others is added here: the
driver of ImageExampleGen, the machines, defaults of the parameters, and which stages must not be cached.
"""

import dataclasses
import json
import posixpath
import re
from typing import Any

import yaml
from tfx.dsl.components.base.base_component import BaseComponent
from tfx.dsl.components.base.base_node import BaseNode
from tfx.dsl.components.common.resolver import Resolver
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy
from tfx.orchestration.data_types import RuntimeParameter
from tfx.orchestration.kubeflow.v2 import kubeflow_v2_dag_runner
from tfx.types import Channel, standard_artifacts

from components.evaluator.record import BlessedModels, LatestOtherBlessedModel
from components.image_example_gen import vertex_driver
from components.image_example_gen.config import LATEST
from components.vertex_trainer.component import VertexTrainer
from pipeline.cloud import jobs
from pipeline.cloud.machines import machines
from pipeline.cloud.targets import Target, check
from pipeline.config import Config
from pipeline.create_pipeline import Places, Runner, create_pipeline
from trainer_module.run_fn import Experiment
from trainer_module.torch_weights import check_encoder

Spec = dict[str, Any]


def compile_pipeline(config: Config, target: Target) -> Spec:
    """Compiles the pipeline.

    Args:
        config: validated.
        target: see Target.

    Returns:
        A PipelineJob (kfp's pipeline_spec.proto) in JSON's types. Its `pipelineSpec` alone is what Kubeflow takes.

    Raises:
        UserError: the configuration lacks what the target needs, or its encoder cannot be built.
    """
    check(config, target)
    check_encoder(dataclasses.replace(config.encoder, weights=""), config.augment.size)
    config = dataclasses.replace(config, train=jobs.train_there(config.train, config.cloud))
    runner = (_Vertex if target is Target.vertex else _Kubeflow)(config)
    compiler = kubeflow_v2_dag_runner.KubeflowV2DagRunner(
        kubeflow_v2_dag_runner.KubeflowV2DagRunnerConfig(default_image=config.cloud.image, use_pipeline_spec_2_1=True)
    )
    pipeline = create_pipeline(config, runner.places, runner)
    job = compiler.run(pipeline, parameter_values=runner.defaults, write_out=False)
    job["labels"] = {**job["labels"], **jobs.labels(config.cloud)}
    job["runtimeConfig"]["parameterValues"] = runner.defaults  # as they are: TFX makes every number a float
    return _finished(job, config, runner)


def to_text(job: Spec, target: Target) -> str:
    """What is written for a target: JSON of the job, or YAML of its pipelineSpec; keys sorted."""
    if target is Target.vertex:
        return json.dumps(job, indent=2, sort_keys=True) + "\n"
    return yaml.safe_dump(job["pipelineSpec"], sort_keys=True)


class _CloudRunner(Runner):
    """What Vertex AI and Kubeflow have in common."""

    uncached: tuple[str, ...] = ()  # stages whose result may differ though their inputs do not

    def __init__(self, config: Config) -> None:
        cloud = config.cloud
        self._config = config
        self.name = f"moco-{re.sub('[^a-z0-9-]+', '-', config.name.lower())}"
        self.places = Places(
            cloud.root,
            config.publish.to or posixpath.join(cloud.root, "serving", "encoder"),
            config.train.checkpoints or posixpath.join(cloud.root, "checkpoints"),
        )
        self.images = RuntimeParameter("images", ptype=str)
        self.span = RuntimeParameter("span", ptype=str)
        self.beam_arguments = jobs.beam_arguments(cloud, cloud.project or jobs.VERTEX_PROJECT)
        self.defaults: dict[str, str | int] = {"span": LATEST, "epochs": config.train.epochs}
        if cloud.images:
            self.defaults["images"] = cloud.images

    def weights(self, path: str) -> str:
        """The path, since the file is in a bucket that cannot be reached here; so other weights need another name."""
        return path

    def trainer(self, experiment: Experiment, views: Channel, transform_graph: Channel) -> BaseComponent:
        """A custom job of Vertex AI, from either orchestrator: it alone offers TPUs with a restart."""
        cloud = self._config.cloud
        return VertexTrainer(
            examples=views,
            transform_graph=transform_graph,
            experiment=experiment,
            epochs=RuntimeParameter("epochs", ptype=int),
            job=jobs.custom_job(cloud, f"{self.name}-train"),
            region=cloud.region,
            hosts=machines(cloud.trainer).hosts,
        )


class _Vertex(_CloudRunner):
    """Vertex AI Pipelines."""

    def baseline(self, config: Config, candidate: Channel) -> BaseNode:
        """The latest blessed model by Vertex's own resolver, the only kind that it has; see Evaluator's executor."""
        del config, candidate
        return Resolver(
            strategy_class=LatestBlessedModelStrategy,
            model=Channel(type=standard_artifacts.Model),
            model_blessing=Channel(type=standard_artifacts.ModelBlessing),
        )


class _Kubeflow(_CloudRunner):
    """Kubeflow Pipelines: no resolvers, and no driver before the cache is asked."""

    uncached = ("ImageExampleGen", "BaselineResolver")

    def baseline(self, config: Config, candidate: Channel) -> BaseNode:
        """The latest blessed model but the candidate, by the record below the pipeline's root."""
        return LatestOtherBlessedModel(
            candidate=candidate, record=self._record, missing=config.evaluate.missing_baseline
        )

    def after_blessing(self, candidate: Channel, blessing: Channel) -> list[BaseComponent]:
        """Writes that record."""
        return [BlessedModels(model=candidate, blessing=blessing, record=self._record).with_id("BlessedModels")]

    @property
    def _record(self) -> str:
        return posixpath.join(self._config.cloud.root, "blessed", self.name)


def _finished(job: Spec, config: Config, runner: _CloudRunner) -> Spec:
    spec, worker = job["pipelineSpec"], config.cloud.worker
    spec["defaultPipelineRoot"] = config.cloud.root
    for key, value in runner.defaults.items():
        spec["root"]["inputDefinitions"]["parameters"][key] |= {"defaultValue": value, "isOptional": True}
    for executor in spec["deploymentSpec"]["executors"].values():
        if container := executor.get("container"):
            container["resources"] = {"cpuLimit": worker.cpus, "memoryLimit": worker.memory_gb}
    images = spec["deploymentSpec"]["executors"]["ImageExampleGen_executor"]["container"]
    images["lifecycle"]["preCacheCheck"]["command"] = ["python", "-m", vertex_driver.__name__]
    for task in runner.uncached:
        spec["root"]["dag"]["tasks"][task]["cachingOptions"] = {}
    return job
