"""The thin driver: variables under a strategy, one compiled step, the loop, checkpoints.

The step itself is pure (trainer_module.moco); here its state lives in variables, each held once per replica. All
replicas compute the same new state from the same sums, so they assign it locally, with no further traffic.
"""

import dataclasses
import json
import math
import posixpath
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import tensorflow as tf

from trainer_module.config import Schedule, TrainConfig
from trainer_module.moco import Metrics, MoCo, State, initial_state
from trainer_module.replica import current_replica
from trainer_module.watch import Result, Watch

RESULT_FILE = "result.json"


def learning_rate(config: TrainConfig, steps_per_epoch: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """The schedule of main_moco.py: changed once an epoch, no warm-up.

    Returns:
        A function of the step, int32[], to the rate, float32[].
    """

    def rate(step: tf.Tensor) -> tf.Tensor:
        epoch = step // steps_per_epoch
        if config.schedule is Schedule.cosine:
            share = tf.cast(epoch, tf.float32) / config.epochs
            return config.learning_rate * 0.5 * (1 + tf.cos(math.pi * share))
        passed = tf.reduce_sum(tf.cast(epoch >= tf.constant(config.milestones, tf.int32), tf.float32))
        return config.learning_rate * 0.1**passed

    return rate


class Driver:
    """Holds the state in variables, runs steps, saves and restores."""

    def __init__(self, moco: MoCo, config: TrainConfig, strategy: tf.distribute.Strategy) -> None:
        self._moco, self._strategy = moco, strategy
        with strategy.scope():
            self._variables = tf.nest.map_structure(_variable, initial_state(moco.model, config.queue, moco.seed))
        flat = tf.nest.flatten(self._variables)
        self._checkpoint = tf.train.Checkpoint(**{f"state{i:04d}": v for i, v in enumerate(flat)})

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self._variables.step.numpy())

    def state(self) -> State:
        """The present state as NumPy arrays, of the first replica."""
        return tf.nest.map_structure(lambda v: v.numpy(), self._variables)

    def copy_weights_to(self, model: keras.Model) -> None:
        """Writes f_q's parameters and running statistics into the Keras model."""
        state = self.state()
        for variables, values in (
            (model.trainable_variables, state.query),
            (model.non_trainable_variables, state.query_stats),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def checkpoints(self, directory: str) -> tf.train.CheckpointManager:
        """The checkpoints of this run; the two newest are kept."""
        return tf.train.CheckpointManager(self._checkpoint, directory, max_to_keep=2)

    def compiled_step(self) -> Callable[[Iterator[tuple[tf.Tensor, tf.Tensor]]], Metrics]:
        """One step over all replicas as a graph: takes the next global batch, returns the metrics."""

        def replica_step(views: tuple[tf.Tensor, tf.Tensor]) -> Metrics:
            state = tf.nest.map_structure(tf.convert_to_tensor, self._variables)
            new, metrics = self._moco.step(state, *views, current_replica(self._strategy))
            tf.nest.map_structure(lambda variable, value: variable.assign(value), self._variables, new)
            return metrics

        @tf.function
        def step(batches: Iterator[tuple[tf.Tensor, tf.Tensor]]) -> Metrics:
            metrics = self._strategy.run(replica_step, args=(next(batches),))
            return tf.nest.map_structure(lambda m: self._strategy.experimental_local_results(m)[0], metrics)

        return step


def _variable(value: tf.Tensor) -> tf.Variable:
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def train(
    driver: Driver,
    strategy: tf.distribute.Strategy,
    dataset_from: Callable[[int], tf.data.Dataset],
    config: TrainConfig,
    steps_per_epoch: int,
    checkpoint_dir: str,
    log_dir: str,
) -> Result:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
        driver: holds the state.
        strategy: that the driver was made under.
        dataset_from: start step -> global batches of views, uint8[B, H, W, 3] twice, from that step on.
        config: of the training.
        steps_per_epoch: steps in one pass over the images.
        checkpoint_dir: of this very experiment; another configuration needs another folder.
        log_dir: for TensorBoard.

    Raises:
        UserError: the loss is not finite.
    """
    total = config.epochs * steps_per_epoch
    manager = driver.checkpoints(checkpoint_dir)
    manager.restore_or_initialize()
    start = driver.step
    if start == total:
        return _read_result(checkpoint_dir)
    watch = Watch(start, total, steps_per_epoch, config, Path(log_dir))
    batches = iter(strategy.experimental_distribute_dataset(dataset_from(start)))
    step = driver.compiled_step()
    saved = time.monotonic()
    for done in range(start + 1, total + 1):
        metrics = step(batches)
        watch.see(done, metrics)
        if done < total and time.monotonic() - saved > config.checkpoint_seconds:
            watch.check_finite(done, metrics)  # a checkpoint that is not finite could never be continued
            manager.save(checkpoint_number=done)
            saved = time.monotonic()
    result = watch.result()
    # Before the last checkpoint, so that whoever finds training finished also finds what it gave.
    _write_result(result, checkpoint_dir)
    manager.save(checkpoint_number=total)
    return result


def _write_result(result: Result, checkpoint_dir: str) -> None:
    tf.io.gfile.makedirs(checkpoint_dir)
    with tf.io.gfile.GFile(posixpath.join(checkpoint_dir, RESULT_FILE), "w") as file:
        file.write(json.dumps(dataclasses.asdict(result)))


def _read_result(checkpoint_dir: str) -> Result:
    with tf.io.gfile.GFile(posixpath.join(checkpoint_dir, RESULT_FILE)) as file:
        result = Result(**json.load(file))
    return dataclasses.replace(result, resumed_from=result.steps)
