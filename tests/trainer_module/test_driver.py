"""The loop: learning, exact resume, refusal of a diverged run."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from trainer_module.config import KeyBnMode, TrainConfig
from trainer_module.driver import Driver, train
from trainer_module.errors import UserError
from trainer_module.moco import MoCo
from trainer_module.shuffle import key_encoding
from trainer_module.strategy import make_strategy

SIDE, BATCH, STEPS = 8, 16, 4


@pytest.fixture(scope="module")
def model(tiny_encoder):
    return tiny_encoder


def dataset_from(start, pipeline):
    """Noise images, each with two views that differ a little; the batch of a step depends on the step alone."""

    def batch(step):
        shape = [BATCH, SIDE, SIDE, 3]
        image = tf.random.stateless_uniform(shape, [1, step % STEPS], 0, 200, tf.int32)
        views = [image + tf.random.stateless_uniform(shape, [2 + i, step], 0, 50, tf.int32) for i in (0, 1)]
        return tuple(tf.cast(v, tf.uint8) for v in views)

    return tf.data.Dataset.range(start, 10_000).map(batch).rebatch(BATCH // pipeline.num_replicas_in_sync, True)


def run(model, directory, epochs, replicas=2, rate=0.05, schedule_epochs=None):
    config = TrainConfig(
        replicas=replicas,
        global_batch=BATCH,
        epochs=epochs,
        queue=64,
        learning_rate=rate,
        momentum=0.9,
        checkpoint_seconds=1e9,
        log_steps=1,
    )
    horizon = schedule_epochs or epochs
    moco = MoCo(
        model,
        (110.0,) * 3,
        (60.0,) * 3,
        key_encoding(KeyBnMode.cross_replica_sum),
        lambda step: rate * (1 - tf.cast(step, tf.float32) / (horizon * STEPS)),
        0.9,
        0.2,
        0.9,
        1e-4,
        0,
    )
    strategy = make_strategy(replicas)
    driver = Driver(moco, config, strategy)
    folders = str(directory / "ckpt"), str(directory / "logs")
    result = train(driver, strategy, dataset_from, config, STEPS, *folders, identity={})
    return driver.state(), result


def test_the_loss_falls_and_the_positive_is_found(model, tmp_path):
    _, result = run(model, tmp_path, epochs=15)
    assert result.steps == 15 * STEPS
    assert result.pretext_top1 > 0.3  # chance is 1 in 65
    assert result.final_loss < np.log(65)


def test_a_resumed_run_ends_with_the_state_of_an_uninterrupted_one_to_the_bit(model, tmp_path):
    whole, _ = run(model, tmp_path / "whole", epochs=4)
    run(model, tmp_path / "parts", epochs=2, schedule_epochs=4)
    resumed, result = run(model, tmp_path / "parts", epochs=4)
    assert result.resumed_from == 2 * STEPS
    for a, b in zip(tf.nest.flatten(whole), tf.nest.flatten(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_started_again_trains_no_further(model, tmp_path):
    before, trained = run(model, tmp_path, epochs=1)
    after, result = run(model, tmp_path, epochs=1)
    assert result == dataclasses.replace(trained, resumed_from=STEPS)
    for a, b in zip(tf.nest.flatten(before), tf.nest.flatten(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_diverged_run_stops_with_the_step_and_the_mend(model, tmp_path):
    with pytest.raises(UserError, match=r"step \d+ is nan; lower train.learning_rate"):
        run(model, tmp_path, epochs=3, rate=1e30)


def test_all_replicas_hold_the_same_state(model):
    strategy = make_strategy(2)
    config = TrainConfig(replicas=2, global_batch=BATCH, epochs=1, queue=64)
    encode = key_encoding(KeyBnMode.cross_replica_sum)
    moco = MoCo(model, (110.0,) * 3, (60.0,) * 3, encode, lambda _: tf.constant(0.1), 0.9, 0.2, 0.9, 1e-4, 0)
    driver = Driver(moco, config, strategy)
    driver.compiled_step()(iter(strategy.distribute_datasets_from_function(lambda part: dataset_from(0, part))))
    for variable in tf.nest.flatten(driver._variables):
        first, second = strategy.experimental_local_results(variable)
        np.testing.assert_array_equal(first, second)
