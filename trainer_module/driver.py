"""The thin driver: variables under a strategy, one compiled loop of steps, checkpoints.

The step itself is pure (trainer_module.moco); here its state lives in variables, each held once per replica. All
replicas compute the same new state from the same sums, so they assign it locally, with no further traffic.
"""

import contextlib
import dataclasses
import functools
import json
import math
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer_module.build import first_state
from trainer_module.checkpoints import Checkpoints, Identity
from trainer_module.config import Schedule, TrainConfig
from trainer_module.errors import UserError
from trainer_module.moco import Metrics, MoCo, State
from trainer_module.replica import current_replica
from trainer_module.strategy import adding_in_order, steps_per_loop
from trainer_module.watch import Result, Watch, newest_rows, timed_next

RESULT_FILE = "result.json"

Batches = Iterator[tuple[tf.Tensor, tf.Tensor]]
DatasetFrom = Callable[[int, tf.distribute.InputContext], tf.data.Dataset]


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
    """Holds the state in variables and runs steps.

    Args:
        moco: the step.
        config: of the training.
        strategy: over the replicas.
        state: to begin with; None for the initial one.
    """

    def __init__(
        self, moco: MoCo, config: TrainConfig, strategy: tf.distribute.Strategy, state: State | None = None
    ) -> None:
        self._moco, self._config, self._strategy = moco, config, strategy
        self._steps_per_loop = steps_per_loop(config, strategy)
        with strategy.scope():
            begin = first_state(moco, config) if state is None else state
            self._variables = tf.nest.map_structure(_variable, begin)
            # Metrics stay on the device until a loop is over.
            self._metrics = _variable(np.zeros([self._steps_per_loop, len(Metrics._fields)], np.float32))
        self._digests = tf.function(self._digests_of_replicas, autograph=False)

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self._variables.step.numpy())

    @property
    def query(self) -> tuple[list[tf.Variable], list[tf.Variable]]:
        """f_q's parameters and running statistics, in the order of the model's variables."""
        return self._variables.query, self._variables.query_stats

    def newest_keys(self) -> np.ndarray:
        """The newest keys of the queue, float32[n, C]."""
        enqueued = self.step * self._config.global_batch
        queue, pointer = (tf.convert_to_tensor(v) for v in (self._variables.queue, self._variables.pointer))
        return newest_rows(queue, pointer, enqueued)

    @property
    def steps_per_loop(self) -> int:
        """The most steps that one call of the compiled loop may do."""
        return self._steps_per_loop

    def state(self) -> State:
        """The present state as NumPy arrays, of the first replica."""
        return tf.nest.map_structure(lambda v: v.numpy(), self._variables)

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Gives every replica the state that `named` had named.

        Raises:
            UserError: the tensors are not those of this state.
        """
        variables = named(self._variables)
        if {name: v.shape for name, v in tensors.items()} != {name: tuple(v.shape) for name, v in variables.items()}:
            raise UserError("the checkpoint holds other tensors than this version trains; remove its folder")
        for name, variable in variables.items():
            variable.assign(tensors[name])

    def check_replicas_agree(self) -> None:
        """Compares all tensors of the state over the replicas, by a sum of each one's bits on its device.

        Raises:
            RuntimeError: they differ, which no input and no setting may bring about.
        """
        digests = [d.numpy() for d in self._strategy.experimental_local_results(self._digests())]
        differ = np.any([d != digests[0] for d in digests], axis=0)
        if differ.any():
            names = [name for name, bad in zip(named(self._variables), differ, strict=True) if bad]
            raise RuntimeError(f"after step {self.step} the replicas' states differ in {', '.join(names)}")

    def _digests_of_replicas(self) -> tf.Tensor:
        return self._strategy.run(self._digests_of_one)

    def _digests_of_one(self) -> tf.Tensor:
        return _digests(tf.nest.flatten(self._variables))

    def copy_weights_to(self, model: keras.Model) -> None:
        """Writes f_q's parameters and running statistics into the Keras model."""
        state = self.state()
        for variables, values in (
            (model.trainable_variables, state.query),
            (model.non_trainable_variables, state.query_stats),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def compiled_loop(self) -> Callable[[Batches, int], tuple[tf.Tensor, tf.Tensor]]:
        """Several steps over all replicas as one graph, with nothing for Python to do between them.

        The loop is the host's: TensorFlow's runtime there starts a step on all cores and gives them the next views. The
        state, and each step's metrics, stay on the cores until the loop is over. Keras does steps_per_execution so.

        Returns:
            A function of an iterator of the strategy's batches and of the steps to do, at most `steps_per_loop`. It
            gives each step's metrics, float32[steps, fields of Metrics], and the seconds waited for batches.
        """

        @tf.autograph.experimental.do_not_convert  # nothing there needs it, and it takes seconds
        def replica_step(query: tf.Tensor, key: tf.Tensor) -> None:
            state = tf.nest.map_structure(tf.convert_to_tensor, self._variables)
            new, metrics = self._moco.step(state, query, key, current_replica(self._strategy))
            tf.nest.map_structure(lambda variable, value: variable.assign(value), self._variables, new)
            row = [[state.step % self._steps_per_loop]]
            values = tf.stack([tf.cast(m, tf.float32) for m in metrics])
            self._metrics.assign(tf.tensor_scatter_nd_update(self._metrics, row, values[tf.newaxis]))

        @tf.function
        def loop(batches: Batches, steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            first, waited = tf.convert_to_tensor(self._variables.step), tf.constant(0.0)
            for _ in tf.range(steps):
                batch, seconds = timed_next(batches)
                waited += seconds
                self._strategy.run(replica_step, args=batch)
            return tf.gather(self._metrics, (first + tf.range(steps)) % self._steps_per_loop), waited

        def run(batches: Batches, steps: int) -> tuple[tf.Tensor, tf.Tensor]:
            with adding_in_order():
                return loop(batches, tf.convert_to_tensor(steps, tf.int32))

        return run

    def compiled_step(self) -> Callable[[Batches], Metrics]:
        """One step at a time: takes the next global batch, returns its metrics, float32[] each."""
        loop = self.compiled_loop()
        return lambda batches: Metrics(*tf.unstack(loop(batches, 1)[0][0]))


def named(state: State) -> dict[str, Any]:
    """The leaves of a state by name: {"step": …, "query/0": …}."""
    names: dict[str, Any] = {}
    for field, tree in state._asdict().items():
        leaves = tf.nest.flatten(tree)
        names |= {f"{field}/{i}": leaf for i, leaf in enumerate(leaves)} if tf.nest.is_nested(tree) else {field: tree}
    return names


def _variable(value: tf.Tensor | np.ndarray) -> tf.Variable:
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def _digests(tensors: list[tf.Tensor]) -> tf.Tensor:
    """int32[len(tensors)]: sums of the tensors' bits, which wrap round and so do not depend on the order."""
    return tf.stack([tf.reduce_sum(_bits(tf.convert_to_tensor(t))) for t in tensors])


def _bits(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.bitcast(x, {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int32}[x.dtype.size]), tf.int32)


def train(
    driver: Driver,
    strategy: tf.distribute.Strategy,
    dataset_from: DatasetFrom,
    config: TrainConfig,
    steps_per_epoch: int,
    checkpoint_dir: str,
    log_dir: str,
    identity: Identity,
    knn: Callable[[], float] | None = None,
) -> Result:
    """Trains to the end, from the newest checkpoint if there is one.

    An interruption (KeyboardInterrupt, which a polite kill becomes, too) saves first.

    Args:
        driver: holds the state.
        strategy: that the driver was made under.
        dataset_from: (start step, input pipeline) -> batches of views, uint8[n, H, W, 3] twice, of the n images of one
            replica, for the replicas of that pipeline in turn, from that step on.
        config: of the training.
        steps_per_epoch: steps in one pass over the images.
        checkpoint_dir: of this run; one of another run is refused.
        log_dir: for TensorBoard.
        identity: what decides the weights.
        knn: gives kNN top-1 of the present weights, see trainer_module.online_knn.

    Raises:
        UserError: the loss or the weights are not finite; the checkpoints are of another run, or all damaged.
    """
    total = config.epochs * steps_per_epoch
    checkpoints = Checkpoints(checkpoint_dir, config.keep_checkpoints, identity)
    if newest := checkpoints.newest():
        driver.restore(newest.tensors)
        del newest
    start = driver.step
    if start == total:
        return _read_result(checkpoint_dir)
    watch = Watch(start, total, steps_per_epoch, config, log_dir, driver.newest_keys, knn)
    save = functools.partial(_save, driver, checkpoints, watch)
    try:
        _run_loops(driver, strategy, dataset_from, config, steps_per_epoch, watch, save)
    except KeyboardInterrupt:
        if driver.step > start:
            with contextlib.suppress(UserError):  # weights that are not finite are not worth keeping
                save()
                checkpoints.wait()
        raise
    result = watch.result()
    # Before the last checkpoint, so that whoever finds training finished also finds what it gave.
    _write_result(result, checkpoint_dir)
    save()
    checkpoints.wait()
    return result


def _run_loops(
    driver: Driver,
    strategy: tf.distribute.Strategy,
    dataset_from: DatasetFrom,
    config: TrainConfig,
    steps_per_epoch: int,
    watch: Watch,
    save: Callable[[], None],
) -> None:
    """Runs the steps that are left; between two loops, and so after each epoch, the state is that of the last step."""
    done, total = driver.step, config.epochs * steps_per_epoch
    batches = iter(strategy.distribute_datasets_from_function(functools.partial(dataset_from, done)))
    loop = driver.compiled_loop()
    saved = time.monotonic()
    while done < total:
        steps = min(driver.steps_per_loop, steps_per_epoch - done % steps_per_epoch)
        rows, waited = loop(batches, steps)
        done += steps
        watch.see(done, Metrics(*rows.numpy().T), waited)
        if done < total and time.monotonic() - saved > config.checkpoint_seconds:
            save()
            saved = time.monotonic()


def _save(driver: Driver, checkpoints: Checkpoints, watch: Watch) -> None:
    """Begins to write the present state, unless it could never be continued."""
    with watch.paused():
        driver.check_replicas_agree()
        state = driver.state()
        watch.check_finite(int(state.step), state)
        checkpoints.save(int(state.step), named(state))
    if checkpoints.whole is not None:
        watch.saved(checkpoints.whole)


def _write_result(result: Result, checkpoint_dir: str) -> None:
    tf.io.gfile.makedirs(checkpoint_dir)
    with tf.io.gfile.GFile(posixpath.join(checkpoint_dir, RESULT_FILE), "w") as file:
        file.write(json.dumps(dataclasses.asdict(result)))


def _read_result(checkpoint_dir: str) -> Result:
    with tf.io.gfile.GFile(posixpath.join(checkpoint_dir, RESULT_FILE)) as file:
        result = Result(**json.load(file))
    return dataclasses.replace(result, resumed_from=result.steps)
