"""A small encoder that traces in a second, and replicas of any number, eagerly and without devices."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import pytest
import tensorflow as tf

from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.replica import exchange_by_sum, sum_pair_by_sum


@pytest.fixture(scope="session")
def tiny_encoder():
    """uint8-sized images of any side -> 16 numbers; one convolution, one batch normalisation, one dense layer."""
    image = keras.Input((None, None, 3))
    init = keras.initializers.RandomNormal(stddev=0.2, seed=3)
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False, kernel_initializer=init)(image)
    x = keras.layers.ReLU()(FusedBatchNormalization()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(16, kernel_initializer=keras.initializers.HeNormal(seed=4))(x))


@pytest.fixture(scope="session")
def in_lockstep():
    """count, function of a replica -> what each of so many replicas gave."""
    return _in_lockstep


class _Meeting:
    """Where the replicas of one run wait for each other; between two waits one of them runs at a time.

    So they may also write into one graph, and no processor time is lost to threads that press for the interpreter.
    """

    def __init__(self, count: int) -> None:
        self.slots: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)
        self.turn = threading.Lock()

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class LockstepReplica:
    """One of R replicas, as threads of one process that meet at every sum; sums in the order of the replicas."""

    on_tpu = False

    def __init__(self, index: int, count: int, meeting: _Meeting) -> None:
        self._index, self._meeting, self.count = index, meeting, count

    @property
    def index(self) -> tf.Tensor:
        return tf.constant(self._index)

    def sum(self, tree: Any) -> Any:
        @tf.custom_gradient
        def summed(*tensors: tf.Tensor) -> Any:
            # As tf.distribute and the TPU have it: the gradient of a sum over replicas is the sum of the gradients.
            return self._meet(*tensors), self._meet

        flat = tf.nest.flatten(tree)
        # In a graph TensorFlow walks back through all of it for each function with a gradient; integers have none.
        act = summed if any(tensor.dtype.is_floating for tensor in flat) else self._meet
        return tf.nest.pack_sequence_as(tree, act(*flat))

    def _meet(self, *tensors: tf.Tensor) -> list[tf.Tensor]:
        self._meeting.slots[self._index] = tensors
        self._meeting.wait()
        result = [tf.add_n(list(values)) for values in zip(*self._meeting.slots, strict=True)]
        self._meeting.wait()
        return result

    def sum_pair(self, x: tf.Tensor, distance: int) -> tf.Tensor:
        return sum_pair_by_sum(self, x, distance)

    def all_to_all(self, blocks: tf.Tensor) -> tf.Tensor:
        return exchange_by_sum(self, blocks)


def _in_lockstep(count: int, function: Callable[[LockstepReplica], Any]) -> list[Any]:
    """Runs a function once for each of R replicas and returns what each gave; within a tf.function, into its graph."""
    meeting, eager, graph = _Meeting(count), tf.executing_eagerly(), tf.compat.v1.get_default_graph()

    def one(index: int) -> Any:
        with meeting.turn, contextlib.nullcontext() if eager else graph.as_default():
            try:
                return function(LockstepReplica(index, count, meeting))
            except BaseException:
                meeting.barrier.abort()
                raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
