"""The preprocessing_fn of TFX's Transform: what is learned from all the data before training, as a graph.

The graph decodes an ingested image, brings it to the storage size, and hands on the statistics of the whole train
split beside it. The same graph is served inside the exported encoder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_transform as tft

from trainer_module.config import ImageConfig
from trainer_module.images import stored_image

LABEL_VOCABULARY = "label"


def make_custom_config(image: ImageConfig, code: str) -> dict[str, Any]:
    """Returns the `custom_config` that Transform passes on to `preprocessing_fn`.

    Args:
        image: geometry of the stored image.
        code: fingerprint of the sources used here. It changes nothing but the cache key of the component.
    """
    return {"image": dataclasses.asdict(image), "code": code}


def preprocessing_fn(inputs: Mapping[str, Any], custom_config: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    """Maps ingested features to stored images and the statistics of the train split.

    Called by TFX's Transform, which traces it once. Its analyzers see the train split.

    Args:
        inputs: `image/encoded`, `image/sha256` and, in a labelled dataset, `image/label`; string tensors [N, 1],
            or sparse ones when not every image has the feature.
        custom_config: what `make_custom_config` returned.

    Returns:
        `image` string [N], PNG without compression of the stored image; `id` string [N], the SHA-256 in hex;
        `channel_mean`, `channel_variance` float32 [N, 3], the same constants in each row: population mean and
        variance of every stored pixel of the train split, in grey levels 0 to 255; and, when the dataset is
        labelled, `label` int64 [N], the place in the vocabulary `label`, -1 for an image that has no label or one
        that is not in the train split.
    """
    image = ImageConfig(**custom_config["image"])
    stored = _store(_column(inputs["image/encoded"]), image)
    mean, variance = _channel_statistics(stored)
    rows = tf.shape(stored.png)[:1]
    outputs = {
        "image": stored.png,
        "id": _column(inputs["image/sha256"]),
        "channel_mean": _repeat(mean, rows),
        "channel_variance": _repeat(variance, rows),
    }
    if "image/label" in inputs:
        labels = _column(inputs["image/label"])
        outputs["label"] = tft.compute_and_apply_vocabulary(labels, vocab_filename=LABEL_VOCABULARY, default_value=-1)
    return outputs


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Stored images of a batch: png string [N]; total, squares int64 [N, 3] per image and channel; pixels int64 [N]."""

    png: tf.Tensor
    total: tf.Tensor
    squares: tf.Tensor
    pixels: tf.Tensor


def _column(feature: tf.Tensor | tf.SparseTensor) -> tf.Tensor:
    """Returns a string feature as [N]; a missing value is the empty string, which no vocabulary holds."""
    if isinstance(feature, tf.SparseTensor):
        shape = tf.stack([feature.dense_shape[0], tf.constant(1, tf.int64)])
        feature = tf.sparse.to_dense(tf.sparse.reset_shape(feature, shape), default_value="")
    return tf.reshape(feature, [-1])


def _store(encoded: tf.Tensor, config: ImageConfig) -> _Stored:
    def one(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        image = stored_image(data, config)
        # Integers add up exactly in whatever order Beam merges them, so the statistics do not depend on the runner.
        values = tf.cast(image, tf.int64)
        pixels = tf.size(values[..., 0], out_type=tf.int64)
        png = tf.io.encode_png(image, compression=0)
        return png, tf.reduce_sum(values, axis=[0, 1]), tf.reduce_sum(values * values, axis=[0, 1]), pixels

    signature = (
        tf.TensorSpec([], tf.string),
        tf.TensorSpec([3], tf.int64),
        tf.TensorSpec([3], tf.int64),
        tf.TensorSpec([], tf.int64),
    )
    return _Stored(*tf.map_fn(one, encoded, fn_output_signature=signature))


def _channel_statistics(stored: _Stored) -> tuple[tf.Tensor, tf.Tensor]:
    total = tf.cast(tft.sum(stored.total, reduce_instance_dims=False), tf.float64)
    squares = tf.cast(tft.sum(stored.squares, reduce_instance_dims=False), tf.float64)
    pixels = tf.cast(tft.sum(stored.pixels), tf.float64)
    mean = total / pixels
    return mean, squares / pixels - mean * mean


def _repeat(constant: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    return tf.broadcast_to(tf.cast(constant, tf.float32), tf.concat([rows, [3]], axis=0))
