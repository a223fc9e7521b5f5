"""What the TFX Trainer calls: build, train, export."""

import dataclasses
import functools
import hashlib
import json
import posixpath
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_transform as tft

from trainer_module import config_json
from trainer_module.build import build
from trainer_module.config import (
    AugmentConfig,
    EncoderConfig,
    ImageConfig,
    KeyBnMode,
    TrainConfig,
    is_conduct,
    is_operational,
)
from trainer_module.driver import Driver, learning_rate, train
from trainer_module.expected import FILE as EXPECTED_FILE
from trainer_module.expected import host_embedder, write_expected
from trainer_module.export import ENCODED, EncoderModule, EvaluationModule, save_encoder, save_evaluation
from trainer_module.images import check_channel_statistics, eval_resize
from trainer_module.input import Source, damage_named, dataset_from, open_source, steps_per_epoch
from trainer_module.online_knn import backbone_embedder, make_online_knn
from trainer_module.strategy import choose_strategy, host_count
from trainer_module.torch_weights import load_initial_weights, moco_tensors, write_tensors
from trainer_module.watch import Result

TRAINING_FILE = "training.json"
MOCO_FILE = "moco.safetensors"
LOGS = "logs"  # beside the checkpoints


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run of the Trainer is told, as its custom_config.

    Attributes:
        image, augment, encoder, train: see trainer_module.config.
        seed: of weights, queue, permutations, order and views.
        checkpoints: folder of the checkpoints.
        code: fingerprint of the sources that train.
    """

    image: ImageConfig
    augment: AugmentConfig
    encoder: EncoderConfig
    train: TrainConfig
    seed: int
    checkpoints: str
    code: str

    def to_custom_config(self) -> dict[str, Any]:
        """As JSON values."""
        return {"experiment": config_json.dumps(self)}

    @staticmethod
    def from_custom_config(custom_config: dict[str, Any]) -> "Experiment":
        """The inverse of to_custom_config."""
        return config_json.loads(Experiment, custom_config["experiment"])

    def cache_key(self) -> dict[str, Any]:
        """What stands for it in a cache key: all but how it is carried out. No custom_config to train by."""
        settings = {key: value for key, value in self._settings().items() if not is_conduct(key)}
        return {"settings": json.dumps(settings)}

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as far as it is known before the images are: {"train.queue": 65536, …}."""
        return {key: value for key, value in self._settings().items() if not is_operational(key)}

    def _settings(self) -> dict[str, Any]:
        return {key: value for key, value in sorted(config_json.flatten(self).items()) if key != "checkpoints"}


class ChannelStatistics(NamedTuple):
    """Of the stored training images, in the units of the pixels (0 to 255)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def run_fn(fn_args: Any) -> None:
    """Trains MoCo and writes the encoder.

    Args:
        fn_args: tfx.components.FnArgs. train_files holds the pattern of ViewAugmenter's train split, transform_output
            the Transform graph, custom_config an Experiment. Writes serving_model_dir (the published encoder),
            eval_model_dir (for the Evaluator), and into model_run_dir curves, training.json, the embeddings that the
            published encoder must give, and both encoders and the queue in MoCo's PyTorch names.

    Raises:
        UserError: see trainer_module.input and trainer_module.driver.
    """
    experiment = Experiment.from_custom_config(fn_args.custom_config)
    config = experiment.train
    transform = tft.TFTransformOutput(fn_args.transform_output).transform_features_layer()
    statistics = channel_statistics(transform, fn_args.transform_output)
    split_dir = posixpath.dirname(fn_args.train_files[0])
    source = open_source(split_dir, experiment.augment)
    steps = steps_per_epoch(source, config.global_batch)

    strategy = choose_strategy(config)
    config = dataclasses.replace(config, replicas=strategy.num_replicas_in_sync)
    encoder, moco = build(
        experiment.encoder,
        config,
        experiment.augment.size,
        *statistics,
        learning_rate(config, steps),
        experiment.seed,
        hosts=host_count(strategy),
    )
    untrained = make_encoder_module(encoder.backbone, transform, statistics, experiment)
    if experiment.encoder.weights:
        load_initial_weights(encoder, experiment.encoder.weights)
    driver = Driver(moco, config, strategy)
    knn = make_online_knn(split_dir, config.watch, backbone_embedder(strategy, encoder, *driver.query, *statistics))
    logs = posixpath.join(experiment.checkpoints, LOGS)
    views_from = functools.partial(
        dataset_from,
        source,
        experiment.augment,
        experiment.seed,
        config.epochs,
        config.global_batch,
        shuffled_keys=config.key_bn.mode is KeyBnMode.host,
    )
    identity = {**experiment.identity(), "images": identity_of_images(source, statistics)}
    with damage_named(source):
        result = train(driver, strategy, views_from, config, steps, experiment.checkpoints, logs, identity, knn)
    _copy_files(posixpath.join(logs, "train"), posixpath.join(fn_args.model_run_dir, "train"))
    driver.copy_weights_to(encoder.model)
    trained = make_encoder_module(encoder.backbone, transform, statistics, experiment)
    save_evaluation(EvaluationModule(trained, untrained, experiment.augment, result.leak), fn_args.eval_model_dir)
    facts = {"dim": encoder.backbone.output_shape[-1], "layer": "backbone", **statistics._asdict()}
    save_encoder(trained, facts, fn_args.serving_model_dir)
    state = driver.state()
    embed = host_embedder(encoder, state.query, state.query_stats, *statistics)
    expected = posixpath.join(fn_args.model_run_dir, EXPECTED_FILE)
    write_expected(split_dir, embed, experiment.image, experiment.augment, expected)
    write_tensors(posixpath.join(fn_args.model_run_dir, MOCO_FILE), moco_tensors(encoder.model, state))
    _write_result(result, strategy, config.epochs, fn_args.model_run_dir)


def channel_statistics(transform: Any, folder: str) -> ChannelStatistics:
    """Reads the analyzers' constants out of a Transform graph, whose folder is given, too, by one grey pixel."""
    pixel = tf.io.encode_png(tf.fill([1, 1, 3], tf.constant(128, tf.uint8)))
    out = transform({ENCODED: tf.reshape(pixel, [1, 1])})
    mean, variance = (tf.reshape(out[name], [-1])[:3].numpy() for name in ("channel_mean", "channel_variance"))
    check_channel_statistics(mean, variance, folder)
    # A channel that never varies would divide by zero.
    return ChannelStatistics(tuple(map(float, mean)), tuple(max(float(v) ** 0.5, 1.0) for v in variance))


def identity_of_images(source: Source, statistics: ChannelStatistics) -> str:
    """Names the training images and their views by content, such as "1767 with digest 5f0c93a1b2d4e6f7"."""
    text = json.dumps([source.digest, statistics])
    return f"{source.images} with digest {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def make_encoder_module(
    backbone: Any, transform: Any, statistics: ChannelStatistics, experiment: Experiment
) -> EncoderModule:
    """The backbone with its present weights, ready to be exported."""
    size = experiment.augment.size
    resize = eval_resize(experiment.image, experiment.augment)
    return EncoderModule(backbone, transform, statistics.mean, statistics.std, resize, size)


def _copy_files(source: str, destination: str) -> None:
    """Copies the curves of all starts of this training, which lie beside its checkpoints."""
    tf.io.gfile.makedirs(destination)
    for name in tf.io.gfile.listdir(source):
        tf.io.gfile.copy(posixpath.join(source, name), posixpath.join(destination, name), overwrite=True)


def _write_result(result: Result, strategy: tf.distribute.Strategy, epochs: int, directory: str) -> None:
    what = {
        **dataclasses.asdict(result),
        "epochs": epochs,
        "replicas": strategy.num_replicas_in_sync,
        "strategy": type(strategy).__name__,
    }
    with tf.io.gfile.GFile(posixpath.join(directory, TRAINING_FILE), "w") as file:
        file.write(json.dumps(what, indent=2))
