"""The trainer's input: epochs of seeded pairs of views, read from what ViewAugmenter wrote.

Epoch e uses pair e of every image (modulo the stored pairs where only Beam makes views). The order within an epoch
depends on (seed, epoch) alone, so training can go on from any step with the very batches that it would have seen.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from trainer_module.config import AugmentConfig, Where
from trainer_module.errors import UserError
from trainer_module.shuffle import shuffle_keys
from trainer_module.views import view_pair

MANIFEST = "views.json"
PROBES = 64  # images beside the views on which the published model is compared with the trainer's own network
SHUFFLE_BUFFER = 8192  # images at the most
SHUFFLE_BYTES = 1 << 30  # of their records at the most
_NAME = re.compile(r"(images|views-p(?P<pair>\d+))-[^/]+")
_READING = "stored_records"  # scope of what reads them, by which its errors are known
_UNREADABLE = re.compile(f"{_READING}|Could not parse example")  # after which a NUL in the record may end the message


class File(NamedTuple):
    """A file of records, as the manifest lists it."""

    name: str
    records: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a ViewAugmenter output says of itself.

    Attributes:
        size: side of the views in pixels.
        images: number of training images.
        views: views[p] are the files that hold pair p of every image.
        stored: the files that hold the stored images; none where only Beam makes views.
        digest: of all but what is only watched, hex.
    """

    size: int
    images: int
    views: tuple[tuple[File, ...], ...]
    stored: tuple[File, ...]
    digest: str

    @property
    def files(self) -> tuple[File, ...]:
        """All of the train split."""
        return (*self.stored, *itertools.chain(*self.views))


def read_manifest(directory: str) -> Manifest:
    """Reads a ViewAugmenter output's manifest and checks it.

    Args:
        directory: of the artifact.

    Raises:
        UserError: it is missing or damaged, or lists fewer records than there are images.
    """
    path = posixpath.join(directory, MANIFEST)
    try:
        with tf.io.gfile.GFile(path) as file:
            content = json.load(file)
        manifest = _manifest(content)
    except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: {_remake(directory)}") from error
    held = {f"pair {pair}": files for pair, files in enumerate(manifest.views)}
    if manifest.stored or not held:
        held["the stored images"] = manifest.stored
    for what, files in held.items():
        records = sum(file.records for file in files)
        if records != manifest.images:
            raise UserError(
                f"{path} is damaged, it lists {records} records of {what} for {manifest.images} images: "
                f"{_remake(directory)}"
            )
    return manifest


def _manifest(content: Any) -> Manifest:
    """Raises ValueError, LookupError or TypeError where something is no manifest."""
    size, images, pairs = (_count(content[key]) for key in ("size", "images", "pairs_per_image"))
    files = [File(entry["name"], _count(entry["records"]), _count(entry["bytes"])) for entry in content["files"]]
    if not size or pairs > len(files) or len({file.name for file in files}) < len(files):
        raise ValueError(content)
    views: list[list[File]] = [[] for _ in range(pairs)]
    stored: list[File] = []
    for file in sorted(files):
        if not (named := _NAME.fullmatch(file.name)):
            raise ValueError(file.name)
        (views[int(named["pair"])] if named["pair"] else stored).append(file)
    # What is only watched, such as the sample for the online kNN, does not make it another training set.
    digest = hashlib.sha256(json.dumps(content | {"watch": None}, sort_keys=True).encode()).hexdigest()
    return Manifest(size, images, tuple(map(tuple, views)), tuple(stored), digest)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _remake(directory: str) -> str:
    # Only where the folder of an artifact is gone is its stage run again.
    return f"delete {directory} and run again to make the views again"


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one ViewAugmenter output.

    Attributes:
        directory: of the files.
        size: side of the views in pixels.
        images: number of training images.
        views: views[p] are the files that hold pair p of every image.
        stored: the files that hold the stored images.
        record_bytes: by file name, the mean size of its records.
        digest: of the manifest, hex.
    """

    directory: str
    size: int
    images: int
    views: tuple[tuple[str, ...], ...]
    stored: tuple[str, ...]
    record_bytes: Mapping[str, float]
    digest: str


def open_source(split_dir: str, augment: AugmentConfig) -> Source:
    """Reads the manifest and checks that every file is there and whole.

    Args:
        split_dir: folder of the train split; the manifest lies in its parent.
        augment: what the views must be.

    Raises:
        UserError: the manifest is damaged, a file is missing or truncated, or the views are of another size.
    """
    root = posixpath.dirname(split_dir.rstrip("/"))
    manifest = read_manifest(root)
    if manifest.size != augment.size:
        raise UserError(
            f"{posixpath.join(root, MANIFEST)} holds views of {manifest.size} px, augment.size is {augment.size}: "
            f"{_remake(root)}"
        )
    if not (manifest.views if augment.where is Where.beam else manifest.stored):
        raise UserError(
            f"{posixpath.join(root, MANIFEST)} lists nothing for augment.where={augment.where.name}: {_remake(root)}"
        )
    for file in manifest.files:
        _check_file(root, posixpath.join(split_dir, file.name), file.bytes)
    return Source(
        directory=split_dir,
        size=manifest.size,
        images=manifest.images,
        views=tuple(tuple(file.name for file in files) for files in manifest.views),
        stored=tuple(file.name for file in manifest.stored),
        record_bytes={file.name: file.bytes / max(file.records, 1) for file in manifest.files},
        digest=manifest.digest,
    )


def _check_file(root: str, path: str, size: int) -> None:
    try:
        found = tf.io.gfile.stat(path).length
    except tf.errors.NotFoundError:
        raise UserError(f"{path} is missing: {_remake(root)}") from None
    if found != size:
        raise UserError(f"{path} has {found} bytes instead of {size}: {_remake(root)}") from None


@contextlib.contextmanager
def damage_named(source: Source) -> Iterator[None]:
    """Names the damaged file where a record turns out to be damaged while the files are read.

    Raises:
        UserError: in place of TensorFlow's error, which does not say where.
    """
    try:
        yield
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        # All is read again to find the file, so not for an error of something else.
        if isinstance(error, tf.errors.DataLossError) or _UNREADABLE.search(error.message):
            for name in itertools.chain(source.stored, *source.views):
                path = posixpath.join(source.directory, name)
                if not _is_whole(path, source):
                    root = posixpath.dirname(source.directory.rstrip("/"))
                    raise UserError(f"{path} is damaged: {_remake(root)}") from None
        raise


def _is_whole(path: str, source: Source) -> bool:
    """Whether all records can be read, and are what their name says."""
    records = tf.data.TFRecordDataset(path)
    if posixpath.basename(path) in source.stored:
        read = records.map(lambda record: _parse_image(record)[0])
    else:
        read = records.batch(1, drop_remainder=True).map(lambda batch: _parse_views(batch, source.size)[0])
    try:
        read.reduce(0, lambda count, _: count + 1)
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError):
        return False
    return True


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
    source: Source,
    augment: AugmentConfig,
    seed: int,
    epochs: int,
    global_batch: int,
    start_step: int,
    pipeline: tf.distribute.InputContext,
    *,
    shuffled_keys: bool = False,
) -> tf.data.Dataset:
    """One input pipeline's part of every global batch from one step on, for strategy.distribute_datasets_from_function.

    All pipelines read all records in the same order, and each makes views of its own rows only. So the global batches
    do not depend on how many hosts there are.

    Args:
        source: the files.
        augment: the recipe, for views that are made here.
        seed: of the order and of the views.
        epochs: at which the data ends.
        global_batch: images in a batch; what is left over at the end of an epoch is dropped.
        start_step: steps that were done already.
        pipeline: which of how many pipelines this is, and for how many replicas they all are.
        shuffled_keys: whether key views arrive shuffled among this pipeline's replicas, see KeyBnMode.host.

    Returns:
        A dataset of (query, key), uint8[n, size, size, 3] each, n = global_batch / replicas: in each step, one element
        for each replica of this pipeline in turn.
    """
    first, within = divmod(start_step, steps_per_epoch(source, global_batch))
    parts = [
        _epoch_batches(source, augment, seed, epoch_range, global_batch, stored, (first, within), pipeline)
        for epoch_range, stored in _epochs(source, augment.where, first, epochs)
    ]
    dataset = functools.reduce(tf.data.Dataset.concatenate, parts)
    if shuffled_keys:
        dataset = shuffle_keys(dataset, seed, start_step, pipeline.input_pipeline_id)
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    rows = global_batch // pipeline.num_replicas_in_sync
    return dataset.rebatch(rows, drop_remainder=True).prefetch(tf.data.AUTOTUNE).with_options(options)


def _epochs(source: Source, where: Where, first: int, epochs: int) -> Iterator[tuple[tf.data.Dataset, bool]]:
    """Ranges of epochs, each with whether it reads stored views."""
    stored = {Where.beam: epochs, Where.both: len(source.views), Where.trainer: 0}[where]
    boundary = min(epochs, stored)
    if first < boundary:
        yield tf.data.Dataset.range(first, boundary), True
    if max(first, boundary) < epochs:
        yield tf.data.Dataset.range(max(first, boundary), epochs), False


def _epoch_batches(
    source: Source,
    augment: AugmentConfig,
    seed: int,
    epochs: tf.data.Dataset,
    global_batch: int,
    stored_views: bool,
    start: tuple[int, int],
    pipeline: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """This pipeline's rows of the global batches of some epochs; `start` is an epoch and the steps done within it."""
    files = source.views if stored_views else (source.stored,)
    paths = tf.constant([[posixpath.join(source.directory, name) for name in row] for row in files])
    largest = max(source.record_bytes[name] for row in files for name in row)
    buffer = max(global_batch, min(SHUFFLE_BUFFER, int(SHUFFLE_BYTES / largest)))
    steps, hosts = steps_per_epoch(source, global_batch), pipeline.num_input_pipelines

    @tf.autograph.experimental.do_not_convert
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
        # In whole records, so that nothing is made of those of other hosts and of steps that were done already.
        records = records.batch(global_batch // hosts, drop_remainder=True).shard(hosts, pipeline.input_pipeline_id)
        records = records.take(steps).skip(tf.where(epoch == start[0], tf.constant(start[1], tf.int64), 0))
        if stored_views:
            return records.map(lambda batch: _parse_views(batch, augment.size), num_parallel_calls=2)
        made = records.unbatch().map(
            lambda r: _make_views(r, epoch, seed, augment), num_parallel_calls=tf.data.AUTOTUNE
        )
        made = made.batch(global_batch // hosts, drop_remainder=True)
        return made.map(lambda pairs: (pairs[:, 0], pairs[:, 1]))

    return epochs.flat_map(one_epoch)


def _parse_views(records: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Serialised examples [B] -> query and key, uint8[B, size, size, 3]."""
    with tf.name_scope(_READING):
        spec = {name: tf.io.FixedLenFeature([], tf.string) for name in ("query", "key")}
        parsed = tf.io.parse_example(records, spec)
        shape = [records.shape[0], size, size, 3]
        query, key = (tf.reshape(tf.io.decode_raw(parsed[name], tf.uint8), shape) for name in ("query", "key"))
    return query, key


def _parse_image(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """One serialised stored image -> its pixels, uint8[H, W, 3], and its id."""
    with tf.name_scope(_READING):
        spec = {name: tf.io.FixedLenFeature([], tf.string) for name in ("id", "image")}
        parsed = tf.io.parse_single_example(record, spec)
        return tf.io.decode_png(parsed["image"], channels=3), parsed["id"]


def _make_views(record: tf.Tensor, epoch: tf.Tensor, seed: int, augment: AugmentConfig) -> tf.Tensor:
    """One serialised stored image -> its pair of views of this epoch, uint8[2, size, size, 3]."""
    image, identity = _parse_image(record)
    return view_pair(image, identity, epoch, seed, augment)
