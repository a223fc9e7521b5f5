"""The few images that are looked at beside the views: the online kNN's sample, and probes of the published model.

The sample is labelled and stored as centre views. The probes are encoded images of the eval split, labelled or not, of
which the trainer notes the embeddings that the published model must give.

An image belongs to either when its SHA-256 is below a bound, which each shard tells for itself: nothing is shuffled,
and the choice is the same on any runner. The bound is chosen so that about as many images as wanted are below it; the
lowest of them are taken.
"""

import dataclasses
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import tensorflow as tf
from apache_beam.io.filesystems import FileSystems

from components.view_augmenter.files import Shard, compression, serialise
from trainer_module.config import AugmentConfig, ImageConfig, SampleConfig
from trainer_module.images import centre_view, eval_resize, stored_image, to_uint8
from trainer_module.input import PROBES

SPLITS = ("train", "eval")
_FOLDER = "watch"  # beside the splits
_PROBE = "probe"
_MARGIN = 4.0  # standard deviations of the number of images below a bound


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """What decides sample and probes; travels to the workers.

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
        return self._bound(split, self.limit(split))

    def probe_bound(self, split: str) -> float:
        """The share of all hashes that may be probes: of the eval split, or of the train split where that is empty."""
        return self._bound(split, PROBES) if split == ("eval" if self.images["eval"] else "train") else 0.0

    def _bound(self, split: str, limit: int) -> float:
        return (limit + _MARGIN * limit**0.5) / max(1, self.images[split])

    def bytes(self) -> int:
        """What the files take, at the most, without ids and framing."""
        images = sum(min(self.images[split], round(self.bound(split) * self.images[split])) for split in SPLITS)
        return images * self.augment.size**2 * 3


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """A finished record file, as the manifest lists it; the name is relative to the artifact's root.

    The split of the probes' file is "probe".
    """

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
        function = beam.ParDo(TakeSampleFn(self._job)).with_outputs(_PROBE, main="files")
        taken = shards | "Spread" >> beam.Reshuffle() | "Write" >> function
        probes = (
            taken[_PROBE]
            | "LowestProbes" >> beam.combiners.Top.Smallest(PROBES)
            | "WriteProbes" >> beam.FlatMap(_write_probes, self._job)
        )
        return (taken.files, probes) | "AllFiles" >> beam.Flatten()


class TakeSampleFn(beam.DoFn):
    """Writes the sample's images of one shard, and passes its probes on; a bundle may be retried, or run twice at once.

    Main output: SampleFile. Tagged `probe`: (hex SHA-256, encoded image).
    """

    def __init__(self, job: SampleJob):
        self._job = job

    def setup(self) -> None:
        """Traces the graph once for all shards of this worker."""
        self._view = _view_function(self._job)

    def process(self, element: tuple[str, Shard]) -> Iterable[Any]:
        """Writes the file of one shard, in the shard's order."""
        split, shard = element
        part, count = f"{self._job.scratch}/{uuid.uuid4().hex}", 0
        with tf.io.TFRecordWriter(part) as writer:
            for sha, encoded, label in _images(shard.path):
                if label and _is_below(sha, self._job.bound(split)):
                    view = self._view(tf.constant(encoded)).numpy().tobytes()
                    writer.write(serialise({"id": sha, "image": view, "label": label}))
                    count += 1
                if _is_below(sha, self._job.probe_bound(split)):
                    yield beam.pvalue.TaggedOutput(_PROBE, (sha, encoded))
        if count:
            yield _publish(self._job, part, split, shard.suffix, count)


def _images(path: str) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Hex SHA-256, encoded image and label of each ingested record; an empty label where it has none."""
    for record in tf.data.TFRecordDataset(path, compression(path)).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        sha, encoded = (features[name].bytes_list.value[0] for name in ("image/sha256", "image/encoded"))
        yield sha, encoded, b"".join(features["image/label"].bytes_list.value[:1])


def _is_below(sha: bytes, bound: float) -> bool:
    return int(sha, 16) < bound * 2.0**256


def _write_probes(probes: list[tuple[bytes, bytes]], job: SampleJob) -> Iterator[SampleFile]:
    """One file of all probes, lowest hash first; none where there are no images."""
    part = f"{job.scratch}/{uuid.uuid4().hex}"
    with tf.io.TFRecordWriter(part) as writer:
        for sha, encoded in probes:
            writer.write(serialise({"id": sha, "encoded": encoded}))
    if probes:
        yield _publish(job, part, _PROBE, "00000-of-00001.tfrecord", len(probes))


def _publish(job: SampleJob, part: str, split: str, suffix: str, records: int) -> SampleFile:
    """Gives a finished file its name."""
    name, size = f"{_FOLDER}/{split}-{suffix}", tf.io.gfile.stat(part).length
    FileSystems.rename([part], [f"{job.uri}/{name}"])
    return SampleFile(split, name, records, size)


def _view_function(job: SampleJob) -> tf.types.experimental.ConcreteFunction:
    """Encoded bytes, string [], to the centre view that embeds the image, uint8 [size, size, 3]."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def view(encoded: tf.Tensor) -> tf.Tensor:
        image = stored_image(encoded, job.image)
        return to_uint8(centre_view(image, eval_resize(job.image, job.augment), job.augment.size))

    return view.get_concrete_function()
