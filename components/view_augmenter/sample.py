"""The labelled images that the trainer's online kNN looks at, stored as centre views beside the views.

An image belongs to the sample when its SHA-256 is below a bound, which each shard tells for itself: nothing is
shuffled, and the sample is the same on any runner. The bound is chosen so that about as many images as wanted are
below it; the trainer takes the lowest of them.
"""

import dataclasses
import uuid
from collections.abc import Iterable, Iterator

import apache_beam as beam
import tensorflow as tf
from apache_beam.io.filesystems import FileSystems

from components.view_augmenter.files import Shard, compression, serialise
from trainer_module.config import AugmentConfig, ImageConfig, SampleConfig
from trainer_module.images import centre_view, eval_resize, stored_image, to_uint8

SPLITS = ("train", "eval")
_FOLDER = "watch"  # beside the splits
_MARGIN = 4.0  # standard deviations of the number of images below a bound


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """What decides the sample; travels to the workers.

    Attributes:
        uri: root of the views artifact.
        scratch: folder of unfinished files.
        image, augment: geometry of the views.
        wanted: see SampleConfig.
        images: of each split.
    """

    uri: str
    scratch: str
    image: ImageConfig
    augment: AugmentConfig
    wanted: SampleConfig
    images: dict[str, int]

    @property
    def folder(self) -> str:
        """Of the record files."""
        return f"{self.uri}/{_FOLDER}"

    def limit(self, split: str) -> int:
        """Images that are wanted of a split."""
        return {"train": self.wanted.bank, "eval": self.wanted.queries}[split]

    def bound(self, split: str) -> float:
        """The share of all hashes that are in the sample."""
        limit = self.limit(split)
        return (limit + _MARGIN * limit**0.5) / max(1, self.images[split])

    def bytes(self) -> int:
        """What the files take, at the most, without ids and framing."""
        images = sum(min(self.images[split], round(self.bound(split) * self.images[split])) for split in SPLITS)
        return images * self.augment.size**2 * 3


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """A finished record file, as the manifest lists it; the name is relative to the artifact's root."""

    split: str
    name: str
    records: int
    bytes: int


class TakeSample(beam.PTransform):
    """PCollection of (split, Shard) -> PCollection of SampleFile; a shard without such images gives none."""

    def __init__(self, job: SampleJob):
        super().__init__()
        self._job = job

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        """Spreads the shards over the workers and maps each."""
        return shards | "Spread" >> beam.Reshuffle() | "Write" >> beam.ParDo(TakeSampleFn(self._job))


class TakeSampleFn(beam.DoFn):
    """Writes the sample's images of one shard; a bundle may be retried, or run twice at once."""

    def __init__(self, job: SampleJob):
        self._job = job

    def setup(self) -> None:
        """Traces the graph once for all shards of this worker."""
        self._view = _view_function(self._job)

    def process(self, element: tuple[str, Shard]) -> Iterable[SampleFile]:
        """Writes the file of one shard, in the shard's order."""
        split, shard = element
        name, part, count = f"{_FOLDER}/{split}-{shard.suffix}", f"{self._job.scratch}/{uuid.uuid4().hex}", 0
        with tf.io.TFRecordWriter(part) as writer:
            for record in self._records(split, shard.path):
                writer.write(record)
                count += 1
        if count:
            size = tf.io.gfile.stat(part).length
            FileSystems.rename([part], [f"{self._job.uri}/{name}"])
            yield SampleFile(split, name, count, size)

    def _records(self, split: str, path: str) -> Iterator[bytes]:
        bound = self._job.bound(split)
        for record in tf.data.TFRecordDataset(path, compression(path)).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            label, sha = features["image/label"].bytes_list.value, features["image/sha256"].bytes_list.value[0]
            if label and int(sha, 16) < bound * 2.0**256:
                view = self._view(tf.constant(features["image/encoded"].bytes_list.value[0]))
                yield serialise({"id": sha, "image": view.numpy().tobytes(), "label": label[0]})


def _view_function(job: SampleJob) -> tf.types.experimental.ConcreteFunction:
    """Encoded bytes, string [], to the centre view that embeds the image, uint8 [size, size, 3]."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def view(encoded: tf.Tensor) -> tf.Tensor:
        image = stored_image(encoded, job.image)
        return to_uint8(centre_view(image, eval_resize(job.image, job.augment), job.augment.size))

    return view.get_concrete_function()
