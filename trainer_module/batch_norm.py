"""Batch normalisation for MoCo's encoders (Keras 3 layers)."""

import keras
import tensorflow as tf


class FusedBatchNormalization(keras.layers.Layer):
    """Batch normalisation over the local batch as one fused op, forward and backward.

    Keras's own layer computes mean, variance and the affine map in separate passes; the fused op reads the activations
    once. As in PyTorch the running variance takes the unbiased batch variance.
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: object) -> None:
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
        moving_mean, moving_variance = (tf.convert_to_tensor(v) for v in (self.moving_mean, self.moving_variance))
        nothing = tf.zeros([0])
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=tf.convert_to_tensor(self.gamma),
            offset=tf.convert_to_tensor(self.beta),
            mean=nothing if training else moving_mean,
            variance=nothing if training else moving_variance,
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            self.moving_mean.assign(self.momentum * moving_mean + (1 - self.momentum) * mean)
            self.moving_variance.assign(self.momentum * moving_variance + (1 - self.momentum) * variance)
        return y

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape is kept."""
        return input_shape
