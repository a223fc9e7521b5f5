"""A pointwise convolution and the batch normalisation behind it as one convolution, for TPUs.

n: images, K: channels that go in, C: channels that come out.

The batch's statistics of y = x W follow from those of x: its mean is mean(x) W, and its variances are the diagonal of
W^T cov(x) W. So they are known before y is, and the normalisation folds into the weights, as is usual for inference.
Where C is much more than K, as at the end of a ResNet's bottleneck, y is the largest tensor around. Folded, it is never
written, nor kept for the backward pass, nor read again there; the price is products of x with itself.
"""

from collections.abc import Callable

import tensorflow as tf

from trainer_module.column_pairs import by_channel, for_columns, kernel_of_pairs
from trainer_module.replica import on_tpu

Moments = tuple[tf.Tensor, tf.Tensor]
_WIDENS = 4  # C / K from which on it pays: there the products with x itself cost a quarter of the convolution


def widening_convolution(y: tf.Tensor) -> tf.Operation | None:
    """The pointwise convolution that made y on a TPU, if it has several times the channels of what went in.

    Elsewhere there is none: CPUs and GPUs have fused kernels for batch normalisation, and caches.
    """
    if not on_tpu() or y.op.type != "Conv2D":
        return None
    (x, kernel), strides = y.op.inputs, y.op.get_attr("strides")
    plain = x.shape[1:3] == y.shape[1:3] and strides == [1, 1, 1, 1]
    return y.op if plain and kernel.shape[:2] == [1, 1] and x.shape[3] * _WIDENS <= y.shape[3] else None


def convolved_and_normalized(
    x: tf.Tensor, kernel: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, Moments]:
    """Convolves and normalises with the batch's own statistics.

    Args:
        x: [n, H, W, K], or pairs of columns, [n, H, W / 2, 2 K].
        kernel: [1, 1, K, C] of x's type, or of pairs.
        gamma, beta: float32[C].
        epsilon: added to the variance.

    Returns:
        [n, H, W, C] of x's type or pairs, and the mean and the unbiased variance of what is normalised, float32[C].
    """
    channels = x.shape[3] * gamma.shape[0] // kernel.shape[3]
    columns = x.shape[3] // channels
    count = tf.cast(tf.size(x) // channels, tf.float32)
    weights = tf.cast(kernel[0, 0, :channels, : gamma.shape[0]], tf.float32)  # KxC
    mean_x = by_channel(tf.reduce_mean(tf.cast(x, tf.float32), [0, 1, 2]), channels)  # K
    products = tf.reshape(_second_moments(x), [columns, channels, columns, channels])
    products = tf.add_n([products[i, :, i] for i in range(columns)])  # of a column with itself
    covariance = products / count - mean_x[:, tf.newaxis] * mean_x  # KxK
    mean = tf.linalg.matvec(weights, mean_x, transpose_a=True)  # C
    variance = tf.maximum(tf.reduce_sum(weights * tf.matmul(covariance, weights), 0), 0.0)  # C
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    folded = tf.cast(weights * scale, x.dtype)[tf.newaxis, tf.newaxis]
    y = tf.nn.conv2d(x, kernel_of_pairs(folded) if columns > 1 else folded, 1, "VALID")
    y = tf.cast(y, tf.float32) + for_columns(beta - mean * scale, y)
    return tf.cast(y, x.dtype), (mean, variance * count / tf.maximum(count - 1, 1))


def _pointwise(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.nn.conv2d(x, weights[tf.newaxis, tf.newaxis], 1, "VALID")


@tf.custom_gradient
def _second_moments(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """[n, H, W, K] -> float32[K, K]: products of all pairs of channels, summed in float32 whatever x's type."""

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        return _pointwise(x, tf.cast(dy + tf.transpose(dy), x.dtype))

    wide = tf.cast(x, tf.float32)
    return tf.einsum("nhwk,nhwl->kl", wide, wide), gradient
