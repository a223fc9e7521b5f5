"""A ResNet's first maps with neighbouring columns of pixels side by side in the channels, for TPUs.

A TPU keeps channels in vectors of 128 lanes, so that 64 channels take the memory and the time of 128. Stem and first
stage have 64, on the largest maps of the network. Here they are pairs, [n, H, W, C] as [n, H, W / 2, 2 C]: the same
numbers, and every lane has one. The first convolution makes them, the first of stride 2 after the stem undoes them;
what is in between keeps them, convolutions by kernels with zeros where a column would meet what it must not. Before a
pooling there are fours, [n, H, W / 4, 4 C], columns 0 and 2 before 1 and 3: so the maximum of neighbours is a pair, and
but one of the three that it is taken of has to be moved across lanes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from trainer_module.replica import on_tpu

_LANES = 128
_STRIDE = 2  # of the pooling
_ORDER = {1: (0, 1), 2: (0, 2, 1, 3)}  # columns that lie side by side, by the stride of the first convolution


@keras.saving.register_keras_serializable("moco")
class Convolution(keras.layers.Conv2D):
    """A convolution without bias that takes pairs of columns, too; pairs with stride 1 stay pairs, with 2 they do not.

    Kernels are square with odd sides, and padded by half on both sides; with stride 2 before this layer.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the kernel, float32[h, w, c, C]."""
        super().build(input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=4)  # Keras asks for c channels

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """x: [n, H, W, c] or [n, H, W / 2, 2 c] -> [n, H', W', C] or [n, H, W / 2, 2 C]."""
        if x.shape[-1] != self.kernel.shape[2]:
            return convolved_pairs(x, tf.convert_to_tensor(self.kernel), self.strides[0])
        return super().call(x)


@keras.saving.register_keras_serializable("moco")
class StemConvolution(Convolution):
    """The first convolution: on a TPU, where lanes are left, it gives pairs of columns, with stride 2 fours.

    Elsewhere, and where a map's sides are no multiples, it is Conv2D.
    """

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """x: [n, ...] -> [n, H, W, C], or on a TPU [n, H, W / 2, 2 C] or [n, H, W / 4, 4 C]."""
        _, height, width, channels = self.compute_output_shape(x.shape)
        order = _ORDER[self.strides[0]]
        if _lanes_are_left(x.shape[0], channels) and height % 2 == width % len(order) == 0:
            return convolved_side_by_side(x, tf.convert_to_tensor(self.kernel), self.strides[0], order)
        return super().call(x)


@keras.saving.register_keras_serializable("moco")
class StemPooling(keras.layers.MaxPooling2D):
    """The maximum of 3x3 pixels that are not negative, from every second one, with zeros around them; of fours, too.

    Args:
        padding_before, padding_after: rows and columns of zeros.
    """

    def __init__(self, padding_before: int, padding_after: int, **kwargs: Any) -> None:
        super().__init__(3, strides=_STRIDE, **kwargs)
        self.around = (padding_before, padding_after)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Remembers C."""
        self.channels = input_shape[-1]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """x: [n, H, W, C], not negative -> [n, H / 2, W / 2, C], or fours of columns -> pairs."""
        if x.shape[-1] != self.channels:
            return pooled_to_pairs(x)
        return super().call(tf.pad(x, [[0, 0], self.around, self.around, [0, 0]]))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Of [n, H, W, C]."""
        n, height, width, channels = input_shape
        sides = [None if side is None else (side + sum(self.around) - 3) // _STRIDE + 1 for side in (height, width)]
        return n, *sides, channels

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        given = {name: value for name, value in super().get_config().items() if name in ("name", "trainable", "dtype")}
        return {**given, "padding_before": self.around[0], "padding_after": self.around[1]}


def _lanes_are_left(images: int, channels: int) -> bool:
    """Whether this is a TPU whose lanes neither channels fill nor images, which the compiler puts there if they do."""
    return on_tpu() and 2 * channels <= _LANES and images % _LANES != 0


def convolved_side_by_side(x: tf.Tensor, kernel: tf.Tensor, stride: int, order: Sequence[int]) -> tf.Tensor:
    """Several columns at once, by a kernel that holds as many.

    Args:
        x: [n, H, W, c]; padded by half the kernel where the stride is 2.
        kernel: [h, w, c, C].
        stride: 1 or 2.
        order: of the columns 0 to S - 1 in the channels.

    Returns:
        [n, H', W' / S, S C], W' a multiple of S.
    """
    last = len(order) - 1
    shifts = [[stride * column, stride * (last - column)] for column in order]
    wide = tf.concat([tf.pad(kernel, [[0, 0], shift, [0, 0], [0, 0]]) for shift in shifts], 3)
    half = [kernel.shape[0] // 2] * 2 if stride == 1 else [0, 0]
    return tf.nn.conv2d(x, wide, [stride, len(order) * stride], [[0, 0], half, half, [0, 0]])


def convolved_pairs(x: tf.Tensor, kernel: tf.Tensor, stride: int) -> tf.Tensor:
    """Convolves pairs of columns.

    Args:
        x: [n, H, W / 2, 2 c]; padded by half the kernel, in pairs rounded up, where the stride is 2.
        kernel: [h, w, c, C].
        stride: 1 or 2.

    Returns:
        [n, H, W / 2, 2 C] with stride 1, [n, H / 2, W / 2, C] with stride 2.
    """
    if stride == 1:
        return tf.nn.conv2d(x, kernel_of_pairs(kernel), 1, "SAME")
    before, after = (kernel.shape[1] // 2 + 1) // 2, kernel.shape[1] // 4  # pairs
    left = 2 * before - kernel.shape[1] // 2
    return tf.nn.conv2d(x, _over_pairs(kernel, left, before + 1 + after), [stride, 1], "VALID")


def kernel_of_pairs(kernel: tf.Tensor) -> tf.Tensor:
    """[h, w, c, C] -> [h, v, 2 c, 2 C], v odd: what makes pairs of pairs as the kernel makes columns of columns."""
    half = kernel.shape[1] // 2
    before = (half + 1) // 2
    columns = [_over_pairs(kernel, 2 * before - half + column, 2 * before + 1) for column in (0, 1)]
    return tf.concat(columns, 3)


def _over_pairs(kernel: tf.Tensor, left: int, pairs: int) -> tf.Tensor:
    """[h, w, c, C] -> [h, pairs, 2 c, C]: the kernel `left` columns to the right of the first pair's first column."""
    height, width, given, made = kernel.shape
    wide = tf.pad(kernel, [[0, 0], [left, 2 * pairs - width - left], [0, 0], [0, 0]])
    return tf.reshape(wide, [height, pairs, 2 * given, made])


def pooled_to_pairs(x: tf.Tensor) -> tf.Tensor:
    """The maximum of 3x3 pixels around every second one, of numbers that are not negative; on a TPU.

    Where several are the largest, the gradient goes to one of them, as with any other pooling.

    Args:
        x: [n, H, W / 4, 4 C], columns 0, 2, 1, 3; H even.

    Returns:
        [n, H / 2, W / 4, 2 C].
    """
    even, odd = tf.split(_maximum_of_three_rows(x), 2, axis=3)
    left, right = tf.split(odd, 2, axis=3)
    before = tf.concat([_one_before(right), left], 3)
    return tf.maximum(tf.maximum(before, even), odd)


def _one_before(x: tf.Tensor) -> tf.Tensor:
    """Each column is the one before it, the first is zero."""
    return tf.slice(tf.pad(x, [[0, 0], [0, 0], [1, 0], [0, 0]]), [0] * 4, [-1, *x.shape[1:]])


@tf.custom_gradient
def _maximum_of_three_rows(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """[n, H, W, C] -> [n, H / 2, W, C], by XLA's windows: they have a border, so no padded copy is written or kept."""
    windows = {
        "window_dimensions": [1, 3, 1, 1],
        "window_strides": [1, _STRIDE, 1, 1],
        "padding": [[0, 0], [1, 0], [0, 0], [0, 0]],
    }
    add, maximum, select = (_of_two_numbers(does, x.dtype) for does in (tf.add, tf.maximum, tf.greater_equal))
    ones, zero = [1] * 4, tf.zeros([], x.dtype)

    def gradient(dy: tf.Tensor) -> tf.Tensor:
        dx = gen_xla_ops.xla_select_and_scatter(
            operand=x, source=dy, init_value=zero, select=select, scatter=add, **windows
        )
        return tf.ensure_shape(dx, x.shape)

    y = gen_xla_ops.xla_reduce_window(
        input=x, init_value=zero, base_dilations=ones, window_dilations=ones, computation=maximum, **windows
    )
    n, height, *rest = x.shape
    return tf.ensure_shape(y, [n, height // _STRIDE, *rest]), gradient


def _of_two_numbers(function: Callable[..., tf.Tensor], dtype: tf.DType) -> Any:
    number = tf.TensorSpec([], dtype)
    return tf.function(function, autograph=False).get_concrete_function(number, number)


def for_columns(values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Numbers by channel, [C], as x has channels: [C], or [S C] where it has S columns side by side."""
    return values if values.shape[0] in (0, x.shape[-1]) else tf.tile(values, [x.shape[-1] // values.shape[0]])


def by_channel(means: tf.Tensor, channels: int) -> tf.Tensor:
    """Means over pixels by channel, [C], of [C] or, where S columns are side by side, of [S C]."""
    return means if means.shape[0] == channels else tf.reduce_mean(tf.reshape(means, [-1, channels]), 0)
