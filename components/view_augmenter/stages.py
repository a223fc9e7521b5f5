"""Beam pipeline of ViewAugmenter: each ingested train shard becomes files of its own, so nothing is shuffled.

Workers import this module, so it imports no TFX, which would cost each of them 13 s of processor time.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import apache_beam as beam
import numpy as np
import tensorflow as tf
from apache_beam.io.filesystems import FileSystems

from components.view_augmenter.files import Shard, compression, serialise
from components.view_augmenter.sample import SPLITS, SampleJob, TakeSample
from trainer_module import progress
from trainer_module.config import AugmentConfig, ImageConfig, Where
from trainer_module.images import stored_image
from trainer_module.views import view_pair

SPLIT = "train"
_SCRATCH = ".scratch"
_REPORT_SECONDS = 0.5

T = TypeVar("T")
# id string [], png string [], stored image uint8 [h, w, 3], pair of views uint8 [2, size, size, 3] or [0]
ReadImage = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]
MakePair = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one run of the executor does; travels to the workers.

    Attributes:
        uri: root of the views artifact.
        image, augment, seed: what decides the bytes.
        images: how many there are to do, for progress and space.
    """

    uri: str
    image: ImageConfig
    augment: AugmentConfig
    seed: int
    images: int

    @property
    def split_folder(self) -> str:
        """Folder of the record files."""
        return f"{self.uri}/Split-{SPLIT}"

    @property
    def scratch(self) -> str:
        """Folder of unfinished files, which nobody reads."""
        return f"{self.uri}/{_SCRATCH}"

    @property
    def keeps_images(self) -> bool:
        """Whether the stored images are written."""
        return self.augment.where is not Where.beam

    @property
    def pairs(self) -> int:
        """Pairs of views written for each image."""
        return 0 if self.augment.where is Where.trainer else self.augment.pairs_per_image


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """A finished record file, as the manifest lists it."""

    name: str
    records: int
    bytes: int


def build(pipeline: beam.Pipeline, job: Job, sample: SampleJob, shards: Mapping[str, Sequence[Shard]]) -> None:
    """Adds the stages to a Beam pipeline.

    It leaves the files in their folders, and their lists in the scratch folder.

    Args:
        pipeline: of Beam.
        job: the views.
        sample: what is taken beside them.
        shards: of each split.
    """
    _ = (
        pipeline
        | "Shards" >> beam.Create(shards[SPLIT])
        | "MakeViews" >> MakeViews(job)
        | "ListFiles" >> beam.combiners.ToList()
        | "WriteFileList" >> beam.Map(_write_file_list, file_list(job))
    )
    _ = (
        pipeline
        | "ShardsToSample" >> beam.Create([(split, shard) for split in SPLITS for shard in shards[split]])
        | "TakeSample" >> TakeSample(sample)
        | "ListSample" >> beam.combiners.ToList()
        | "WriteSampleList" >> beam.Map(_write_file_list, sample_list(job))
    )


class MakeViews(beam.PTransform):
    """Shards to the files made from them: PCollection of Shard -> PCollection of OutputFile."""

    def __init__(self, job: Job):
        super().__init__()
        self._job = job

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        """Spreads the shards over the workers and maps each."""
        return shards | "Spread" >> beam.Reshuffle() | "Write" >> beam.ParDo(MakeViewsFn(self._job))


class MakeViewsFn(beam.DoFn):
    """Streams one shard through TensorFlow into its output files.

    Files appear under their names only when they are whole, and have the same bytes whenever they are made again, so a
    bundle may be retried, or run twice at once.
    """

    def __init__(self, job: Job):
        self._job = job
        self._progress = _Progress(job)

    def setup(self) -> None:
        """Traces the graph once for all shards of this worker."""
        self._stream = ViewStream(self._job)

    def process(self, shard: Shard) -> Iterable[OutputFile]:
        """Writes the files of one shard."""
        with _ShardWriter(self._job, shard) as writer:
            for views in self._stream.views(shard.path):
                writer.write(views)
                self._progress.add()
            return writer.publish()


class Views(NamedTuple):
    """What the stream gives for one image and one pair.

    Attributes:
        id: hex SHA-256.
        pair: its index, 0 where there are no pairs.
        png: the stored image, b"" where it is not kept.
        pixels: uint8 [2, size, size, 3], query and key, or [0] where there are no pairs.
    """

    id: bytes
    pair: int
    png: bytes
    pixels: np.ndarray


class ViewStream:
    """Reads ingested examples and makes views in threads, in order, holding a few images at a time.

    The graphs are called directly: tf.data would prepare its functions anew, for most of a second, for every shard.
    """

    def __init__(self, job: Job):
        """Traces; costs about two seconds."""
        self._job = job
        self._threads = _cores()
        self._read = _read_function(job)
        self._make_pair = _pair_function(job) if job.pairs > 1 else None

    def views(self, path: str) -> Iterator[Views]:
        """The views of one shard, image by image, pair by pair.

        Raises:
            RuntimeError: a record cannot be decoded, which ingestion had proved.
        """
        options = tf.data.Options()
        options.autotune.enabled = False  # its thread takes up to a second to end, for every shard
        dataset = tf.data.TFRecordDataset(path, compression_type=compression(path)).with_options(options)
        try:
            with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
                images = self._ordered(pool, (functools.partial(self._read, record) for record in dataset))
                yield from self._ordered(pool, self._calls(images))
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as error:
            raise RuntimeError(f"{path} has a record that cannot be read, though ingestion proved it") from error

    def _calls(self, images: Iterator[ReadImage]) -> Iterator[Callable[[], Views]]:
        for image in images:
            if self._make_pair is None:
                yield functools.partial(_views_of, image, 0)
            else:
                for pair in range(self._job.pairs):
                    yield functools.partial(_with_pair, self._make_pair, image, pair)

    def _ordered(self, pool: concurrent.futures.Executor, calls: Iterator[Callable[[], T]]) -> Iterator[T]:
        """The results of the calls in their order, of which few are under way or waiting at a time."""
        if self._threads == 1:  # to hand over to another thread would only cost
            yield from (call() for call in calls)
        pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        for call in calls:
            pending.append(pool.submit(call))
            if len(pending) > 2 * self._threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read_function(job: Job) -> Callable[[tf.Tensor], ReadImage]:
    """An ingested record to its stored image and, where that is all and saves a second call, its one pair of views."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def read(record: tf.Tensor) -> ReadImage:
        features = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image/encoded", "image/sha256")}
        parsed = tf.io.parse_single_example(record, features)
        id_hex, image = parsed["image/sha256"], stored_image(parsed["image/encoded"], job.image)
        png = tf.io.encode_png(image, compression=0) if job.keeps_images else tf.constant(b"")
        first = tf.constant(0, tf.int64)
        pixels = view_pair(image, id_hex, first, job.seed, job.augment) if job.pairs == 1 else tf.zeros([0], tf.uint8)
        return id_hex, png, image, pixels

    return read.get_concrete_function()


def _pair_function(job: Job) -> MakePair:
    """Id, stored image and index of a pair to that pair."""
    spec = [tf.TensorSpec([], tf.string), tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([], tf.int64)]

    @tf.function(input_signature=spec, autograph=False)
    def make_pair(id_hex: tf.Tensor, image: tf.Tensor, pair: tf.Tensor) -> tf.Tensor:
        return view_pair(image, id_hex, pair, job.seed, job.augment)

    return make_pair.get_concrete_function()


def _with_pair(make_pair: MakePair, image: ReadImage, pair: int) -> Views:
    id_hex, png, stored, _ = image
    return _views_of((id_hex, png, stored, make_pair(id_hex, stored, tf.constant(pair, tf.int64))), pair)


def _views_of(image: ReadImage, pair: int) -> Views:
    id_hex, png, _, pixels = image
    return Views(id_hex.numpy(), pair, png.numpy(), pixels.numpy())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _ShardWriter:
    """Writes the files of one shard beside their final place, and moves them there when they are whole."""

    def __init__(self, job: Job, shard: Shard):
        self._job, self._shard = job, shard
        self._folder = f"{job.scratch}/{uuid.uuid4().hex}"
        self._writers: dict[str, tf.io.TFRecordWriter] = {}
        self._records: dict[str, int] = {}

    def __enter__(self) -> "_ShardWriter":
        tf.io.gfile.makedirs(self._folder)
        for name in self._names():
            self._writers[name] = tf.io.TFRecordWriter(f"{self._folder}/{name}")
            self._records[name] = 0
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        tf.io.gfile.rmtree(self._folder)

    def write(self, views: Views) -> None:
        """Adds one pair, and the stored image along with the first."""
        if self._job.keeps_images and views.pair == 0:
            self._add(self._images_name(), {"id": views.id, "image": views.png})
        if self._job.pairs:
            query, key = views.pixels
            self._add(self._views_name(views.pair), {"id": views.id, "query": query.tobytes(), "key": key.tobytes()})

    def publish(self) -> list[OutputFile]:
        """Closes the files and gives them their names."""
        while self._writers:
            self._writers.popitem()[1].close()
        names = list(self._records)
        parts = [f"{self._folder}/{name}" for name in names]
        sizes = [tf.io.gfile.stat(part).length for part in parts]
        FileSystems.rename(parts, [f"{self._job.split_folder}/{name}" for name in names])
        return [OutputFile(name, self._records[name], size) for name, size in zip(names, sizes, strict=True)]

    def _add(self, name: str, features: dict[str, bytes]) -> None:
        self._writers[name].write(serialise(features))
        self._records[name] += 1

    def _names(self) -> list[str]:
        images = [self._images_name()] if self._job.keeps_images else []
        return images + [self._views_name(pair) for pair in range(self._job.pairs)]

    def _images_name(self) -> str:
        return f"images-{self._shard.suffix}"

    def _views_name(self, pair: int) -> str:
        return f"views-p{pair:04d}-{self._shard.suffix}"


class _Progress:
    """Counts what one worker has done and reports it now and then."""

    def __init__(self, job: Job):
        self._task, self._unit = ("make views", "pairs") if job.pairs else ("store images", "images")
        self._total = job.images * max(1, job.pairs)
        self._done = 0
        self._next = 0.0

    def add(self) -> None:
        """One more."""
        self._done += 1
        now = time.monotonic()
        if now >= self._next or self._done == self._total:
            self._next = now + _REPORT_SECONDS
            progress.report(self._task, self._done, self._total, self._unit)


def _write_file_list(files: list[Any], path: str) -> None:
    ordered = sorted(files, key=lambda file: file.name)
    write_json(path, [dataclasses.asdict(file) for file in ordered])


def file_list(job: Job) -> str:
    """Where the list of the views' files is left."""
    return f"{job.scratch}/files.json"


def sample_list(job: Job) -> str:
    """Where the list of the sample's files is left."""
    return f"{job.scratch}/sample.json"


def write_json(path: str, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    part = f"{path}.{uuid.uuid4().hex}"
    with tf.io.gfile.GFile(part, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    tf.io.gfile.rename(part, path, overwrite=True)
