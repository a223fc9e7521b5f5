"""The Beam pipeline of `./moco embed`: finds the images of a source, and writes their embeddings in shards.

A shard holds the images of some files, or of a part of an archive, in their order, as many as Job.rows. Its name says
what is in it: the number of the file, of the part, and a digest of the images' hashes, names and labels and of the
model. So a shard that is there is taken over by a later start if, and only if, it is what that start would write.

Which images share a call of the model is settled by their places in the source, and not, as Beam's own batches are, by
how the runner cuts its bundles: the sums of a neural network are rounded otherwise in another batch, and a run that was
interrupted has to end with the very bytes of one that was not. RunInference therefore gets whole shards for elements;
it sees to it that a worker loads the model once. Beam's handlers for TensorFlow do not fit: they load what Keras saved,
through tensorflow_hub, stack arrays of one shape, and know no signatures.

What travels between the stages is names. The list of a shard's images lies in a file beside it until it has been
written, so the memory of a worker, which is also that of a run in this process, holds the images of two batches, one
shard's embeddings, and the names of the source's files.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.ml.inference.base import ModelHandler, RunInference

from components.image_example_gen import codec, finding, sources
from components.image_example_gen.config import IngestConfig
from pipeline.embedding import store, table
from pipeline.embedding.encoder import Encoder
from trainer_module.errors import UserError

PLAN = ".plan"  # folder of what is not finished
_FORMAT = 1  # of the shards
_MANIFEST = f"{PLAN}/manifest.json"

Load = Callable[[], Encoder]
# ("ref", SHA-256, packed reference), ("bad", path, reason, detail, SHA-256 or None), or ("skipped",), which keeps its
# place so that batches do not depend on where a shard begins.
Member = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is done; travels to the workers.

    Attributes:
        src: the source, see `sources`.
        folder: where the shards are written; local or remote.
        model_sha256: of the encoder.
        batch: images in one call of the model.
        rows: images in a shard at most; a multiple of `batch`.
        config: what is read and refused.
    """

    src: str
    folder: str
    model_sha256: str
    batch: int
    rows: int
    config: IngestConfig


class Done(NamedTuple):
    """A shard that is there: its name, what it holds, and whether an earlier start has made it."""

    name: str
    counts: table.Counts
    kept: bool


def run(options: Any, job: Job, load: Load) -> list[Done]:
    """Runs the pipeline to its end.

    Args:
        options: Beam's, see `pipeline.beam`.
        job: what is done.
        load: gives the encoder; travels to the workers, too.

    Returns:
        The shards in the order of their rows.
    """
    for name in (PLAN, f"{PLAN}/unpacked"):
        store.make_folder(f"{job.folder}/{name}")
    store.remove(f"{job.folder}/{_MANIFEST}")
    with beam.Pipeline(options=options) as pipeline:
        build(pipeline, job, load)
    if not FileSystems.exists(f"{job.folder}/{_MANIFEST}"):  # there was no image
        return []
    rows = json.loads(store.read(f"{job.folder}/{_MANIFEST}"))
    return [Done(name, table.Counts(*counts), kept) for name, counts, kept in rows]


def build(pipeline: beam.Pipeline, job: Job, load: Load) -> None:
    """Adds the stages to a Beam pipeline; the last writes the list of the shards, if there are any.

    Grouping takes the place of Beam's global combiners, since each of them costs a tenth of a second to set up.
    """
    planned = (
        pipeline
        | "Source" >> beam.Create([job.src])
        | "List" >> beam.FlatMap(list_batches, job.rows)
        | "SpreadFiles" >> beam.Reshuffle()
        | "Plan" >> beam.ParDo(Plan(job)).with_outputs("kept", main="wanted")
    )
    total = (
        planned.wanted
        | "Rows" >> beam.Map(_rows)
        | "GroupRows" >> beam.GroupByKey()
        | "SumRows" >> beam.MapTuple(lambda _, rows: sum(rows))
    )
    made = (
        planned.wanted
        | "SpreadShards" >> beam.Reshuffle()
        | "WithTotal" >> beam.Map(_with_total, beam.pvalue.AsSingleton(total, 0))
        | "Embed" >> RunInference(EmbedShard(job, load))
        | "Write" >> beam.Map(_write_shard, job.folder)
    )
    _ = (
        (planned.kept, made)
        | "AllShards" >> beam.Flatten()
        | "KeyShards" >> beam.Map(lambda done: (None, done))
        | "ListShards" >> beam.GroupByKey()
        | "WriteManifest" >> beam.Map(_write_manifest, f"{job.folder}/{_MANIFEST}")
    )


def is_shard(name: str) -> bool:
    """Whether a file's name is that of a shard."""
    return bool(re.fullmatch(r"part-\d{7}-\d{5}-[0-9a-f]{32}\.parquet", name))


def list_batches(src: str, size: int) -> Iterator[tuple[int, list[tuple[Any, ...]]]]:
    """Lists a source in order: numbered batches of image files, archives one by one."""
    yield from enumerate(finding.batches(sources.sorted_files(src), size))


class Plan(beam.DoFn):
    """Files to the shards that they need.

    Input: a batch of `list_batches`. Main output: name and rows of a shard that is wanted, whose members have been
    written into the plan. Tagged `kept`: Done of those that are there.
    """

    def __init__(self, job: Job):
        self._job = job

    def setup(self) -> None:
        """Starts the threads of this worker."""
        self._threads = finding.Threads()
        self._finder = finding.Finder(self._job.config, f"{self._job.folder}/{PLAN}", self._threads)
        self._ticker = finding.Ticker("find images")

    def teardown(self) -> None:
        """Ends the threads."""
        self._threads.close()

    def process(self, element: tuple[int, list[tuple[Any, ...]]]) -> Iterator[Any]:
        """See the class."""
        file, batch = element
        found = (_member(kind, value) for kind, value in self._finder.find(batch))
        for part, members in enumerate(finding.chunks(found, self._job.rows)):
            rows = sum(member[0] != "skipped" for member in members)
            self._ticker.add(rows, None)
            if not rows:
                continue
            name = f"part-{file:07d}-{part:05d}-{self._digest(members)}.parquet"
            if counts := _finished(f"{self._job.folder}/{name}"):
                yield beam.pvalue.TaggedOutput("kept", Done(name, counts, kept=True))
            else:
                store.write(f"{self._job.folder}/{PLAN}/{name}.json", json.dumps(members).encode())
                yield name, rows

    def _digest(self, members: Iterable[Member]) -> str:
        total = hashlib.sha256(json.dumps([_FORMAT, self._job.model_sha256, self._job.batch]).encode())
        for kind, *values in members:
            if kind == "ref":
                # Where the file lies does not matter.
                ref = finding.unpack_ref(values[1])
                values = [values[0], ref.path, ref.label]
            total.update(json.dumps([kind, *values]).encode())
        return total.hexdigest()[:32]


def _member(kind: str, value: Any) -> Member:
    if kind == "ref":
        return (kind, value[0].hex(), value[1])
    return (kind, *value) if kind == "bad" else (kind,)


def _finished(path: str) -> table.Counts | None:
    """The counts of a shard that is whole, and that another try would not make any better."""
    if not FileSystems.exists(path):
        return None
    with sources.open_file(path) as stream:
        counts = table.shard_counts(stream)
    return counts if counts and not counts.unread else None


def _rows(element: tuple[str, int]) -> tuple[None, int]:
    return None, element[1]


def _with_total(element: tuple[str, int], total: int) -> tuple[str, int]:
    """(name, rows) to (name, rows of all shards), for the progress."""
    return element[0], total


class _Worker:
    """Embeds shards with an encoder; made once in a process."""

    def __init__(self, job: Job, encoder: Encoder):
        self._job, self._encoder = job, encoder
        self._limits = codec.Limits(job.config.max_pixels, job.config.min_side)
        self._threads = finding.Threads()
        self._ticker = finding.Ticker("embed", timed=True)

    def embed(self, name: str, members: Iterable[Member], total: int) -> "_Made":
        """A shard's rows."""
        rows: list[table.Row] = []
        unread = 0
        # Threads decode and check the next images while the model has these.
        for prepared in finding.chunks(self._threads.in_order(self._prepare, members), self._job.batch):
            images = [image for image in prepared if image]
            encoded = [image.encoded for image in images if image.encoded is not None]
            outcomes = iter(self._encoder(encoded) if encoded else [])
            rows += [_embedded(image, outcomes) for image in images]
            unread += sum(image.unread for image in images)
            self._ticker.add(len(images), total)
        return _Made(name, rows, unread)

    def _prepare(self, member: Member) -> "_Prepared | None":
        kind, *values = member
        if kind == "skipped":
            return None
        if kind == "bad":
            path, reason, detail, sha = values
            return _Prepared(table.Row(path, sha or "", None, None, f"{reason}: {detail}"))
        sha, ref = values[0], finding.unpack_ref(values[1])
        row = table.Row(ref.path, sha, ref.label, None, None)
        try:
            data = finding.read_again(ref, sha)
            return _Prepared(row, codec.canonical(data, self._limits).encoded)
        except codec.BadImage as error:
            return _Prepared(row._replace(error=str(error)))
        except OSError as error:
            return _Prepared(row._replace(error=f"unreadable: {error}"), unread=True)


class _Prepared(NamedTuple):
    """A row with what the model is to embed; a row with an error has nothing for the model."""

    row: table.Row
    encoded: bytes | None = None
    unread: bool = False


class _Made(NamedTuple):
    """A shard, not written yet; see `table.Counts`."""

    name: str
    rows: list[table.Row]
    unread: int


def _embedded(image: _Prepared, outcomes: Iterator[Any]) -> table.Row:
    if image.encoded is None:
        return image.row
    outcome = next(outcomes)
    return image.row._replace(error=outcome) if isinstance(outcome, str) else image.row._replace(embedding=outcome)


class EmbedShard(ModelHandler[tuple[str, int], _Made, _Worker]):
    """Name of a shard, with the rows of all shards, to its rows."""

    def __init__(self, job: Job, load: Load):
        super().__init__()
        self._job, self._load = job, load

    def load_model(self) -> _Worker:
        """Once in a process."""
        encoder = self._load()
        if encoder.sha256 != self._job.model_sha256:
            raise UserError("--model: it was changed while images were embedded; run again")
        return _Worker(self._job, encoder)

    def run_inference(
        self,
        batch: Sequence[tuple[str, int]],
        model: _Worker,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterator[_Made]:
        """Embeds the images of shards."""
        del inference_args
        for name, total in batch:
            members = json.loads(store.read(f"{self._job.folder}/{PLAN}/{name}.json"))
            yield model.embed(name, members, total)

    def batch_elements_kwargs(self) -> dict[str, int]:
        """A shard is a batch."""
        return {"min_batch_size": 1, "max_batch_size": 1}

    def get_metrics_namespace(self) -> str:
        """Where Beam counts shards, their seconds, and the loading of the model."""
        return "moco.embed"


def _write_shard(made: _Made, folder: str) -> Done:
    counts = table.Counts(len(made.rows), sum(row.error is not None for row in made.rows), made.unread)
    store.write(f"{folder}/{made.name}", table.encode_shard(made.rows, counts))
    return Done(made.name, counts, kept=False)


def _write_manifest(shards: tuple[None, Iterable[Done]], path: str) -> None:
    store.write(path, json.dumps(sorted(shards[1])).encode())
