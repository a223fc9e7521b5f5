"""A training run for tests that kill it: the trainer's own input, step, loop and checkpoints, without TFX."""

import functools
import logging
import os
import signal
from collections.abc import Mapping
from multiprocessing.synchronize import Event
from pathlib import Path
from types import MappingProxyType

import keras
import numpy as np

from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.config import AugmentConfig, KeyBnMode, TrainConfig, Where
from trainer_module.driver import Driver, learning_rate, named, train
from trainer_module.input import dataset_from, open_source, steps_per_epoch
from trainer_module.moco import MoCo
from trainer_module.progress import LOGGER_NAME
from trainer_module.shuffle import key_encoding
from trainer_module.strategy import choose_strategy

SIZE, IMAGES, SHARDS, SEED, BATCH = 8, 40, 3, 4, 8
STEPS = IMAGES // BATCH
# With hue, saturation and blur left out, the views trace in a second.
AUGMENT = AugmentConfig(size=SIZE, pairs_per_image=2, hue=0, saturation=0, blur_probability=0)


def main(
    split: str,
    folder: str,
    where: str,
    epochs: int,
    checkpoint_seconds: float,
    training: Event,
    checkpoints: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Trains to the end from wherever it stands, and writes the final state to FOLDER/state.npz.

    Sets the event once the first step is done. `checkpoints` is FOLDER/checkpoints by default.
    """
    os.environ.update(environment)
    _set_at_first_report(training)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
    augment = AugmentConfig(**{**AUGMENT.__dict__, "where": Where[where]})
    config = TrainConfig(
        replicas=2,
        global_batch=BATCH,
        epochs=epochs,
        queue=32,
        learning_rate=0.05,
        momentum=0.9,
        steps_per_loop=2,
        checkpoint_seconds=checkpoint_seconds,
    )
    source = open_source(split, augment)
    strategy = choose_strategy(config)
    moco = MoCo(
        model=_tiny_encoder(),
        mean=(110.0,) * 3,
        std=(60.0,) * 3,
        encode_keys=key_encoding(KeyBnMode.cross_replica_sum),
        learning_rate=learning_rate(config, steps_per_epoch(source, BATCH)),
        m=config.momentum,
        temperature=config.temperature,
        sgd_momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
        seed=SEED,
    )
    driver = Driver(moco, config, strategy)
    data = functools.partial(dataset_from, source, augment, SEED, epochs, BATCH)
    checkpoints = checkpoints or f"{folder}/checkpoints"
    train(driver, strategy, data, config, STEPS, checkpoints, f"{checkpoints}/logs", {"seed": SEED})
    np.savez(Path(folder) / "state.npz", **named(driver.state()))


def _set_at_first_report(training: Event) -> None:
    logger, handler = logging.getLogger(LOGGER_NAME), logging.Handler()
    handler.emit = lambda _: training.set()  # type: ignore[method-assign]
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)


def _tiny_encoder() -> keras.Model:
    image = keras.Input((SIZE, SIZE, 3))
    init = keras.initializers.RandomNormal(stddev=0.2, seed=3)
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False, kernel_initializer=init)(image)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(FusedBatchNormalization()(x)))
    return keras.Model(image, keras.layers.Dense(8, kernel_initializer=keras.initializers.HeNormal(seed=4))(x))
