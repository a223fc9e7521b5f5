"""kNN top-1 on held-out images while training goes on (arXiv 1805.01978, section 3.4).

The images are a small labelled sample that ViewAugmenter stores beside the views: of the train split as the bank, of
the eval split as the queries. They are embedded by f_q's backbone with BN in inference mode, as the published encoder
would embed them if image.eval_resize were 0, and nothing is learned from them.
"""

import dataclasses
import functools
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer_module import progress
from trainer_module.config import WatchConfig
from trainer_module.encoder import Encoder
from trainer_module.errors import UserError
from trainer_module.input import MANIFEST
from trainer_module.knn import knn_top1

BATCH = 256  # images embedded at once

T = TypeVar("T")

# uint8[N, size, size, 3] -> unit features float32[N, D]
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """The files of the sample; each record has `id` (hex SHA-256), `image` (uint8 [size, size, 3], raw), `label`.

    Attributes:
        bank, queries: paths, of the train and of the eval split.
        size: side of an image in pixels.
    """

    bank: tuple[str, ...]
    queries: tuple[str, ...]
    size: int


def open_sample(split_dir: str) -> Sample | None:
    """Finds the sample in a ViewAugmenter output.

    Args:
        split_dir: folder of the train split; the manifest lies in its parent.

    Returns:
        The sample; None where no image of one of the splits has a label.

    Raises:
        UserError: a file is missing or truncated.
    """
    root = posixpath.dirname(split_dir.rstrip("/"))
    with tf.io.gfile.GFile(posixpath.join(root, MANIFEST)) as file:
        manifest = json.load(file)
    paths: dict[str, list[str]] = {"train": [], "eval": []}
    for entry in manifest.get("watch", ()):
        if entry["split"] in paths:
            path = posixpath.join(root, entry["name"])
            check_file(path, entry["bytes"])
            paths[entry["split"]].append(path)
    if not all(paths.values()):
        return None
    return Sample(tuple(sorted(paths["train"])), tuple(sorted(paths["eval"])), manifest["size"])


def check_file(path: str, size: int) -> None:
    """Refuses a file beside the views that is not as the manifest has it.

    Raises:
        UserError: it is missing or truncated.
    """
    try:
        found = tf.io.gfile.stat(path).length
    except tf.errors.NotFoundError:
        found = 0
    if found != size:
        folder = posixpath.dirname(posixpath.dirname(path))
        raise UserError(f"{path} has {found} bytes instead of {size}: delete {folder} and run again to make it again")


def backbone_embedder(
    strategy: tf.distribute.Strategy,
    encoder: Encoder,
    query: Sequence[tf.Variable],
    query_stats: Sequence[tf.Variable],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Embed:
    """Embeds images by the backbone with the present weights of f_q, each replica a share of them.

    Args:
        strategy: that the variables were made under.
        encoder, query, query_stats, mean, std: see `replica_features`.
    """
    of_replica = replica_features(encoder, query, query_stats, mean, std)
    share = -(-BATCH // strategy.num_replicas_in_sync)

    @tf.function(autograph=False)
    def features(views: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return strategy.experimental_local_results(strategy.run(of_replica, args=(views,)))

    def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = share * strategy.num_replicas_in_sync
        # Padded, so that one shape is compiled.
        padded = np.concatenate([images, np.zeros((-len(images) % rows, *images.shape[1:]), np.uint8)])
        parts = []
        for start in range(0, len(padded), rows):
            views = strategy.experimental_distribute_values_from_function(
                functools.partial(_share_of, padded[start : start + rows], share)
            )
            parts += [part.numpy() for part in features(views)]
        return np.concatenate(parts)[: len(images)]

    return embed


def replica_features(
    encoder: Encoder,
    query: Sequence[tf.Variable],
    query_stats: Sequence[tf.Variable],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable[[tf.Tensor], tf.Tensor]:
    """What a replica does with its share of the images: uint8[n, H, W, 3] -> unit features, float32[n, D].

    Args:
        encoder: the architecture.
        query: f_q's parameters, in the order of encoder.model.trainable_variables.
        query_stats: its BN statistics, in the order of encoder.model.non_trainable_variables.
        mean, std: per channel, in the units of the pixels.
    """
    parameters, stats = of_backbone(encoder, query, query_stats)

    def features(views: tf.Tensor) -> tf.Tensor:
        x = (tf.cast(views, tf.float32) - mean) / std
        now = [[tf.convert_to_tensor(v) for v in values] for values in (parameters, stats)]
        pooled, _ = encoder.backbone.stateless_call(*now, x, training=False)
        return tf.math.l2_normalize(tf.cast(pooled, tf.float32), axis=1)

    return features


def _share_of(images: NDArray[np.uint8], share: int, context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
    start = context.replica_id_in_sync_group * share
    return tf.constant(images[start : start + share])


def of_backbone(encoder: Encoder, query: Sequence[T], query_stats: Sequence[T]) -> tuple[list[T], list[T]]:
    """Of what stands for f_q's variables, the parameters and the BN statistics of its backbone.

    Args:
        encoder: the architecture.
        query: in the order of encoder.model.trainable_variables.
        query_stats: in the order of encoder.model.non_trainable_variables.
    """
    model, backbone = encoder.model, encoder.backbone
    return (
        _part_of(query, model.trainable_variables, backbone.trainable_variables),
        _part_of(query_stats, model.non_trainable_variables, backbone.non_trainable_variables),
    )


def _part_of(values: Sequence[T], whole: Sequence[keras.Variable], part: Sequence[keras.Variable]) -> list[T]:
    places = {id(variable): place for place, variable in enumerate(whole)}
    return [values[places[id(variable)]] for variable in part]


class OnlineKnn:
    """kNN top-1 of the present weights; call it to measure."""

    def __init__(self, sample: Sample, embed: Embed, config: WatchConfig) -> None:
        self._sample, self._embed, self._config = sample, embed, config

    def __call__(self) -> float:
        """Embeds the sample and classifies its queries.

        Returns:
            The share of queries that are put into their class; NaN when a feature is not finite.

        Raises:
            UserError: a file of the sample is damaged.
        """
        limits = self._config.sample
        bank, bank_names = self._embed_files(self._sample.bank, limits.bank)
        queries, query_names = self._embed_files(self._sample.queries, limits.queries)
        if not (np.isfinite(bank).all() and np.isfinite(queries).all()):
            return float("nan")
        _, coded = np.unique(np.concatenate([bank_names, query_names]), return_inverse=True)
        labels, truth = coded[: len(bank)], coded[len(bank) :]
        return knn_top1(bank, labels, queries, truth, self._config.knn_k, self._config.knn_temperature)

    def _embed_files(self, files: Sequence[str], limit: int) -> tuple[NDArray[np.float32], NDArray[np.bytes_]]:
        """Features float32[n, D] and labels bytes[n] of the `limit` images with the smallest hashes, in their order."""
        ids, features, labels = [], [], []
        for batch_ids, images, batch_labels in _batches(files, self._sample.size):
            ids.append(batch_ids)
            features.append(self._embed(images))
            labels.append(batch_labels)
        # The order of the files depends on the shards of the ingestion; ties of the vote must not.
        order = np.argsort(np.concatenate(ids), kind="stable")[:limit]
        return np.concatenate(features)[order], np.concatenate(labels)[order]


def _batches(
    files: Sequence[str], size: int
) -> Iterator[tuple[NDArray[np.bytes_], NDArray[np.uint8], NDArray[np.bytes_]]]:
    spec = {name: tf.io.FixedLenFeature([], tf.string) for name in ("id", "image", "label")}
    dataset = tf.data.TFRecordDataset(list(files)).batch(BATCH).map(lambda records: tf.io.parse_example(records, spec))
    try:
        for batch in dataset.as_numpy_iterator():
            images = np.stack([np.frombuffer(raw, np.uint8) for raw in batch["image"]])
            yield batch["id"].astype(bytes), images.reshape(-1, size, size, 3), batch["label"].astype(bytes)
    except (tf.errors.DataLossError, tf.errors.NotFoundError) as error:
        raise UserError(
            f"the images of the online kNN in {posixpath.dirname(files[0])} are damaged: "
            "delete that folder's parent and run again to make them again"
        ) from error


def make_online_knn(split_dir: str, config: WatchConfig, embed: Embed) -> OnlineKnn | None:
    """What measures kNN as the configuration asks; None where it is not asked for, or impossible, which is said once.

    Args:
        split_dir: folder of ViewAugmenter's train split.
        config: what is asked.
        embed: see `backbone_embedder`.

    Raises:
        UserError: the sample's files are missing or truncated.
    """
    if not config.knn_epochs:
        return None
    sample = open_sample(split_dir)
    if sample is None:
        progress.note("online kNN is left out: it needs labelled images in both splits")
        return None
    return OnlineKnn(sample, embed, config)
