"""The trainer's input: epochs of seeded pairs of views, read from what ViewAugmenter wrote.

Epoch e uses pair e of every image (modulo the stored pairs where only Beam makes views). The order within an epoch
depends on (seed, epoch) alone, so training can go on from any step with the very batches that it would have seen.
"""

import dataclasses
import json
import posixpath
from collections.abc import Iterator

import tensorflow as tf

from trainer_module.config import AugmentConfig, Where
from trainer_module.errors import UserError
from trainer_module.views import view_pair

MANIFEST = "views.json"
SHUFFLE_BUFFER = 8192  # images at the most
SHUFFLE_BYTES = 1 << 30  # of views at the most


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one ViewAugmenter output.

    Attributes:
        directory: of the files.
        images: number of training images.
        views: views[p] are the files that hold pair p of every image.
        stored: the files that hold the stored images.
    """

    directory: str
    images: int
    views: tuple[tuple[str, ...], ...]
    stored: tuple[str, ...]


def open_source(split_dir: str, augment: AugmentConfig) -> Source:
    """Reads the manifest and checks that every file is there and whole.

    Args:
        split_dir: folder of the train split; the manifest lies in its parent.
        augment: what the views must be.

    Raises:
        UserError: a file is missing or truncated, or the views are of another size.
    """
    path = posixpath.join(posixpath.dirname(split_dir.rstrip("/")), MANIFEST)
    try:
        with tf.io.gfile.GFile(path) as file:
            manifest = json.load(file)
    except (tf.errors.NotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is missing or damaged: make the views again") from error
    if manifest["size"] != augment.size:
        raise UserError(f"{path} holds views of {manifest['size']} px, augment.size is {augment.size}: make them again")
    for entry in manifest["files"]:
        _check_file(posixpath.join(split_dir, entry["name"]), entry["bytes"])
    names = sorted(entry["name"] for entry in manifest["files"])
    pairs = range(manifest["pairs_per_image"])
    views = [tuple(n for n in names if n.startswith(f"views-p{pair:04d}-")) for pair in pairs]
    stored = tuple(n for n in names if n.startswith("images-"))
    return Source(split_dir, manifest["images"], tuple(v for v in views if v), stored)


def _check_file(path: str, size: int) -> None:
    try:
        found = tf.io.gfile.stat(path).length
    except tf.errors.NotFoundError:
        raise UserError(f"{path} is missing: delete its folder and run again to make the views again") from None
    if found != size:
        raise UserError(f"{path} has {found} bytes instead of {size}: delete its folder and run again") from None


def steps_per_epoch(source: Source, global_batch: int) -> int:
    """Whole global batches in one pass.

    Raises:
        UserError: fewer images than one batch.
    """
    check_batch(source.images, global_batch)
    return source.images // global_batch


def check_batch(images: int, global_batch: int) -> None:
    """Refuses a batch that the training images cannot fill.

    Raises:
        UserError: fewer images than one batch.
    """
    if images < global_batch:
        raise UserError(
            f"{images} training images are fewer than train.global_batch={global_batch}: "
            f"add images, or set train.global_batch to at most {images}"
        )


def dataset_from(
    source: Source, augment: AugmentConfig, seed: int, epochs: int, global_batch: int, start_step: int
) -> tf.data.Dataset:
    """Global batches from one step on.

    Args:
        source: the files.
        augment: the recipe, for views that are made here.
        seed: of the order and of the views.
        epochs: at which the data ends.
        global_batch: images in a batch; what is left over at the end of an epoch is dropped.
        start_step: steps that were done already.

    Returns:
        A dataset of (query, key), uint8[global_batch, size, size, 3] each.
    """
    steps = steps_per_epoch(source, global_batch)
    first, skip = divmod(start_step, steps)
    parts = [
        _epoch_batches(source, augment, seed, epoch_range, global_batch, stored)
        for epoch_range, stored in _epochs(source, augment.where, first, epochs)
    ]
    dataset = parts[0]
    for part in parts[1:]:
        dataset = dataset.concatenate(part)
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.skip(skip).prefetch(tf.data.AUTOTUNE).with_options(options)


def _epochs(source: Source, where: Where, first: int, epochs: int) -> Iterator[tuple[tf.data.Dataset, bool]]:
    """Ranges of epochs, each with whether it reads stored views."""
    stored = {Where.beam: epochs, Where.both: len(source.views), Where.trainer: 0}[where]
    boundary = min(epochs, stored)
    if first < boundary:
        yield tf.data.Dataset.range(first, boundary), True
    if max(first, boundary) < epochs:
        yield tf.data.Dataset.range(max(first, boundary), epochs), False


def _epoch_batches(
    source: Source, augment: AugmentConfig, seed: int, epochs: tf.data.Dataset, global_batch: int, stored_views: bool
) -> tf.data.Dataset:
    files = source.views if stored_views else (source.stored,)
    paths = tf.constant([[posixpath.join(source.directory, name) for name in row] for row in files])
    pixels = augment.size**2 * 3
    buffer = max(global_batch, min(SHUFFLE_BUFFER, SHUFFLE_BYTES // (2 * pixels)))

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        seeds = tf.random.stateless_uniform(
            [2], tf.stack([tf.constant(seed, tf.int64), epoch]), 0, 1 << 30, tf.int64, alg="philox"
        )
        row = tf.gather(paths, epoch % len(files))
        order = tf.argsort(tf.random.stateless_uniform([len(files[0])], seeds, alg="philox"))
        records = tf.data.Dataset.from_tensor_slices(tf.gather(row, order)).interleave(
            tf.data.TFRecordDataset, cycle_length=8, block_length=16, deterministic=True
        )
        records = records.shuffle(buffer, seed=seeds[0], reshuffle_each_iteration=False)
        if stored_views:
            return records.batch(global_batch, drop_remainder=True).map(
                lambda batch: _parse_views(batch, augment.size), num_parallel_calls=2
            )
        made = records.map(lambda r: _make_views(r, epoch, seed, augment), num_parallel_calls=tf.data.AUTOTUNE)
        return made.batch(global_batch, drop_remainder=True).map(lambda pairs: (pairs[:, 0], pairs[:, 1]))

    return epochs.flat_map(one_epoch)


def _parse_views(records: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Serialised examples [B] -> query and key, uint8[B, size, size, 3]."""
    spec = {name: tf.io.FixedLenFeature([], tf.string) for name in ("query", "key")}
    parsed = tf.io.parse_example(records, spec)
    shape = [records.shape[0], size, size, 3]
    query, key = (tf.reshape(tf.io.decode_raw(parsed[name], tf.uint8), shape) for name in ("query", "key"))
    return query, key


def _make_views(record: tf.Tensor, epoch: tf.Tensor, seed: int, augment: AugmentConfig) -> tf.Tensor:
    """One serialised stored image -> its pair of views of this epoch, uint8[2, size, size, 3]."""
    spec = {name: tf.io.FixedLenFeature([], tf.string) for name in ("id", "image")}
    parsed = tf.io.parse_single_example(record, spec)
    image = tf.io.decode_png(parsed["image"], channels=3)
    return view_pair(image, parsed["id"], epoch, seed, augment)
