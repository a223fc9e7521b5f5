"""What the published model must answer: the embeddings of a few real images, by the trainer's own network.

They are noted from f_q's weights in the training state, by Keras, on a CPU as servers have, through the image functions
themselves. Nothing of it goes through an exported graph, so whatever is lost on the way to the SavedModel shows.
"""

import dataclasses
import functools
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer_module.config import AugmentConfig, ImageConfig
from trainer_module.encoder import Encoder
from trainer_module.errors import UserError
from trainer_module.images import centre_view, eval_resize, stored_image
from trainer_module.input import MANIFEST
from trainer_module.online_knn import check_file, of_backbone

FILE = "expected.tfrecord"

_BATCH = 16  # images embedded at once

# float32[N, size, size, 3] in [0, 255] -> unit float32[N, D]
EmbedViews = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Probe:
    """An image of the eval split, and what embeds it.

    Attributes:
        id: hex SHA-256.
        encoded: the image's bytes, as they were ingested.
        embedding: float32[D] of these bytes.
        square: uint8[S, S, 3], the centre of the stored image, S its shorter side.
        square_embedding: float32[D] of those pixels.
    """

    id: str
    encoded: bytes
    embedding: NDArray[np.float32]
    square: NDArray[np.uint8]
    square_embedding: NDArray[np.float32]


def write_expected(split_dir: str, embed: EmbedViews, image: ImageConfig, augment: AugmentConfig, path: str) -> None:
    """Embeds the probes that ViewAugmenter chose, and writes them.

    Args:
        split_dir: folder of the train split of the views; the manifest lies in its parent.
        embed: see `host_embedder`.
        image, augment: geometry of the centre view.
        path: to write, a TFRecord file.

    Raises:
        UserError: the file with the probes is missing or truncated.
    """
    write_probes(make_probes(_read_images(split_dir), embed, image, augment), path)


def make_probes(
    images: Sequence[tuple[str, bytes]], embed: EmbedViews, image: ImageConfig, augment: AugmentConfig
) -> list[Probe]:
    """Embeds images.

    Args:
        images: id and encoded bytes of each.
        embed: see `host_embedder`.
        image, augment: geometry of the centre view.
    """
    if not images:
        return []
    view = functools.partial(centre_view, resize=eval_resize(image, augment), size=augment.size)
    with tf.device("/CPU:0"):
        stored = [stored_image(tf.constant(encoded), image) for _, encoded in images]
        squares = [_centre_square(pixels) for pixels in stored]
        embeddings = embed(np.stack([view(pixels) for pixels in stored]))
        square_embeddings = embed(np.stack([view(pixels) for pixels in squares]))
    rows = zip(images, embeddings, squares, square_embeddings, strict=True)
    return [
        Probe(name, encoded, embedding, square.numpy(), square_embedding)
        for (name, encoded), embedding, square, square_embedding in rows
    ]


def host_embedder(
    encoder: Encoder,
    query: Sequence[NDArray[np.float32]],
    query_stats: Sequence[NDArray[np.float32]],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> EmbedViews:
    """Embeds views by the backbone with f_q's weights, BN in inference mode, on this host's CPU.

    TPUs and GPUs multiply with fewer digits than a CPU does, and a served model is compared to 1e-5.

    Args:
        encoder: the architecture.
        query: f_q's parameters, in the order of encoder.model.trainable_variables.
        query_stats: its BN statistics, in the order of encoder.model.non_trainable_variables.
        mean, std: per channel, in the units of the pixels.
    """
    parameters, stats = of_backbone(encoder, query, query_stats)

    def embed(views: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = []
        with tf.device("/CPU:0"):
            weights = [[tf.constant(value) for value in values] for values in (parameters, stats)]
            for start in range(0, len(views), _BATCH):
                x = (tf.constant(views[start : start + _BATCH]) - mean) / std
                features, _ = encoder.backbone.stateless_call(*weights, x, training=False)
                parts.append(tf.cast(features, tf.float32).numpy())
        features = np.concatenate(parts)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    return embed


def write_probes(probes: Sequence[Probe], path: str) -> None:
    """Writes a TFRecord file for `read_expected`."""
    with tf.io.TFRecordWriter(path) as writer:
        for probe in probes:
            writer.write(_serialise(probe))


def read_expected(path: str) -> list[Probe]:
    """What the trainer wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return [_parse(record) for record in tf.data.TFRecordDataset(path).as_numpy_iterator()]
    except (tf.errors.NotFoundError, tf.errors.DataLossError) as error:
        folder = posixpath.dirname(path)
        raise UserError(f"{path} is missing or damaged: delete {folder} and run again to train again") from error


def _read_images(split_dir: str) -> list[tuple[str, bytes]]:
    """Id and encoded bytes of the probes."""
    root = posixpath.dirname(split_dir.rstrip("/"))
    with tf.io.gfile.GFile(posixpath.join(root, MANIFEST)) as file:
        manifest = json.load(file)
    return [
        image
        for entry in manifest.get("watch", ())
        if entry["split"] == "probe"
        for image in _read_file(posixpath.join(root, entry["name"]), entry["bytes"])
    ]


def _read_file(path: str, size: int) -> Iterator[tuple[str, bytes]]:
    check_file(path, size)
    for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        yield features["id"].bytes_list.value[0].decode(), features["encoded"].bytes_list.value[0]


def _centre_square(image: tf.Tensor) -> tf.Tensor:
    side = tf.reduce_min(tf.shape(image)[:2])
    top, left = tf.unstack((tf.shape(image)[:2] - side) // 2)
    return image[top : top + side, left : left + side]


def _serialise(probe: Probe) -> bytes:
    example = tf.train.Example()
    for name, value in (
        ("id", probe.id.encode()),
        ("encoded", probe.encoded),
        ("square", tf.io.encode_png(probe.square).numpy()),
    ):
        example.features.feature[name].bytes_list.value.append(value)
    for name, vector in (("embedding", probe.embedding), ("square_embedding", probe.square_embedding)):
        example.features.feature[name].float_list.value.extend(vector.tolist())
    return example.SerializeToString(deterministic=True)


def _parse(record: bytes) -> Probe:
    features = tf.train.Example.FromString(record).features.feature
    name, encoded, png = (features[key].bytes_list.value[0] for key in ("id", "encoded", "square"))
    vectors = [np.array(features[key].float_list.value, np.float32) for key in ("embedding", "square_embedding")]
    return Probe(name.decode(), encoded, vectors[0], tf.io.decode_png(png, channels=3).numpy(), vectors[1])
