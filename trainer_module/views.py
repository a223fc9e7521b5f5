"""The augmentation recipe of MoCo, once: seeded pairs of views (main_moco.py; arXiv 2003.04297, section 3).

A view depends on (seed, image id, pair index, query or key) and on the stored image alone. Its bytes are the same in
Beam, in tf.data and in eager TensorFlow, however many threads there are: draws are stateless Philox, and wherever
several terms are added up, the terms are multiples of a power of two that leave no rounding in float32, so that the
order of the additions does not matter.

The operations follow torchvision on PIL images, which MoCo's code uses. Pillow rounds down to uint8 after each of
them; here values stay float32 and are rounded once at the end (saturation, grayscale and blur round what they read, to
whole grey levels). Each operation is within 2 grey levels of Pillow's except hue, where Pillow keeps the hue itself in
8 bits (mean difference below 2, see the tests), and blur, where Pillow approximates the Gaussian by boxes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer_module.config import AugmentConfig, RecipeOrder
from trainer_module.images import to_uint8

_GRAY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2 luma in 16 bits, as Pillow's "L"
_CROP_ATTEMPTS = 10
_STEPS = ("brightness", "contrast", "saturation", "hue")

Operation = Callable[[tf.Tensor], tf.Tensor]


class ViewParameters(NamedTuple):
    """What was drawn for some views; every tensor has their number V as its first dimension.

    Attributes:
        top, left, height, width: int32 [V], of the crop, in pixels of the image.
        jitter: bool [V], whether brightness, contrast, saturation and hue are changed at all.
        order: int32 [V, 4], in which these four are applied, 0 to 3 as listed.
        brightness, contrast, saturation: float32 [V], factors; 1 changes nothing.
        hue: float32 [V], shift in turns.
        gray, blur, flip: bool [V], whether the view is turned grey, blurred, mirrored.
        sigma: float32 [V], standard deviation of the blur in pixels of the view.
    """

    top: tf.Tensor
    left: tf.Tensor
    height: tf.Tensor
    width: tf.Tensor
    jitter: tf.Tensor
    order: tf.Tensor
    brightness: tf.Tensor
    contrast: tf.Tensor
    saturation: tf.Tensor
    hue: tf.Tensor
    gray: tf.Tensor
    blur: tf.Tensor
    flip: tf.Tensor
    sigma: tf.Tensor


def view_pair(
    image: tf.Tensor, id_hex: tf.Tensor, pair: tf.Tensor, seed: int | tf.Tensor, config: AugmentConfig
) -> tf.Tensor:
    """Makes one pair of views of a stored image.

    Args:
        image: uint8 [h, w, 3], the stored image.
        id_hex: string [], hex SHA-256 of the original file.
        pair: int64 [], index of the pair; the epoch that uses it.
        seed: of the experiment; an int, or int64 [].
        config: the recipe.

    Returns:
        uint8 [2, size, size, 3]: query and key.
    """
    parameters = draw_parameters(tf.shape(image)[:2], id_hex, pair, seed, config)
    query, key = zip(*(tf.unstack(p, num=2) for p in parameters), strict=True)
    return tf.stack([make_view(image, ViewParameters(*one), config) for one in (query, key)])


def draw_parameters(
    image_size: tf.Tensor, id_hex: tf.Tensor, pair: tf.Tensor, seed: int | tf.Tensor, config: AugmentConfig
) -> ViewParameters:
    """Draws the parameters of the query (0) and the key (1) of one pair.

    Args:
        image_size: int32 [2], height and width of the stored image.
        id_hex, pair, seed, config: see `view_pair`.

    Returns:
        V = 2 views.
    """
    area, ratio, order, rest = tf.split(
        _uniforms(id_hex, pair, seed, 2 * _CROP_ATTEMPTS + 4 + 11), [_CROP_ATTEMPTS, _CROP_ATTEMPTS, 4, 11], axis=1
    )
    # One operation takes them apart; a slice for each would cost more than all the draws.
    y, x, jitter, brightness, contrast, saturation, hue, gray, blur, flip, sigma = tf.unstack(rest, axis=1)
    top, left, height, width = _draw_crop(tf.cast(image_size, tf.float32), area, ratio, y, x, config)

    def factor(uniform: tf.Tensor, strength: float) -> tf.Tensor:
        return _between(uniform, max(0.0, 1 - strength), 1 + strength)

    return ViewParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        jitter=jitter < config.jitter_probability,
        order=tf.argsort(order, axis=1, stable=True),
        brightness=factor(brightness, config.brightness),
        contrast=factor(contrast, config.contrast),
        saturation=factor(saturation, config.saturation),
        hue=_between(hue, -config.hue, config.hue),
        gray=gray < config.gray_probability,
        blur=blur < config.blur_probability,
        flip=flip < config.flip_probability,
        sigma=_between(sigma, config.blur_sigma_min, config.blur_sigma_max),
    )


@tf.function(autograph=False)
def make_view(image: tf.Tensor, parameters: ViewParameters, config: AugmentConfig) -> tf.Tensor:
    """Makes one view with given parameters.

    Args:
        image: uint8 [h, w, 3].
        parameters: of this view, without the dimension V.
        config: the recipe; only its size, order, strengths of 0 and probabilities of 0 or 1 matter here.

    Returns:
        uint8 [size, size, 3].
    """
    view = resized_crop(image, parameters.top, parameters.left, parameters.height, parameters.width, config.size)

    def jitter(view: tf.Tensor) -> tf.Tensor:
        return _when(parameters.jitter, config.jitter_probability, lambda v: _jitter(v, parameters, config), view)

    def gray(view: tf.Tensor) -> tf.Tensor:
        return _when(parameters.gray, config.gray_probability, to_gray, view)

    view = jitter(gray(view)) if config.order is RecipeOrder.v1 else gray(jitter(view))
    view = _when(
        parameters.blur,
        config.blur_probability,
        lambda v: gaussian_blur(v, parameters.sigma, config.blur_sigma_max),
        view,
    )
    return _when(parameters.flip, config.flip_probability, lambda v: tf.reverse(v, [1]), to_uint8(view))


def resized_crop(
    image: tf.Tensor, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor, size: int
) -> tf.Tensor:
    """Cuts a box and resizes it, bilinear and antialiased: uint8 [h, w, 3] -> float32 [size, size, 3]."""
    crop = image[top : top + height, left : left + width]
    # Where nothing shrinks, antialiasing changes nothing, and the plain kernel takes a third of the time.
    resized = tf.cond(
        tf.maximum(height, width) <= size,
        lambda: tf.image.resize(tf.cast(crop, tf.float32), [size, size]),
        lambda: tf.image.resize(crop, [size, size], antialias=True),
    )
    return tf.ensure_shape(resized, [size, size, 3])


def adjust_brightness(view: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with black: float32 [S, S, 3] in [0, 255] -> the same."""
    return tf.clip_by_value(view * factor, 0.0, 255.0)


def adjust_contrast(view: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the mean grey level of the view: float32 [S, S, 3] in [0, 255] -> the same."""
    return tf.clip_by_value(view * factor + _mean_gray(view) * (1.0 - factor), 0.0, 255.0)


def adjust_saturation(view: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the grey view: float32 [S, S, 3] in [0, 255] -> the same. factor is at most 3."""
    matrix = factor * tf.eye(3) + (1.0 - factor) * tf.constant(_GRAY)[:, tf.newaxis]
    return tf.clip_by_value(_mix_channels(view, tf.round(matrix * 4096.0) / 4096.0), 0.0, 255.0)


def adjust_hue(view: tf.Tensor, turns: tf.Tensor) -> tf.Tensor:
    """Shifts the hue in HSV: float32 [S, S, 3] in [0, 255] -> the same."""
    return tf.raw_ops.AdjustHue(images=view, delta=turns)


def to_gray(view: tf.Tensor) -> tf.Tensor:
    """Luma by ITU-R 601, in all three channels: float32 [S, S, 3] in [0, 255] -> the same."""
    return _mix_channels(view, tf.repeat(tf.constant(_GRAY)[:, tf.newaxis], 3, axis=1))


def gaussian_blur(view: tf.Tensor, sigma: tf.Tensor, sigma_max: float) -> tf.Tensor:
    """Gaussian blur; beyond the border, the border's pixels repeat.

    Args:
        view: float32 [S, S, 3] in [0, 255].
        sigma: float32 [], standard deviation in pixels.
        sigma_max: the largest that sigma can be; the kernel reaches three times as far.

    Returns:
        float32 [S, S, 3] in [0, 255].
    """
    radius = math.ceil(3 * sigma_max)
    kernel = _gaussian(sigma, radius)
    rounded = tf.floor(view + 0.5)
    # Between the passes sixteenths of a grey level are kept: 12 bits, times weights of 12 bits.
    sixteenths = tf.floor(_blur_columns(rounded, kernel * 16.0, radius) + 0.5)
    return _blur_rows(sixteenths, kernel / 16.0, radius)


def _uniforms(id_hex: tf.Tensor, pair: tf.Tensor, seed: int | tf.Tensor, count: int) -> tf.Tensor:
    """Uniform draws in [0, 1) of one pair: float32 [2, count]."""
    key = tf.stack([tf.convert_to_tensor(seed, tf.int64), _first_8_bytes(id_hex)])
    key = tf.random.experimental.stateless_fold_in(key, tf.cast(pair, tf.int64), alg="philox")
    return tf.random.stateless_uniform([2, count], key, alg="philox")


def _first_8_bytes(id_hex: tf.Tensor) -> tf.Tensor:
    """The first 16 hex digits of a string [] as int64 []."""
    digits = tf.cast(tf.io.decode_raw(tf.strings.substr(id_hex, 0, 16), tf.uint8), tf.int64)
    nibbles = digits % 16 + 9 * (digits // 64)  # "0" is 0x30, "a" is 0x61
    shifts = tf.constant(np.arange(60, -1, -4), tf.int64)
    return tf.reduce_sum(tf.bitwise.left_shift(nibbles, shifts))


def _between(uniform: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + uniform * (high - low)


def _draw_crop(
    image_size: tf.Tensor, area: tf.Tensor, ratio: tf.Tensor, y: tf.Tensor, x: tf.Tensor, config: AugmentConfig
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """torchvision's RandomResizedCrop.get_params: the first of ten boxes that fits, else a centre crop.

    Args:
        image_size: float32 [2], height and width.
        area, ratio: float32 [V, 10], uniform draws of the ten boxes.
        y, x: float32 [V], uniform draws of the place.
        config: the ranges.

    Returns:
        top, left, height, width: int32 [V].
    """
    areas = _between(area, config.crop_scale_min, config.crop_scale_max) * tf.reduce_prod(image_size)
    ratios = tf.exp(_between(ratio, math.log(config.crop_ratio_min), math.log(config.crop_ratio_max)))
    boxes = tf.round(tf.stack([tf.sqrt(areas / ratios), tf.sqrt(areas * ratios)], axis=2))  # [V, 10, 2]
    fits = tf.reduce_all((boxes >= 1.0) & (boxes <= image_size), axis=2)
    first = tf.gather(boxes, tf.argmax(fits, axis=1), axis=1, batch_dims=1)  # [V, 2]
    any_fits = tf.reduce_any(fits, axis=1, keepdims=True)
    box = tf.where(any_fits, first, _largest_box(image_size, config))
    # A draw just below 1 times a large number can round up to that number.
    place = tf.minimum(tf.floor(tf.stack([y, x], axis=1) * (image_size - box + 1.0)), image_size - box)
    place = tf.where(any_fits, place, tf.floor((image_size - box) / 2.0))
    top, left = tf.unstack(tf.cast(place, tf.int32), axis=1)
    height, width = tf.unstack(tf.cast(box, tf.int32), axis=1)
    return top, left, height, width


def _largest_box(image_size: tf.Tensor, config: AugmentConfig) -> tf.Tensor:
    """The largest box whose ratio is allowed: float32 [2] -> float32 [2]."""
    height, width = tf.unstack(image_size)
    box = tf.stack(
        [
            tf.minimum(height, tf.round(width / config.crop_ratio_min)),
            tf.minimum(width, tf.round(height * config.crop_ratio_max)),
        ]
    )
    return tf.maximum(box, 1.0)


def _when(drawn: tf.Tensor, probability: float, operation: Operation, view: tf.Tensor) -> tf.Tensor:
    """Applies an operation if it was drawn; one that never or always is costs no decision."""
    if probability <= 0:
        return view
    if probability >= 1:
        return operation(view)
    return tf.cond(drawn, lambda: operation(view), lambda: view)


def _jitter(view: tf.Tensor, parameters: ViewParameters, config: AugmentConfig) -> tf.Tensor:
    operations: dict[str, Operation] = {
        "brightness": lambda v: adjust_brightness(v, parameters.brightness),
        "contrast": lambda v: adjust_contrast(v, parameters.contrast),
        "saturation": lambda v: adjust_saturation(v, parameters.saturation),
        "hue": lambda v: adjust_hue(v, parameters.hue),
    }
    active = [operations[step] if getattr(config, step) > 0 else (lambda v: v) for step in _STEPS]
    for chosen in tf.unstack(parameters.order, num=len(_STEPS)):
        view = _chosen(chosen, active, view)
    return view


def _chosen(index: tf.Tensor, operations: list[Operation], view: tf.Tensor) -> tf.Tensor:
    return tf.switch_case(index, [lambda op=op: op(view) for op in operations])


def _mean_gray(view: tf.Tensor) -> tf.Tensor:
    """The mean grey level, rounded as Pillow does: float32 [S, S, 3] -> float32 []."""
    size = view.shape[0]
    columns = tf.reduce_sum(tf.reshape(tf.floor(view + 0.5), [size, 3 * size]), axis=0)  # below 2^24: exact
    channels = tf.reduce_sum(tf.cast(tf.reshape(columns, [size, 3]), tf.float64), axis=0)
    mean = tf.reduce_sum(channels * tf.constant(_GRAY, tf.float64)) / size**2
    return tf.cast(tf.floor(mean + 0.5), tf.float32)


def _mix_channels(view: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """Rounds to whole grey levels, then mixes the channels.

    Args:
        view: float32 [S, S, 3].
        matrix: float32 [3 from, 3 to], multiples of 2^-12, or of 2^-16 if each column sums up to 1: then 255 times
            the sums fits into 24 bits.

    Returns:
        float32 [S, S, 3].
    """
    # Several pixels at once: a product with 3 rows and columns would leave most of the processor idle.
    pixels = math.gcd(view.shape[0] ** 2, 4)
    block = tf.eye(pixels)[:, tf.newaxis, :, tf.newaxis] * matrix[tf.newaxis, :, tf.newaxis, :]
    block = tf.reshape(block, [3 * pixels, 3 * pixels])
    rows = tf.reshape(tf.floor(view + 0.5), [-1, 3 * pixels])
    return tf.reshape(tf.matmul(rows, block), view.shape)


def _gaussian(sigma: tf.Tensor, radius: int) -> tf.Tensor:
    """Weights in multiples of 2^-12 that sum up to exactly 1: float32 [2 * radius + 1]."""
    distance = tf.range(1, radius + 1, dtype=tf.float32)
    side = tf.exp(-0.5 * tf.square(distance / sigma))
    side = tf.round(side / (1.0 + 2.0 * tf.reduce_sum(side)) * 4096.0) / 4096.0
    return tf.concat([side[::-1], [1.0 - 2.0 * tf.reduce_sum(side)], side], axis=0)


def _blur_columns(view: tf.Tensor, kernel: tf.Tensor, radius: int) -> tf.Tensor:
    """Convolves along the height, as a product with the kernel's band matrix in blocks of rows."""
    size = view.shape[0]
    block = _block(size, 32)
    rows = np.arange(0, size, block)[:, None] + np.arange(-radius, block + radius)  # [S / block, block + 2 radius]
    windows = tf.gather(tf.reshape(view, [size, 3 * size]), np.clip(rows, 0, size - 1))
    return tf.reshape(tf.matmul(_band(kernel, block), windows), view.shape)


def _blur_rows(view: tf.Tensor, kernel: tf.Tensor, radius: int) -> tf.Tensor:
    """Convolves along the width, as a strided convolution whose channels are blocks of columns."""
    size = view.shape[1]
    block = _block(size, 16)
    border = np.zeros(radius, np.int32)
    wide = tf.concat([tf.gather(view, border, axis=1), view, tf.gather(view, border + size - 1, axis=1)], axis=1)
    band = tf.transpose(_band(kernel, block))[:, tf.newaxis, :, tf.newaxis] * tf.eye(3)[:, tf.newaxis, :]
    filters = tf.reshape(band, [1, block + 2 * radius, 3, 3 * block])
    return tf.reshape(tf.nn.conv2d(wide[tf.newaxis], filters, [1, block], "VALID"), view.shape)


def _block(size: int, most: int) -> int:
    """The largest divisor of size up to `most`."""
    return next(block for block in range(most, 0, -1) if size % block == 0)


def _band(kernel: tf.Tensor, rows: int) -> tf.Tensor:
    """float32 [K] -> float32 [rows, rows + K - 1]; row i holds the kernel from column i on."""
    taps = kernel.shape[0]
    offset = np.arange(rows + taps - 1) - np.arange(rows)[:, None]
    inside = (offset >= 0) & (offset < taps)
    return tf.gather(tf.concat([kernel, [0.0]], axis=0), np.where(inside, offset, taps))
