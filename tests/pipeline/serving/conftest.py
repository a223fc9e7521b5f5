"""A server of an encoder, and one of TensorFlow Serving's own example."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from running_server import HalfPlusTwo, Running, make_encoder, running

from trainer_module.config import AugmentConfig
from trainer_module.export import EvaluationModule, save_encoder, save_evaluation


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Callable[[int], Path]:
    """A seed -> the SavedModel of an encoder with weights of that seed."""
    made: dict[int, Path] = {}

    def encoder(seed: int) -> Path:
        if seed not in made:
            folder = tmp_path_factory.mktemp("encoder")
            save_encoder(make_encoder(seed), {}, str(folder))
            made[seed] = folder
        return made[seed]

    return encoder


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    """The signature that the Evaluator runs, of the encoder with seed 0."""
    folder = str(tmp_path_factory.mktemp("evaluation"))
    trained = make_encoder(0)
    save_evaluation(EvaluationModule(trained, make_encoder(1), AugmentConfig(size=trained.size), leak=""), folder)
    loaded = tf.saved_model.load(folder)
    return lambda examples: loaded.signatures["evaluate"](tf.constant(examples))["embedding"].numpy()


@pytest.fixture(scope="session")
def server(encoders) -> Iterator[Running]:
    """Serves the encoder with seed 0."""
    with running(encoders(0)) as made:
        yield made


@pytest.fixture(scope="session")
def half_plus_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "123"
    module = HalfPlusTwo()
    signatures = {name: getattr(module, name) for name in ("serving_default", "named", "one_number")}
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return folder.parent


@pytest.fixture(scope="session")
def half(half_plus_two) -> Iterator[Running]:
    """Serves TensorFlow Serving's example."""
    with running(half_plus_two, name="half_plus_two") as made:
        yield made


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """A seed -> a picture as PNG bytes."""

    def make(seed: int, height: int = 40, width: int = 30) -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.float32)
        pixels = tf.cast(tf.image.resize(coarse, [height, width]), tf.uint8)
        return tf.io.encode_png(pixels).numpy()

    return make
