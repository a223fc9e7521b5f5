"""A bounded sample of a split's images, the same for the same images, and without reading all of them."""

import hashlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from components.view_augmenter.files import compression, find_shards

_BATCH = 64


class Image(NamedTuple):
    """One ingested image.

    Attributes:
        rank: a hash of its content, by which images are chosen and ordered.
        label: None where it has none.
        encoded: JPEG or PNG, 8-bit RGB or grey, upright.
        record: the serialised tf.Example that it came in.
    """

    rank: bytes
    label: str | None
    encoded: bytes
    record: bytes


def take(folder: str, limit: int) -> list[Image]:
    """Images of a split, chosen by a hash of their content, in the order of that hash.

    Images are spread over the shards by their hash, so whole shards are read, in the order of their names, until
    there are enough; of these the images with the smallest hashes are taken.

    Args:
        folder: of the split's TFRecord files.
        limit: images at the most.
    """
    images: list[Image] = []
    for shard in find_shards(folder):
        if len(images) >= limit:
            break
        records = tf.data.TFRecordDataset(shard.path, compression(shard.path)).as_numpy_iterator()
        images = sorted([*images, *map(_parse, records)])[: max(limit, 0)]
    return images


def _parse(record: bytes) -> Image:
    features = tf.train.Example.FromString(record).features.feature
    sha, encoded = (features[name].bytes_list.value[0] for name in ("image/sha256", "image/encoded"))
    labels = features["image/label"].bytes_list.value
    # Hashed once more: splits and shards are made by the first bits of the image's own hash.
    rank = hashlib.sha256(b"model card" + sha).digest()
    return Image(rank, labels[0].decode("utf-8", "replace") if labels else None, encoded, record)


def embed(model_dir: str, images: list[Image]) -> NDArray[np.float32]:
    """Embeds images with an export's `examples` signature: float32 [N, D], rows of length 1.

    Args:
        model_dir: of the SavedModel.
        images: N of them.
    """
    model = tf.saved_model.load(model_dir)
    signature = model.signatures["examples"]
    dim = signature.structured_outputs["embedding"].shape[1]
    batches = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
    rows = [signature(examples=tf.constant([image.record for image in batch]))["embedding"] for batch in batches]
    return np.concatenate([np.zeros((0, dim), np.float32), *(row.numpy() for row in rows)])
