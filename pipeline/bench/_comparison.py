"""What both sides of a comparison with PyTorch are told, and our side's trainer made of it."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from trainer_module.driver import Driver
    from trainer_module.moco import MoCo

TORCH_PROGRAM = Path(__file__).with_name("_torch_moco.py")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A CIFAR ResNet-18 with MoCo v2's head and hyperparameters.

    Attributes:
        width, dim: of the encoder.
        precision: float32 or bfloat16.
        batch, side: views in a step over all groups, and their size in pixels.
        groups: that batch normalisation sees; replicas here, chunks of the batch there.
        queue, m, temperature: K, m, T.
        learning_rate, sgd_momentum, weight_decay: of SGD.
        mean, std: per channel, in the units of the pixels.
        seed: of weights, queue, views and permutations.
    """

    width: int
    precision: str
    batch: int
    groups: int
    side: int = 32
    dim: int = 128
    queue: int = 4096
    m: float = 0.999
    temperature: float = 0.2
    learning_rate: float = 0.03
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    seed: int = 0

    def to_json(self) -> str:
        """As PyTorch's program reads it."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Settings":
        """The inverse of to_json."""
        values = json.loads(text)
        return Settings(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def make_model(settings: Settings) -> "keras.Model":
    """The encoder with its initial weights."""
    from trainer_module.config import EncoderConfig, Head, Precision, Stem
    from trainer_module.encoder import build_encoder

    architecture = EncoderConfig("resnet18", Stem.cifar, settings.width, Head.v2, settings.dim)
    return build_encoder(architecture, settings.side, Precision(settings.precision), settings.seed).model


def make_moco(settings: Settings, model: "keras.Model") -> "MoCo":
    """The step, in the model's type, keys shuffled between the replicas."""
    import tensorflow as tf

    from trainer_module.config import KeyBnMode
    from trainer_module.moco import MoCo
    from trainer_module.shuffle import key_encoding

    return MoCo(
        model=model,
        mean=settings.mean,
        std=settings.std,
        encode_keys=key_encoding(KeyBnMode.cross_replica_sum),
        learning_rate=lambda _: tf.constant(settings.learning_rate, model.output.dtype),
        m=settings.m,
        temperature=settings.temperature,
        sgd_momentum=settings.sgd_momentum,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
    )


def make_driver(settings: Settings, model: "keras.Model", strategy: "tf.distribute.Strategy") -> "Driver":
    """The driver as training has it."""
    from trainer_module.config import TrainConfig
    from trainer_module.driver import Driver

    config = TrainConfig(replicas=settings.groups, global_batch=settings.batch, queue=settings.queue)
    return Driver(make_moco(settings, model), config, strategy)
