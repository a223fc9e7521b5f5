"""A bounded sample of a split's images, embedded: the same for the same images, and without reading all of them."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image

from components.model_card.pictures import Split, thumbnail
from components.view_augmenter.files import compression, find_shards

_BATCH = 32  # originals in memory at a time


class Place(NamedTuple):
    """Where an image stands.

    Attributes:
        rank: a hash of its content, by which images are chosen and ordered.
        path: of the TFRecord file.
        number: of the record in it.
    """

    rank: bytes
    path: str
    number: int


class _Row(NamedTuple):
    rank: bytes
    label: str | None
    thumbnail: Image.Image | None
    embedding: NDArray[np.float32]


def choose(folder: str, limit: int) -> list[Place]:
    """Images of a split, chosen by a hash of their content, in the order of that hash.

    Images are spread over the shards by their hash, so whole shards are read, in the order of their names, until
    there are enough; of these the images with the smallest hashes are taken.

    Args:
        folder: of the split's TFRecord files.
        limit: images at the most.
    """
    places: list[Place] = []
    for shard in find_shards(folder):
        if len(places) >= limit:
            break
        found = (Place(_rank(features), shard.path, index) for index, _, features in _records(shard.path))
        places = sorted([*places, *found])[:limit]
    return places


class Encoder:
    """An export's `examples` signature."""

    def __init__(self, model_dir: str) -> None:
        """Loads it.

        Args:
            model_dir: of the SavedModel.
        """
        self._model = tf.saved_model.load(model_dir)  # the signature does not keep its variables alive
        self._signature = self._model.signatures["examples"]
        self.dim = int(self._signature.structured_outputs["embedding"].shape[1])

    def __call__(self, records: Sequence[bytes]) -> NDArray[np.float32]:
        """Embeds N serialised tf.Examples: float32 [N, dim], rows of length 1."""
        return self._signature(examples=tf.constant(records, tf.string))["embedding"].numpy()


def read(places: Iterable[Place], encoder: Encoder, side: int | None) -> Split:
    """Reads, embeds and shrinks images, a few originals at a time.

    Args:
        places: of `choose`.
        encoder: of the model.
        side: of the thumbnails in pixels; None for none.

    Returns:
        The images whose embedding is finite, in the order of their hashes.
    """
    chosen = {(place.path, place.number) for place in places}
    rows: list[_Row] = []
    batch: list[tuple[bytes, Any]] = []
    for path in sorted({path for path, _ in chosen}):
        for index, record, features in _records(path):
            if (path, index) in chosen:
                batch.append((record, features))
            if len(batch) == _BATCH:
                rows += _embedded(batch, encoder, side)
                batch = []
    rows += _embedded(batch, encoder, side)
    rows.sort(key=lambda row: row.rank)
    finite = [row for row in rows if np.isfinite(row.embedding).all()]
    return Split(
        embedding=np.array([row.embedding for row in finite], np.float32).reshape(len(finite), encoder.dim),
        labels=tuple(row.label for row in finite),
        thumbnails=tuple(row.thumbnail for row in finite if row.thumbnail is not None),
        dropped=len(rows) - len(finite),
    )


def _records(path: str) -> Iterator[tuple[int, bytes, Any]]:
    """Number, bytes and features of each record of a file."""
    records = tf.data.TFRecordDataset(path, compression(path)).as_numpy_iterator()
    for index, record in enumerate(records):
        yield index, record, tf.train.Example.FromString(record).features.feature


def _rank(features: Any) -> bytes:
    # Hashed once more: splits and shards are made by the first bits of the image's own hash.
    return hashlib.sha256(b"model card" + features["image/sha256"].bytes_list.value[0]).digest()


def _embedded(batch: Sequence[tuple[bytes, Any]], encoder: Encoder, side: int | None) -> Iterator[_Row]:
    if not batch:
        return
    embeddings = encoder([record for record, _ in batch])
    for (_, features), embedding in zip(batch, embeddings, strict=True):
        labels = features["image/label"].bytes_list.value
        small = None if side is None else thumbnail(features["image/encoded"].bytes_list.value[0], side)
        label = labels[0].decode("utf-8", "replace") if labels else None
        yield _Row(_rank(features), label, small, embedding)
