"""Batch normalisation for MoCo's encoders (Keras 3 layers).

All have eps 1e-5 and momentum 0.9 in Keras's sense (0.1 in PyTorch's), the variables gamma, beta, moving_mean and
moving_variance, float32[C], and as in PyTorch the running variance takes the unbiased variance of the batch. They
differ in whose statistics normalise a batch in training.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainer_module.column_pairs import by_channel, for_columns
from trainer_module.config import KeyBnConfig, KeyBnMode
from trainer_module.folded_norm import convolved_and_normalized, widening_convolution
from trainer_module.replica import entered_replica, mean

Moments = tuple[tf.Tensor, tf.Tensor]


@keras.saving.register_keras_serializable("moco")
class FusedBatchNormalization(keras.layers.Layer):
    """Normalises with the local batch's statistics, as one fused op, forward and backward.

    Keras's own layer computes mean, variance and the affine map in separate passes; the fused op reads the activations
    once. On a TPU it is folded into a convolution before it that makes many channels, see trainer_module.folded_norm.
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes gamma, beta, moving mean and moving variance, float32[C]."""
        channels = input_shape[-1]

        def weight(name: str, initializer: str, trainable: bool) -> keras.Variable:
            # No autocast: the statistics must not pass through bfloat16.
            return self.add_weight(
                name=name,
                shape=(channels,),
                initializer=initializer,
                dtype="float32",
                trainable=trainable,
                autocast=False,
            )

        self.gamma, self.beta = weight("gamma", "ones", True), weight("beta", "zeros", True)
        self.moving_mean = weight("moving_mean", "zeros", False)
        self.moving_variance = weight("moving_variance", "ones", False)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """x: [N, H, W, C] -> the same shape; in training the running statistics move towards the batch's."""
        if not training:
            return self.normalize(x, self.running())
        y, batch = self.normalize_by_itself(x)
        self.move_towards(batch)
        return y

    def running(self) -> Moments:
        """Mean and variance that are kept, float32[C]."""
        return tf.convert_to_tensor(self.moving_mean), tf.convert_to_tensor(self.moving_variance)

    def normalize(self, x: tf.Tensor, moments: Moments) -> tf.Tensor:
        """Normalises with given statistics."""
        return self._fused(x, *moments, training=False)[0]

    def normalize_by_itself(self, x: tf.Tensor) -> tuple[tf.Tensor, Moments]:
        """Normalises with the batch's own statistics and returns them; the variance is the unbiased one."""
        if convolution := widening_convolution(x):
            gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
            before, kernel = convolution.inputs
            return convolved_and_normalized(before, kernel, gamma, beta, self.epsilon)
        if x.shape[-1] != self.gamma.shape[0]:  # several columns side by side
            return self._by_powers(x, *self._powers(x), tf.size(x))
        y, batch_mean, variance = self._fused(x, tf.zeros([0]), tf.zeros([0]), training=True)
        return y, (batch_mean, variance)

    def move_towards(self, batch: Moments) -> None:
        """Takes a batch's statistics into the running ones."""
        for variable, old, new in zip((self.moving_mean, self.moving_variance), self.running(), batch, strict=True):
            variable.assign(self.momentum * old + (1 - self.momentum) * new)

    def _powers(self, x: tf.Tensor) -> Moments:
        """Means of x and of its squares, float32[C]."""
        wide = tf.cast(x, tf.float32)
        first, second = (by_channel(tf.reduce_mean(v, [0, 1, 2]), self.gamma.shape[0]) for v in (wide, wide**2))
        return first, second

    def _by_powers(
        self, x: tf.Tensor, first: tf.Tensor, second: tf.Tensor, size: tf.Tensor
    ) -> tuple[tf.Tensor, Moments]:
        """Normalises with means of x and its squares over `size` numbers; gives the unbiased variance."""
        variance = tf.maximum(second - first**2, 0.0)
        scale = tf.convert_to_tensor(self.gamma) * tf.math.rsqrt(variance + self.epsilon)
        shift = tf.convert_to_tensor(self.beta) - first * scale
        y = tf.cast(tf.cast(x, tf.float32) * for_columns(scale, x) + for_columns(shift, x), x.dtype)
        count = tf.cast(size // self.gamma.shape[0], tf.float32)
        return y, (first, variance * count / tf.maximum(count - 1, 1))

    def _fused(
        self, x: tf.Tensor, mean_: tf.Tensor, variance: tf.Tensor, *, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=for_columns(tf.convert_to_tensor(self.gamma), x),
            offset=for_columns(tf.convert_to_tensor(self.beta), x),
            mean=for_columns(mean_, x),
            variance=for_columns(variance, x),
            epsilon=self.epsilon,
            is_training=training,
        )[:3]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape is kept."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("moco")
class SplitBatchNormalization(FusedBatchNormalization):
    """Normalises each of several groups of the local batch by itself, as that many devices would.

    The running statistics are averaged over the groups.

    Args:
        groups: by which the batch must be divisible.
    """

    def __init__(self, groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = groups

    def normalize_by_itself(self, x: tf.Tensor) -> tuple[tf.Tensor, Moments]:
        """See the base class."""
        parts = [super(SplitBatchNormalization, self).normalize_by_itself(part) for part in tf.split(x, self.groups)]
        means, variances = zip(*(moments for _, moments in parts), strict=True)
        return tf.concat([y for y, _ in parts], 0), (tf.add_n(means) / self.groups, tf.add_n(variances) / self.groups)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "groups": self.groups}


@keras.saving.register_keras_serializable("moco")
class SyncBatchNormalization(FusedBatchNormalization):
    """Normalises with the statistics of the global batch, summed over the replicas of the step."""

    def normalize_by_itself(self, x: tf.Tensor) -> tuple[tf.Tensor, Moments]:
        """See the base class."""
        replica = entered_replica()
        with tf.name_scope("batch_norm"):
            first, second = mean(replica, self._powers(x))
        return self._by_powers(x, first, second, tf.size(x) * replica.count)


@keras.saving.register_keras_serializable("moco")
class ShuffledBatchNorm(FusedBatchNormalization):
    """Normalises with statistics that it is given; a training call observes those of the batch at hand.

    For a key encoder: a key's normalisation then tells nothing of the batch that holds its query, on one device and
    with no traffic. The keys are made without `training`, with `bn_stats` or else what is in moving_mean and
    moving_variance. A training call normalises the batch by itself, and leaves its statistics there for a KeyQueue to
    keep (trainer_module.key_queue). They are two passes for a reason: observed where the layers below normalise with
    another batch's statistics, they would be further off with every layer, and after some steps without bounds.
    Statistics are float32 under every dtype policy.

    Example:
        import tensorflow as tf
        from trainer_module.keras_api import ShuffledBatchNorm

        norm = ShuffledBatchNorm()
        x = tf.random.normal([8, 4, 4, 3])
        y = norm(x, bn_stats=(tf.zeros([3]), tf.ones([3])))
        norm(x, training=True)
        observed = [norm.moving_mean.value, norm.moving_variance.value]    # of x, for the normalisation of later keys
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        # Keras would cast every argument to the activations' type, the statistics too.
        super().__init__(momentum, epsilon, autocast=False, **kwargs)

    def call(self, x: tf.Tensor, training: bool = False, bn_stats: Moments | None = None) -> tf.Tensor:
        """x: [N, H, W, C], bn_stats: mean and variance, float32[C] each -> [N, H, W, C].

        Where bn_stats are given, `training` changes nothing: they normalise, and nothing is observed.
        """
        x = tf.cast(x, self.compute_dtype)
        if training and bn_stats is None:
            y, observed = self.normalize_by_itself(x)
            for variable, value in zip((self.moving_mean, self.moving_variance), observed, strict=True):
                variable.assign(value)
            return y
        given_mean, given_variance = self.running() if bn_stats is None else bn_stats
        return self.normalize(x, (tf.cast(given_mean, tf.float32), tf.cast(given_variance, tf.float32)))


class BatchNorms(NamedTuple):
    """Makers of the layers of f_q and f_k, given `name` and `dtype`."""

    query: Callable[..., keras.Layer]
    key: Callable[..., keras.Layer]


def batch_norms(config: KeyBnConfig) -> BatchNorms:
    """The layers that a key-BN mode needs; the modes that move images need none of their own."""
    grouped = functools.partial(SplitBatchNormalization, config.groups)
    special = {
        KeyBnMode.split: BatchNorms(grouped, grouped),
        KeyBnMode.sync: BatchNorms(SyncBatchNormalization, SyncBatchNormalization),
        KeyBnMode.stored: BatchNorms(FusedBatchNormalization, ShuffledBatchNorm),
    }
    return special.get(config.mode, BatchNorms(FusedBatchNormalization, FusedBatchNormalization))
