"""The MoCo step in float64: where two implementations are compared, rounding must not hide what they compute.

In float32 two correct implementations part within a few steps, because rounding errors grow from step to step. The
step is a pure function of its tensors, so it takes the type of the state and of the model that it is given.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.moco import Metrics, MoCo, State, initial_state
from trainer_module.replica import current_replica, own_rows


class PlainBatchNormalization(FusedBatchNormalization):
    """The same layer in training mode without the fused op, which has no float64."""

    def add_weight(self, **kwargs: Any) -> keras.Variable:
        """In the layer's own type."""
        return super().add_weight(**{**kwargs, "dtype": self.dtype})

    def call(self, x: tf.Tensor, training: bool = True) -> tf.Tensor:
        """x: [N, H, W, C] -> the same shape."""
        assert training
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        count = tf.cast(tf.size(x) / x.shape[-1], x.dtype)
        seen = (mean, variance * count / (count - 1))
        for variable, value in zip((self.moving_mean, self.moving_variance), seen, strict=True):
            variable.assign(self.momentum * variable + (1 - self.momentum) * value)
        beta, gamma = tf.convert_to_tensor(self.beta), tf.convert_to_tensor(self.gamma)
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, self.epsilon)


def in_float64(model: keras.Model) -> keras.Model:
    """The same network with the same weights, in float64."""

    def layer(old: keras.layers.Layer) -> keras.layers.Layer:
        kind = PlainBatchNormalization if isinstance(old, FusedBatchNormalization) else type(old)
        return kind.from_config({**old.get_config(), "dtype": "float64"})

    new = keras.models.clone_model(model, clone_function=layer)
    new.set_weights(model.get_weights())
    return new


def start(model: keras.Model, queue: int, seed: int) -> State:
    """The state before the first step: model is in float64, the numbers are those of float32."""
    state = initial_state(model, queue, seed)
    return state._replace(queue=tf.cast(state.queue, tf.float64))


def run(
    moco: MoCo, state: State, views: Iterable[np.ndarray], strategy: tf.distribute.Strategy
) -> Iterator[tuple[State, Metrics]]:
    """Steps on global batches of views, uint8[2, B, H, W, 3] each, over the replicas of the strategy.

    Yields:
        The state after each step, and the step's metrics.
    """

    @tf.function
    def step(state: State, x_q: tf.Tensor, x_k: tf.Tensor) -> tuple[State, Metrics]:
        def in_replica() -> tuple[State, Metrics]:
            replica = current_replica(strategy)
            return moco.step(state, own_rows(replica, x_q), own_rows(replica, x_k), replica)

        return tf.nest.map_structure(lambda x: strategy.experimental_local_results(x)[0], strategy.run(in_replica))

    for x_q, x_k in views:
        state, metrics = step(state, tf.constant(x_q), tf.constant(x_k))
        yield state, metrics
