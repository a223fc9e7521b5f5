"""A training whose batch statistics really betray the positive: its alarm sounds, and its encoder is not blessed.

Everything in a view is drawn anew, its tint too, so two views of an image have nothing in common. But among the four
images that are normalised together one has a colour that is the same in both views, and by that the statistics of all
four can be told from those of other fours. A network that reads them finds every positive, and forgets the tints.
"""

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from judged import judged

from components.evaluator.config import EvaluateConfig
from components.evaluator.scorecard import Scorecard, score
from trainer_module.batch_norm import SplitBatchNormalization
from trainer_module.config import KeyBnConfig, KeyBnMode, TrainConfig, WatchConfig
from trainer_module.driver import Driver, train
from trainer_module.knn import knn_top1, unit
from trainer_module.moco import MoCo
from trainer_module.shuffle import key_encoding
from trainer_module.strategy import make_strategy
from trainer_module.watch import Result

GROUPS, SHARE, SIDE = 8, 4, 8  # groups of so many images, as so many replicas would normalise them
BATCH, STEPS, EPOCHS = GROUPS * SHARE, 25, 18
MEAN, STD = (127.0,) * 3, (60.0,) * 3
TINTS = 127 + 10 * np.array([(-1, -1, -1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
KINDS = 10  # neighbours that vote


def tinted(draw: np.random.Generator, tints: np.ndarray) -> np.ndarray:
    """Noise around a tint, uint8 [N, SIDE, SIDE, 3]."""
    noise = draw.integers(-60, 61, (len(tints), SIDE, SIDE, 3))
    return np.clip(TINTS[tints][:, None, None] + noise, 0, 255).astype(np.uint8)


def views(draw: np.random.Generator) -> np.ndarray:
    """A batch, uint8 [2, BATCH, SIDE, SIDE, 3]."""
    both = np.stack([tinted(draw, draw.integers(0, len(TINTS), BATCH)) for _ in range(2)])
    both[:, ::SHARE] = draw.integers(0, 256, (GROUPS, 1, 1, 3))
    return both


def network() -> tuple[keras.Model, keras.Model]:
    """Backbone, and the same with a head."""

    def convolved(x: keras.KerasTensor, strides: int) -> keras.KerasTensor:
        init = keras.initializers.HeNormal(seed=strides)
        x = keras.layers.Conv2D(32, 3, strides, "same", use_bias=False, kernel_initializer=init)(x)
        return keras.layers.ReLU()(SplitBatchNormalization(GROUPS)(x))

    image = keras.Input((SIDE, SIDE, 3))
    features = keras.layers.GlobalAveragePooling2D()(convolved(convolved(image, 2), 1))
    head = keras.layers.Dense(16, kernel_initializer=keras.initializers.HeNormal(seed=3))
    return keras.Model(image, features), keras.Model(image, head(features))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training and what became of it."""

    result: Result
    scorecard: Scorecard


def trained(mode: KeyBnMode, folder: str) -> Trained:
    """Trains on one device whose groups are normalised apart; `split` shuffles the keys among them, `none` does not."""
    backbone, model = network()
    config = TrainConfig(
        replicas=1,
        global_batch=BATCH,
        epochs=EPOCHS,
        queue=BATCH,
        learning_rate=0.05,
        momentum=0.9,
        temperature=0.1,
        log_steps=STEPS,
        checkpoint_seconds=1e9,
        key_bn=KeyBnConfig(mode, groups=GROUPS),
        watch=WatchConfig(knn_epochs=1, knn_k=KINDS),
    )
    moco = MoCo(
        model, MEAN, STD, key_encoding(mode), lambda _: tf.constant(config.learning_rate), config.momentum,
        config.temperature, config.sgd_momentum, config.weight_decay, seed=0,
    )  # fmt: skip
    strategy = make_strategy(1)
    driver = Driver(moco, config, strategy)
    draw = np.random.default_rng(99)
    tints = draw.integers(0, len(TINTS), 400)
    images, in_bank = tinted(draw, tints), np.arange(400) < 200

    def embedded() -> np.ndarray:
        return unit(backbone((images - np.float32(MEAN)) / np.float32(STD), training=False).numpy())

    def knn() -> float:
        driver.copy_weights_to(model)
        now = embedded()
        return knn_top1(now[in_bank], tints[in_bank], now[~in_bank], tints[~in_bank], KINDS, 0.1)

    untrained = embedded()
    batches = np.stack([views(rng) for rng in map(np.random.default_rng, range(STEPS))])
    result = train(
        driver, strategy, functools.partial(dataset_from, batches), config, STEPS, f"{folder}/checkpoints",
        f"{folder}/logs", {}, knn,
    )  # fmt: skip
    # What is asked here is the alarm's rule alone: nothing in these views is worth learning.
    rules = EvaluateConfig(knn_k=KINDS, min_gain=-1.0, linear_probe=False)
    vectors = {"embedding": embedded(), "untrained_embedding": untrained}
    judgement = judged(vectors, [str(tint) for tint in tints], in_bank, rules, leak=result.leak)
    return Trained(result, score(judgement, rules))


def dataset_from(batches: np.ndarray, start: int, _: tf.distribute.InputContext) -> tf.data.Dataset:
    dataset = tf.data.Dataset.from_tensor_slices(batches).repeat().skip(start)
    return dataset.map(lambda both: (both[0], both[1])).prefetch(4)


@pytest.fixture(scope="module")
def leaking(tmp_path_factory) -> Trained:
    return trained(KeyBnMode.none, str(tmp_path_factory.mktemp("none")))


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory) -> Trained:
    return trained(KeyBnMode.split, str(tmp_path_factory.mktemp("split")))


def test_an_encoder_that_was_trained_to_leak_is_refused_by_the_leak_s_rule_and_by_no_other(leaking):
    assert leaking.result.pretext_top1 > 0.95
    assert "pretext top-1 is 0.9" in leaking.result.leak
    assert "batch statistics betray the positive (train.key_bn.mode=none)" in leaking.result.leak
    (broken,) = (rule for rule in leaking.scorecard.rules if rule.holds is False)
    assert broken.name == "leak_passed"
    assert leaking.result.leak in broken.text
    assert leaking.scorecard.candidate["rules_passed"].value == 0.0


def test_of_the_same_images_shuffled_nothing_is_found_and_nothing_is_refused(shuffled):
    assert shuffled.result.pretext_top1 < 0.6
    assert shuffled.result.leak == ""
    assert [rule.name for rule in shuffled.scorecard.rules if rule.holds is False] == []


def test_the_leaking_encoder_tells_less_of_held_out_images_than_the_untrained_one_did(leaking):
    figures = leaking.scorecard.candidate
    assert figures["knn_top1"].value < figures["random_init_knn_top1"].value
