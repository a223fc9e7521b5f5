"""The loop: learning, exact resume, interruption, refusal of a diverged run, and what replicas hold."""

import contextlib
import dataclasses
import gc
import logging
import shutil
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from trainer_module.config import KeyBnMode, TrainConfig
from trainer_module.driver import Driver, train
from trainer_module.errors import UserError
from trainer_module.moco import MoCo
from trainer_module.progress import LOGGER_NAME
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


def make_config(epochs, **changes):
    plain = TrainConfig(
        replicas=2,
        global_batch=BATCH,
        epochs=epochs,
        queue=64,
        learning_rate=0.05,
        momentum=0.9,
        checkpoint_seconds=1e9,
        log_steps=1,
    )
    return dataclasses.replace(plain, **changes)


def make_driver(model, config, horizon):
    """A driver whose learning rate falls to 0 over `horizon` epochs."""
    strategy = make_strategy(config.replicas)
    moco = MoCo(
        model,
        (110.0,) * 3,
        (60.0,) * 3,
        key_encoding(KeyBnMode.cross_replica_sum),
        lambda step: config.learning_rate * (1 - tf.cast(step, tf.float32) / (horizon * STEPS)),
        0.9,
        0.2,
        0.9,
        1e-4,
        0,
    )
    return Driver(moco, config, strategy), strategy


def test_nothing_of_the_driver_is_beyond_autograph(model):
    """A lambda that shares its line with another one is; TensorFlow says so in several lines of every run."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    tf.get_logger().addHandler(handler)
    try:
        driver, _ = make_driver(model, make_config(1), 1)
        driver.check_replicas_agree()
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [text for text in said if "could not transform" in text]


def run(model, directory, epochs, schedule_epochs=None, identity=None, **changes):
    config = make_config(epochs, **changes)
    driver, strategy = make_driver(model, config, schedule_epochs or epochs)
    folders = str(directory / "ckpt"), str(directory / "logs")
    result = train(driver, strategy, dataset_from, config, STEPS, *folders, identity=identity or {})
    return driver.state(), result


def assert_same(one, other):
    for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """State and result of an unbroken run of three epochs."""
    return run(model, tmp_path_factory.mktemp("whole"), epochs=3)


def test_the_loss_falls_and_the_positive_is_found(model, tmp_path):
    _, result = run(model, tmp_path, epochs=15, steps_per_loop=STEPS)
    assert result.steps == 15 * STEPS
    assert result.pretext_top1 > 0.3  # chance is 1 in 65
    assert result.final_loss < np.log(65)


def test_a_step_adds_up_in_the_same_order_each_time_however_large_the_network_is(monkeypatch):
    """Else the runs of a large network part in the last digit; in which order it would be is a matter of luck."""
    image = keras.Input((SIDE, SIDE, 3))
    large = keras.Model(image, keras.layers.Dense(8)(keras.layers.Dense(60_000)(keras.layers.Flatten()(image))))

    def operations():
        driver, strategy = make_driver(large, make_config(1, replicas=1), 1)
        batches = iter(strategy.distribute_datasets_from_function(lambda part: dataset_from(0, part)))
        context.enable_run_metadata()
        driver.compiled_step()(batches)
        graphs = [graph.post_optimization_graph for graph in context.export_run_metadata().function_graphs]
        context.disable_run_metadata()
        return {node.op for graph in graphs for node in graph.node}

    in_any_order = "AssignAdd"
    assert in_any_order not in operations()
    monkeypatch.setattr("trainer_module.driver.adding_in_order", contextlib.nullcontext)
    assert in_any_order in operations(), "TensorFlow adds in order by itself"


def test_an_encoder_without_batch_normalisation_trains_over_replicas(tmp_path):
    image = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, strides=2, activation="relu")(image))
    state, result = run(keras.Model(image, keras.layers.Dense(16)(x)), tmp_path, epochs=1)
    assert state.query_stats == []
    assert np.isfinite(result.final_loss)


def test_a_resumed_run_ends_with_the_state_of_an_uninterrupted_one_to_the_bit(model, tmp_path, whole):
    run(model, tmp_path, epochs=1, schedule_epochs=3)
    resumed, result = run(model, tmp_path, epochs=3)
    assert result.resumed_from == STEPS
    assert_same(whole[0], resumed)


@pytest.mark.parametrize("steps_per_loop", [3, 100])
def test_state_and_figures_do_not_depend_on_the_steps_of_a_loop(model, tmp_path, whole, steps_per_loop):
    state, result = run(model, tmp_path, epochs=3, steps_per_loop=steps_per_loop)
    assert_same(whole[0], state)
    assert result == dataclasses.replace(whole[1], images_per_second=result.images_per_second)


class InterruptAtFirstReport(logging.Handler):
    """Sends this process SIGINT once training has reported its first step."""

    def emit(self, _):
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_saves_the_last_step_and_the_run_ends_as_an_unbroken_one(model, tmp_path, whole):
    logger, handler = logging.getLogger(LOGGER_NAME), InterruptAtFirstReport()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path, epochs=3)
    finally:
        logger.removeHandler(handler)
    assert [file.name for file in (tmp_path / "ckpt").glob("*.index")] == ["step-00000001.index"]
    resumed, result = run(model, tmp_path, epochs=3)
    assert result.resumed_from == 1
    assert_same(whole[0], resumed)


IDENTITY = {"seed": 0}


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """Folder, state and result of a finished run of one epoch on one replica; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *run(model, folder, epochs=1, schedule_epochs=2, identity=IDENTITY, replicas=1)


def test_a_run_goes_on_with_another_number_of_replicas(model, tmp_path, finished):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    state, result = run(model, tmp_path, epochs=2, identity=IDENTITY, replicas=2)
    assert result.resumed_from == STEPS
    assert state.step == 2 * STEPS
    assert np.isfinite(result.final_loss)


def test_a_run_with_other_settings_is_refused_with_the_keys(model, finished):
    with pytest.raises(UserError, match=r"ckpt is of a run with seed=0, now 1; finish it"):
        run(model, finished[0], epochs=1, identity={"seed": 1}, replicas=1)


def test_a_checkpoint_of_another_network_is_refused(model, finished):
    with pytest.raises(UserError, match="other tensors"):
        run(model, finished[0], epochs=1, identity=IDENTITY, queue=128, replicas=1)


def test_a_finished_run_started_again_trains_no_further(model, finished):
    folder, before, trained = finished
    after, result = run(model, folder, epochs=1, identity=IDENTITY, replicas=1)
    assert result == dataclasses.replace(trained, resumed_from=STEPS)
    assert_same(before, after)


def test_a_diverged_run_stops_with_the_step_and_the_mend(model, tmp_path):
    with pytest.raises(UserError, match=r"step \d+ is nan; lower train.learning_rate"):
        run(model, tmp_path, epochs=3, learning_rate=1e30, replicas=1)


@pytest.fixture(scope="module")
def driver_after_a_step(model):
    driver, strategy = make_driver(model, make_config(epochs=1), horizon=1)
    driver.compiled_step()(iter(strategy.distribute_datasets_from_function(lambda part: dataset_from(0, part))))
    return driver, strategy


def test_all_replicas_hold_the_same_state(driver_after_a_step):
    driver, strategy = driver_after_a_step
    driver.check_replicas_agree()
    for variable in tf.nest.flatten(driver._variables):
        assert variable.synchronization == tf.VariableSynchronization.ON_READ  # a write costs no traffic
        first, second = strategy.experimental_local_results(variable)
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("field", ["queue", "pointer", "slots"])
def test_replicas_that_disagree_in_one_bit_are_caught_by_name(driver_after_a_step, field):
    driver, strategy = driver_after_a_step
    variable = tf.nest.flatten(getattr(driver._variables, field))[0]
    second = strategy.experimental_local_results(variable)[1]
    right = second.numpy()
    wrong = np.array(right)
    wrong.reshape(-1).view(np.int32)[0] ^= 1
    second.assign(wrong)
    with pytest.raises(RuntimeError, match=rf"after step 1 the replicas' states differ in {field}(/0)?$"):
        driver.check_replicas_agree()
    second.assign(right)
    driver.check_replicas_agree()


def test_the_driver_holds_each_tensor_of_state_once_for_each_replica(model):
    size = 64 * 1237  # a queue whose shape nothing else here has
    driver, _ = make_driver(model, make_config(epochs=1, queue=size), horizon=1)
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, tf.__internal__.EagerTensor) and o.dtype == tf.float32]
    assert not [t for t in tensors if t.shape == driver.state().queue.shape]
