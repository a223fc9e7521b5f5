"""From encoded bytes to pixels: the one code that Transform, ViewAugmenter, the trainer and the served model share.

TensorFlow operations only, so everything here also runs inside tf.data and an exported graph.
"""

import functools
import math
from collections.abc import Sequence

import tensorflow as tf

from trainer_module.config import AugmentConfig, ImageConfig
from trainer_module.errors import UserError

_DCT_RATIOS = (1, 2, 4, 8)  # by which libjpeg can shrink an image while it decodes


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, PNG, GIF (first frame) or BMP image.

    JPEG is decoded as Pillow does (accurate integer DCT, smooth chroma), transparent PNG is laid on white. The
    orientation that a camera notes in EXIF is not applied.

    Args:
        encoded: string [], a whole file.

    Returns:
        uint8 [H, W, 3].

    Raises:
        tf.errors.InvalidArgumentError: the bytes are none of these formats, or damaged.
    """
    return _with_shape(tf.cond(_starts(encoded, b"\xff\xd8\xff"), lambda: _jpeg(encoded, 1), lambda: _other(encoded)))


def decode_at_least(encoded: tf.Tensor, side: int) -> tf.Tensor:
    """Decodes an image at a smaller scale where that is cheap, and its shorter side stays at `side` or more.

    A JPEG is shrunk by 2, 4 or 8 within its DCT, which saves most of the work of large photographs. Other formats, and
    images whose shorter side is below `side`, are decoded as they are.

    Args:
        encoded: string [], see `decode`.
        side: pixels that the shorter side must keep.

    Returns:
        uint8 [H, W, 3].
    """
    is_jpeg = _starts(encoded, b"\xff\xd8\xff")
    return _with_shape(tf.cond(is_jpeg, lambda: _shrunk_jpeg(encoded, side), lambda: _other(encoded)))


def stored_image(encoded: tf.Tensor, config: ImageConfig) -> tf.Tensor:
    """Brings an image to the size at which the pipeline keeps it.

    The shorter side becomes config.storage_size: larger images shrink by averaging areas, the sharpest antialiasing,
    for views are resized once more; smaller ones are enlarged bilinearly. An image longer than config.max_aspect is
    cropped at its centre first. An image that has its size already is returned untouched.

    Args:
        encoded: string [], see `decode`.
        config: geometry of the stored image.

    Returns:
        uint8 [h, w, 3] with min(h, w) == config.storage_size.
    """
    image = _limit_aspect(decode_at_least(encoded, config.storage_size), config.max_aspect)
    size = tf.shape(image)[:2]
    target = _scaled_size(size, config.storage_size)
    resized = tf.case(
        [
            (tf.reduce_all(tf.equal(size, target)), lambda: image),
            (tf.reduce_min(size) > config.storage_size, lambda: _resize(image, target, tf.image.ResizeMethod.AREA)),
        ],
        default=lambda: _resize(image, target, tf.image.ResizeMethod.BILINEAR),
    )
    return _with_shape(resized)


def centre_view(image: tf.Tensor, resize: int, size: int) -> tf.Tensor:
    """The view that an image is embedded by: resized, then cropped at its centre.

    Args:
        image: any number type [H, W, 3], values in [0, 255].
        resize: shorter side after the antialiased resize, at least `size`; see `eval_resize`.
        size: side of the view.

    Returns:
        float32 [size, size, 3] in [0, 255].

    Raises:
        ValueError: `resize` is below `size`.
    """
    return centre_views(image[tf.newaxis], resize, size)[0]


def centre_views(images: tf.Tensor, resize: int, size: int) -> tf.Tensor:
    """As `centre_view`, for a batch of images of one size: [N, H, W, 3] -> float32 [N, size, size, 3]."""
    if resize < size:
        raise ValueError(f"the shorter side is resized to {resize} px, which is below the crop of {size} px")
    images = tf.cast(images, tf.float32)
    before = tf.shape(images)[1:3]
    target = _scaled_size(before, resize)
    resized = tf.cond(
        tf.reduce_all(tf.equal(before, target)), lambda: images, lambda: tf.image.resize(images, target, antialias=True)
    )
    top, left = tf.unstack((target - size) // 2)
    views = resized[:, top : top + size, left : left + size]
    return tf.ensure_shape(views, [images.shape[0], size, size, 3])


def eval_resize(image: ImageConfig, augment: AugmentConfig) -> int:
    """The shorter side for `centre_view`: image.eval_resize, or the usual 256/224 of the view where that is 0."""
    return image.eval_resize or round(augment.size * 256 / 224)


def check_channel_statistics(mean: Sequence[float], variance: Sequence[float], folder: str) -> None:
    """Refuses statistics that would make every normalised pixel NaN.

    It is the one way by which a NaN could reach the encoder: ingestion takes integer formats only, and stored images
    and views are uint8.

    Args:
        mean, variance: per channel, as the Transform graph gives them.
        folder: of that graph.

    Raises:
        UserError: one of them is not a finite number, or a variance is negative.
    """
    if not (all(map(math.isfinite, (*mean, *variance))) and min(variance) >= 0):
        raise UserError(
            f"the Transform graph's channel statistics are no use: mean {_listed(mean)}, variance {_listed(variance)}; "
            f"delete {folder} and run again"
        )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds float32 values in [0, 255] to uint8, halves upwards."""
    return tf.cast(image + 0.5, tf.uint8)


def _starts(encoded: tf.Tensor, magic: bytes) -> tf.Tensor:
    return tf.equal(tf.strings.substr(encoded, 0, len(magic)), magic)


def _with_shape(image: tf.Tensor) -> tf.Tensor:
    return tf.ensure_shape(image, [None, None, 3])


def _jpeg(encoded: tf.Tensor, ratio: int) -> tf.Tensor:
    # What is shrunk has no Pillow image that it could equal, so there the faster DCT will do.
    method = "INTEGER_ACCURATE" if ratio == 1 else "INTEGER_FAST"
    return tf.io.decode_jpeg(encoded, channels=3, ratio=ratio, fancy_upscaling=True, dct_method=method)


def _shrunk_jpeg(encoded: tf.Tensor, side: int) -> tf.Tensor:
    shorter = tf.reduce_min(tf.io.extract_jpeg_shape(encoded)[:2])
    image = functools.partial(_jpeg, encoded, _DCT_RATIOS[0])
    # Nested conditions: TFT cannot hash the Case operation that tf.switch_case makes.
    for ratio in _DCT_RATIOS[1:]:
        fits = (shorter + ratio - 1) // ratio >= side  # libjpeg rounds the scaled size up
        image = functools.partial(tf.cond, fits, functools.partial(_jpeg, encoded, ratio), image)
    return image()


def _other(encoded: tf.Tensor) -> tf.Tensor:
    """PNG, BMP, or GIF; the latter also is where an unknown format is refused."""
    return tf.case(
        [
            (_starts(encoded, b"\x89PNG"), lambda: _on_white(tf.io.decode_png(encoded))),
            (_starts(encoded, b"BM"), lambda: _bmp(encoded)),
        ],
        default=lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
        exclusive=True,
    )


def _bmp(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_bmp(encoded)
    return tf.gather(image, tf.minimum([0, 1, 2], tf.shape(image)[2] - 1), axis=2)  # grey, RGB, or RGB and padding


def _on_white(image: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, C], C one of grey, grey and alpha, RGB, RGBA -> uint8 [H, W, 3]."""
    channels = tf.shape(image)[2]
    colours = channels - 1 + channels % 2
    rgb = tf.cond(
        tf.equal(channels, 3), lambda: image, lambda: tf.gather(image, tf.minimum([0, 1, 2], colours - 1), axis=2)
    )
    return tf.cond(tf.equal(channels, colours), lambda: rgb, lambda: _blend_with_white(rgb, image[..., -1:]))


def _blend_with_white(rgb: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
    rest = tf.cast(255 - rgb, tf.float32) * (tf.cast(alpha, tf.float32) / 255.0)
    return to_uint8(255.0 - rest)


def _resize(image: tf.Tensor, size: tf.Tensor, method: str) -> tf.Tensor:
    return to_uint8(tf.image.resize(image, size, method))


def _limit_aspect(image: tf.Tensor, max_aspect: float) -> tf.Tensor:
    size = tf.shape(image)[:2]
    longest = tf.cast(tf.cast(tf.reduce_min(size), tf.float32) * max_aspect, tf.int32)
    kept = tf.minimum(size, longest)
    begin = (size - kept) // 2
    return tf.slice(image, tf.concat([begin, [0]], 0), tf.concat([kept, [3]], 0))


def _scaled_size(size: tf.Tensor, shorter: int) -> tf.Tensor:
    """int32 [2] -> int32 [2] of which the smaller is `shorter`, in integers so that it is the same everywhere."""
    wide = tf.cast(size, tf.int64)
    least = tf.reduce_min(wide)
    return tf.cast((2 * wide * shorter + least) // (2 * least), tf.int32)
