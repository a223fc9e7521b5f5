"""The pipeline: what feeds what. It depends on its arguments and our sources; what runs where is the runner's."""

import abc
import dataclasses

from ml_metadata.proto import metadata_store_pb2
from tfx.components import ExampleValidator, SchemaGen, StatisticsGen, Trainer, Transform
from tfx.dsl.components.base.base_component import BaseComponent
from tfx.dsl.components.base.base_node import BaseNode
from tfx.dsl.components.common.resolver import Resolver
from tfx.orchestration.data_types import RuntimeParameter
from tfx.orchestration.pipeline import Pipeline
from tfx.proto import pusher_pb2, trainer_pb2, transform_pb2
from tfx.types import Channel, standard_artifacts

from components.evaluator import eval_model
from components.evaluator.baseline import LatestOtherBlessedModelStrategy
from components.evaluator.component import Evaluator
from components.evaluator.eval_config import make_eval_config
from components.image_example_gen.component import ImageExampleGen
from components.model_card.component import ModelCard
from components.pusher import executor as pusher_executor
from components.pusher.component import Pusher
from components.serving_check.component import ServingCheck
from components.transform import preprocessing
from components.transform.statistics import stats_options
from components.view_augmenter.component import ViewAugmenter
from pipeline import __version__, fingerprint
from pipeline.config import Config, flatten
from trainer_module import run_fn
from trainer_module.config import is_conduct
from trainer_module.run_fn import Experiment
from trainer_module.torch_weights import digest

_NOT_OF_THE_MODEL = ("beam.", "cloud.")  # where its stages ran


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a runner keeps things.

    Attributes:
        root: folder of the artifacts.
        serving: place of publication, a folder or gs://BUCKET/PATH.
        checkpoints: folder of the training checkpoints, which outlives a failed execution.
    """

    root: str
    serving: str
    checkpoints: str


class Runner(abc.ABC):
    """What the orchestrators differ in.

    Attributes:
        name: of the pipeline.
        images: folder, file or glob of the images, see components.image_example_gen.sources; or a run's parameter.
        span: which span of them, a run's parameter; None for the latest.
        metadata: connection to ML Metadata; None where the orchestrator brings its own.
        beam_arguments: flags for Beam; the runner is named there.
    """

    name: str
    images: str | RuntimeParameter
    span: RuntimeParameter | None = None
    metadata: metadata_store_pb2.ConnectionConfig | None = None
    beam_arguments: tuple[str, ...] = ()

    def weights(self, path: str) -> str:
        """What stands for a file of initial weights in the Trainer's cache key: its content."""
        return digest(path)

    @abc.abstractmethod
    def trainer(self, experiment: Experiment, views: Channel, transform_graph: Channel) -> BaseComponent:
        """The node that trains; its outputs are the stock Trainer's."""

    @abc.abstractmethod
    def baseline(self, config: Config, candidate: Channel) -> BaseNode:
        """The node whose output `model` is the latest blessed model other than the candidate, if there is one."""

    def after_blessing(self, candidate: Channel, blessing: Channel) -> list[BaseComponent]:
        """What this runner adds so that a later run finds the model."""
        del candidate, blessing
        return []


class LocalRunner(Runner):
    """This machine: TFX's own Trainer, and a strategy of ours on its ML Metadata.

    For pipeline.local, which tells the Trainer what is not in its cache key.
    """

    name = "moco"

    def __init__(
        self, images: str, metadata: metadata_store_pb2.ConnectionConfig, beam_arguments: tuple[str, ...]
    ) -> None:
        """See the attributes of the base class."""
        self.images, self.metadata, self.beam_arguments = images, metadata, beam_arguments

    def trainer(self, experiment: Experiment, views: Channel, transform_graph: Channel) -> BaseComponent:
        """See the base class."""
        return Trainer(
            run_fn=f"{run_fn.__name__}.run_fn",
            examples=views,
            transform_graph=transform_graph,
            # The loop counts epochs, not TFX's steps; views exist of the train split alone.
            train_args=trainer_pb2.TrainArgs(splits=["train"]),
            eval_args=trainer_pb2.EvalArgs(splits=["train"]),
            custom_config=experiment.cache_key(),  # see pipeline.local: the executor gets the experiment itself
        )

    def baseline(self, config: Config, candidate: Channel) -> BaseNode:
        """See the base class."""
        return Resolver(
            strategy_class=LatestOtherBlessedModelStrategy,
            config={"missing": config.evaluate.missing_baseline.value},
            candidate=candidate,
            model=Channel(type=standard_artifacts.Model),
            model_blessing=Channel(type=standard_artifacts.ModelBlessing),
        )


def create_pipeline(config: Config, places: Places, runner: Runner) -> Pipeline:
    """Builds the pipeline.

    Args:
        config: a validated configuration.
        places: of the artifacts.
        runner: decides where each stage runs.
    """
    code = _code()
    example_gen = ImageExampleGen(
        runner.images, config.ingest, code=code["ImageExampleGen"], range_config=runner.span
    ).with_id("ImageExampleGen")
    examples = example_gen.outputs["examples"]
    statistics_gen = StatisticsGen(examples, stats_options=stats_options()).with_id("StatisticsGen")
    # The schema knows the labels of the train split only, so a new label in the eval split is an anomaly.
    schema_gen = SchemaGen(statistics=statistics_gen.outputs["statistics"], exclude_splits=["eval"]).with_id(
        "SchemaGen"
    )
    schema = schema_gen.outputs["schema"]
    validator = ExampleValidator(statistics=statistics_gen.outputs["statistics"], schema=schema).with_id(
        "ExampleValidator"
    )
    # How an image is embedded has no part in how it is stored, so it must not remake what is stored.
    storage = dataclasses.replace(config.image, eval_resize=0)
    transform = Transform(
        examples=examples,
        schema=schema,
        preprocessing_fn=f"{preprocessing.__name__}.preprocessing_fn",
        custom_config=preprocessing.make_custom_config(storage, code["Transform"]),
        splits_config=transform_pb2.SplitsConfig(analyze=["train"], transform=["train", "eval"]),
        materialize=False,
        disable_statistics=True,
    ).with_id("Transform")
    augmenter = ViewAugmenter(
        examples=examples,
        image=storage,
        augment=config.augment,
        seed=config.seed,
        sample=config.train.watch.sample,
        code=code["ViewAugmenter"],
    ).with_id("ViewAugmenter")
    experiment = make_experiment(config, places, runner.weights(config.encoder.weights))
    trainer = runner.trainer(experiment, augmenter.outputs["views"], transform.outputs["transform_graph"]).with_id(
        "Trainer"
    )
    model = trainer.outputs["model"]
    baseline = runner.baseline(config, model).with_id("BaselineResolver")
    evaluator = Evaluator(
        examples=examples,
        model=model,
        baseline_model=baseline.outputs["model"],
        example_splits=["train", "eval"],
        eval_config=make_eval_config(config.evaluate, code["Evaluator"]),
        module_path=eval_model.MODULE_PATH,
    ).with_id("Evaluator")
    serving_check = ServingCheck(
        model=model,
        model_run=trainer.outputs["model_run"],
        config=config.serving_check,
        precision=config.train.precision,
        code=code["ServingCheck"],
    ).with_id("ServingCheck")
    model_card = ModelCard(
        model=model,
        model_run=trainer.outputs["model_run"],
        examples=examples,
        evaluation=evaluator.outputs["evaluation"],
        blessing=evaluator.outputs["blessing"],
        name=config.name,
        statement=config.card,
        config={
            key: value
            for key, value in flatten(config).items()
            if not (key.startswith(_NOT_OF_THE_MODEL) or is_conduct(key))  # a model from the cache may know of others
        },
        code=code,
        project=__version__,
    ).with_id("ModelCard")
    # Given no model, it publishes the one that was checked, with the warm-up requests that lie beside it.
    pusher = Pusher(
        model_blessing=evaluator.outputs["blessing"],
        infra_blessing=serving_check.outputs["blessing"],
        model_card=model_card.outputs["model_card"],
        push_destination=pusher_pb2.PushDestination(
            filesystem=pusher_pb2.PushDestination.Filesystem(base_directory=places.serving)
        ),
        custom_config={pusher_executor.KEEP: config.publish.keep, "code": code["Pusher"]},
    ).with_id("Pusher")
    return Pipeline(
        pipeline_name=runner.name,
        pipeline_root=places.root,
        components=[
            example_gen,
            statistics_gen,
            schema_gen,
            validator,
            transform,
            augmenter,
            trainer,
            baseline,
            evaluator,
            *runner.after_blessing(model, evaluator.outputs["blessing"]),
            serving_check,
            model_card,
            pusher,
        ],
        enable_cache=True,
        metadata_connection_config=runner.metadata,
        beam_pipeline_args=[*runner.beam_arguments],
    )


def make_experiment(config: Config, places: Places, weights: str) -> Experiment:
    """What the Trainer is told.

    Args:
        config: validated.
        places: of the artifacts.
        weights: what stands for the initial weights in the cache key.
    """
    return Experiment(
        image=config.image,
        augment=config.augment,
        encoder=config.encoder,
        train=config.train,
        seed=config.seed,
        checkpoints=places.checkpoints,
        code=fingerprint.of(run_fn.__name__) + weights,
    )


def _code() -> dict[str, str]:
    """Fingerprints of the sources of each stage whose code is ours."""
    return {
        "ImageExampleGen": fingerprint.of("components.image_example_gen.component"),
        "Transform": fingerprint.of(preprocessing.__name__),
        "ViewAugmenter": fingerprint.of("components.view_augmenter.component"),
        "Trainer": fingerprint.of(run_fn.__name__),
        "Evaluator": fingerprint.of(
            "components.evaluator.component", "components.evaluator.eval_config", eval_model.MODULE_PATH
        ),
        "ServingCheck": fingerprint.of("components.serving_check.component", "components.serving_check.probe"),
        "ModelCard": fingerprint.of("components.model_card.component"),
        "Pusher": fingerprint.of("components.pusher.component"),
    }
