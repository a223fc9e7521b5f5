"""Beam pipeline of ImageExampleGen: find, de-duplicate, split, group into shards, then check and write each shard.

Only references (file, offset, size) travel between the stages. An image's bytes are read twice, once to hash them and
once to check and write them, and never held longer than that; the runner keeps about 2.5 kB of references an image.
Workers import this module, so it imports no TFX, which would cost each of them 13 s of processor time.
"""

import bisect
import collections
import dataclasses
import hashlib
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import tensorflow as tf

from components import disk
from components.image_example_gen import codec, finding, sources
from components.image_example_gen.config import IngestConfig, NearDuplicates
from components.image_example_gen.near_duplicates import Index, Prints

NEAR_DUPLICATES_FILE = "near_duplicates.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
_SCRATCH = ".scratch"
_BATCH = 64  # image files listed together, which one call reads with its threads
_MANIFEST = "manifest"  # among the counts, since it is summed as they are
_SPACE_MARGIN = 1.05
_DIGIT_BITS = 32  # Beam's integers have 64, so 2^31 images can be summed digit by digit

Counts = dict[tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one run of the executor does; travels to the workers.

    Attributes:
        src: the source, see `sources`.
        uri: root of the Examples artifact.
        config: limits.
        splits: names of the splits with the end of each one's hash buckets, ascending.
    """

    src: str
    uri: str
    config: IngestConfig
    splits: tuple[tuple[str, int], ...]

    @property
    def limits(self) -> codec.Limits:
        """Accepted sizes."""
        return codec.Limits(self.config.max_pixels, self.config.min_side)

    @property
    def scratch(self) -> str:
        """Folder for what is not finished; no reader of the artifact looks there, and it is removed in the end."""
        return f"{self.uri}/{_SCRATCH}"

    def split_folder(self, split: str) -> str:
        """Folder of a split's shards."""
        return f"{self.uri}/Split-{split}"


def split_of(sha: str, splits: Sequence[tuple[str, int]]) -> str:
    """The split of an image by the hash of its content: TFX's rule, with the original bytes as the record.

    Args:
        sha: hex SHA-256.
        splits: names with the ends of their buckets, ascending.
    """
    bucket = int(sha, 16) % splits[-1][1]
    return splits[bisect.bisect([end for _, end in splits], bucket)][0]


def shard_of(sha: str, shards: int) -> int:
    """The shard of an image within its split; other bits of the hash than split_of() rests on."""
    return int(sha[:15], 16) % shards


def build(pipeline: beam.Pipeline, job: Job) -> None:
    """Adds the stages to a Beam pipeline.

    It leaves the shards in the split folders, and `counts.json` and `quarantine.jsonl` in the scratch folder.
    """
    found = (
        pipeline
        | "Source" >> beam.Create([job.src])
        | "List" >> beam.FlatMap(list_batches)
        | "SpreadFiles" >> beam.Reshuffle()
        | "Find" >> beam.ParDo(Find(job)).with_outputs("bad", "counts", main="refs")
    )
    unique = found.refs | "DropDuplicates" >> beam.CombinePerKey(FirstCopy())
    placed = unique | "Split" >> beam.Map(_place, job.splits)
    sizes = (
        placed | "Sizes" >> beam.Map(_size) | "SumSizes" >> beam.CombinePerKey(beam.combiners.TupleCombineFn(sum, sum))
    )
    sizes_by_split = beam.pvalue.AsDict(sizes)
    # Every shard exists even if no image falls into it, so that the numbers in the names have no gaps.
    frames = sizes | "Frames" >> beam.FlatMap(_frames, job, sizes_by_split)
    members = placed | "Shard" >> beam.Map(_shard, job.config.shard_mb, sizes_by_split)
    written = (
        (frames, members)
        | "WithFrames" >> beam.Flatten()
        | "GroupShards" >> beam.GroupByKey()
        | "Write" >> beam.ParDo(WriteShard(job), sizes_by_split).with_outputs("bad", "prints", main="counts")
    )
    alike = _near_duplicates(written.prints, job)
    near = alike | "NearCounts" >> beam.Map(lambda _: {("near_duplicates",): 1})
    dropped = (
        alike
        | "Drop" >> beam.Filter(lambda _: job.config.near_duplicates is NearDuplicates.drop)
        | "ByShard" >> beam.Map(_shard_of_pair, job, sizes_by_split)
        | "GroupDropped" >> beam.GroupByKey()
        | "Rewrite" >> beam.Map(_rewrite, job)
    )
    copies = unique | "Copies" >> beam.FlatMap(_copies)
    _ = (
        (found.counts, copies, written.counts, near, dropped)
        | "AllCounts" >> beam.Flatten()
        | "AddCounts" >> beam.CombineGlobally(add_counts)
        | "WriteCounts" >> beam.Map(_write_counts, f"{job.scratch}/counts.json")
    )
    _ = (
        (found.bad, written.bad)
        | "AllBad" >> beam.Flatten()
        | "ListBad" >> beam.combiners.ToList()
        | "WriteQuarantine" >> beam.Map(_write_quarantine, f"{job.scratch}/{QUARANTINE_FILE}")
    )
    in_pairs = alike | "InPairs" >> beam.FlatMap(lambda pair: [(pair[0], True), (pair[1][1], True)])
    _ = (
        unique
        | "NearPaths" >> beam.FlatMap(_path_if_wanted, beam.pvalue.AsDict(in_pairs))
        | "ListPaths" >> beam.combiners.ToDict()
        | "WriteNear" >> beam.Map(_write_pairs, beam.pvalue.AsDict(alike), f"{job.scratch}/{NEAR_DUPLICATES_FILE}")
    )


def _near_duplicates(prints: beam.PCollection, job: Job) -> beam.PCollection:
    """(sha of an eval image, (bits that differ, sha of the train image most like it)), all as bytes of hex digits."""
    train, held_out = job.splits[0][0], job.splits[-1][0]
    wanted = prints | "EvalPrints" >> beam.FlatMap(lambda one: [one[1]] if one[0] == held_out else [])
    return (
        prints
        | "TrainPrints" >> beam.FlatMap(lambda one: [one[1]] if one[0] == train else [])
        | "FindAlike" >> beam.ParDo(FindAlike(job.config.near_duplicate_bits), beam.pvalue.AsList(wanted))
        | "GroupAlike" >> beam.GroupByKey()
        | "MostAlike" >> beam.MapTuple(lambda sha, found: (sha, min(found)))
    )


class FindAlike(beam.DoFn):
    """Prints of a train shard to pairs with the eval images that look like one of them."""

    def __init__(self, distance: int):
        self._distance = distance
        self._index: Index | None = None

    def process(self, prints: Prints, wanted: list[Prints]) -> Iterator[tuple[bytes, tuple[int, bytes]]]:
        """See the class."""
        if self._index is None:
            self._index = Index(Prints.join(wanted), self._distance)
        yield from self._index.find(prints)


def list_batches(src: str) -> Iterator[list[tuple[Any, ...]]]:
    """Lists a source: images in batches, archives one by one."""
    return finding.batches(sources.list_files(src), _BATCH)


class _ThreadedDoFn(beam.DoFn):
    """A DoFn with threads."""

    def __init__(self, job: Job):
        self._job = job

    def setup(self) -> None:
        """Starts the threads of this worker."""
        self._threads = finding.Threads()
        self._ticker = finding.Ticker(self._task())

    def teardown(self) -> None:
        """Ends the threads."""
        self._threads.close()

    def _task(self) -> str:
        raise NotImplementedError


class Find(_ThreadedDoFn):
    """Files to references with the hash of their bytes; see `finding.Finder`.

    Input: a batch of `list_batches`. Main output: (SHA-256, packed Ref). Tagged: `bad` rows, `counts`.
    """

    def _task(self) -> str:
        return "find images"

    def process(self, batch: list[tuple[Any, ...]]) -> Iterator[Any]:
        """See the class."""
        counts: Counts = collections.Counter()
        finder = finding.Finder(self._job.config, self._job.scratch, self._threads)
        for kind, value in finder.find(batch):
            counts[(kind,)] += 1
            if kind == "skipped":
                continue
            counts[("read",)] += 1
            self._ticker.add(1, None)
            yield value if kind == "ref" else beam.pvalue.TaggedOutput("bad", value)
        yield beam.pvalue.TaggedOutput("counts", dict(counts))


class FirstCopy(beam.CombineFn):
    """Of the references to the same bytes, the one whose path comes first; its label stands.

    Output: (packed Ref, number of copies, whether copies differ in their labels).
    """

    def create_accumulator(self) -> tuple[str, int, bool] | None:
        """Nothing yet."""
        return None

    def add_input(self, accumulator: tuple[str, int, bool] | None, ref: str) -> tuple[str, int, bool]:
        """One reference more."""
        one = (ref, 1, False)
        return one if accumulator is None else self._merge(accumulator, one)

    def merge_accumulators(self, accumulators: Iterable[Any]) -> tuple[str, int, bool] | None:
        """What several have found."""
        merged = None
        for one in accumulators:
            if one is not None:
                merged = one if merged is None else self._merge(merged, one)
        return merged

    def extract_output(self, accumulator: tuple[str, int, bool] | None) -> tuple[str, int, bool] | None:
        """As it is."""
        return accumulator

    @staticmethod
    def _merge(left: tuple[str, int, bool], right: tuple[str, int, bool]) -> tuple[str, int, bool]:
        differ = left[2] or right[2] or finding.unpack_ref(left[0]).label != finding.unpack_ref(right[0]).label
        return min(left[0], right[0]), left[1] + right[1], differ


class WriteShard(_ThreadedDoFn):
    """Reads, checks and writes one shard, images in the order of their hashes.

    Input: ((split, index), references with their hashes). Main output: counts. Tagged: `bad` rows.
    """

    def _task(self) -> str:
        return "read images"

    def process(self, element: tuple[Any, Iterable[Any]], sizes: Mapping[str, tuple[int, int]]) -> Iterator[Any]:
        """See the class. `sizes`: bytes and images of each split."""
        (split, index), members = element
        shards = shard_count(sizes[split][0], self._job.config.shard_mb)
        total = sum(images for _, images in sizes.values())
        name = shard_name(index, shards)
        scratch = f"{self._job.scratch}/{uuid.uuid4().hex}"
        counts: collections.Counter[tuple[str, ...]] = collections.Counter()
        prints: list[tuple[int, str]] = []
        with tf.io.TFRecordWriter(scratch) as writer:
            for record, size, label, bad in self._threads.in_order(
                self._check, sorted(m for m in members if m is not None)
            ):
                self._ticker.add(1, total)
                if bad:
                    counts[("bad",)] += 1
                    yield beam.pvalue.TaggedOutput("bad", bad)
                    continue
                writer.write(encode_example(record, split))
                if record[0].perceptual is not None:
                    prints.append((record[0].perceptual, record[1]))
                counts[("bytes",)] += size
                counts[("split", split)] += 1
                counts[("unlabelled",) if label is None else ("label", label, split)] += 1
                counts.update(identity(record[1], split, label))
        # A retry of this bundle writes the same bytes under the same name.
        tf.io.gfile.rename(scratch, f"{self._job.split_folder(split)}/{name}", overwrite=True)
        yield beam.pvalue.TaggedOutput("prints", (split, Prints.of(prints)))
        yield dict(counts)

    def _check(self, member: tuple[bytes, str]) -> tuple[Any, int, str | None, tuple[Any, ...] | None]:
        """(record, bytes, label, None) of a good image, (None, 0, None, row) of a bad one."""
        sha, ref = member[0].hex(), finding.unpack_ref(member[1])
        try:
            data = finding.read_again(ref, sha)
            hashed = self._job.config.near_duplicates is not NearDuplicates.ignore
            image = codec.canonical(data, self._job.limits, hashed=hashed)
            if image.encoded is data:
                _prove(data)
        except codec.BadImage as bad:
            return None, 0, None, (ref.path, bad.reason, bad.detail, sha)
        except OSError as error:
            return None, 0, None, (ref.path, "unreadable", str(error), sha)
        return (image, sha, ref), len(image.encoded), ref.label, None


def _prove(encoded: bytes) -> None:
    """Decodes bytes that are kept as they are by later stages' codecs: Pillow forgives damage that TensorFlow does not.

    One raw operation: trainer_module.images.decode is a dozen, which eagerly cost more than the image.

    Raises:
        BadImage: they are refused.
    """
    try:
        tf.raw_ops.DecodeImage(contents=encoded, channels=3, expand_animations=False)
    except tf.errors.InvalidArgumentError as error:
        raise codec.BadImage(
            "damaged", f"TensorFlow cannot decode it: {error.message.splitlines()[0][:150]}"
        ) from error


def encode_example(record: tuple[codec.Canonical, str, sources.Ref], split: str) -> bytes:
    """Serialises one image as tf.Example, fields in a fixed order, so that equal images give equal bytes."""
    image, sha, ref = record
    values: dict[str, bytes | int] = {
        "image/encoded": image.encoded,
        "image/format": image.format.encode(),
        "image/sha256": sha.encode(),
        "image/path": ref.path.encode(),
        "image/split": split.encode(),
        "image/height": image.height,
        "image/width": image.width,
    }
    if ref.label is not None:
        values["image/label"] = ref.label.encode()
    example = tf.train.Example()
    features = example.features.feature
    for name, value in values.items():
        kind = features[name].int64_list if isinstance(value, int) else features[name].bytes_list
        kind.value.append(value)
    return example.SerializeToString(deterministic=True)


def identity(sha: str, split: str, label: str | None) -> Counts:
    """What one image adds to the manifest: the SHA-256 of split, content and label as a number, digit by digit.

    The manifest of a data set is the sum over its images, modulo 2^256, in hex. A sum depends neither on the order nor
    on shards, workers or paths, and takes no memory and no shuffle, which a hash of the sorted identities would; an
    image that is dropped later is subtracted. It tells data sets apart, and proves nothing against a forger who may
    choose the images, for whom sums are weaker than the hash of a list.

    Args:
        sha: hex SHA-256 of the original bytes.
        split: that the image is in.
        label: None where it has none.
    """
    digest = hashlib.sha256(json.dumps([split, sha, label]).encode()).digest()
    size = _DIGIT_BITS // 8
    digits = [int.from_bytes(digest[at : at + size], "little") for at in range(0, len(digest), size)]
    return {(_MANIFEST, str(place)): digit for place, digit in enumerate(digits)}


def manifest(counts: Counts) -> str:
    """The manifest, 64 hexadecimal digits; see `identity`."""
    total = sum(value << (_DIGIT_BITS * int(key[1])) for key, value in counts.items() if key[0] == _MANIFEST)
    return f"{total % 2**256:064x}"


def shard_count(size: int, shard_mb: float) -> int:
    """Shards of a split of so many bytes."""
    return max(1, math.ceil(size / (shard_mb * 2**20)))


def shard_name(index: int, shards: int) -> str:
    """File of a shard within its split's folder."""
    return f"images-{index:05d}-of-{shards:05d}.tfrecord"


def add_counts(many: Iterable[Counts]) -> Counts:
    """Adds counts up."""
    total: Counts = collections.Counter()
    for counts in many:
        total.update(counts)
    return dict(total)


# --- small stages


def _place(element: tuple[bytes, tuple[str, int, bool]], splits: Sequence[tuple[str, int]]) -> tuple[str, bytes, str]:
    """(sha, (ref, copies, conflict)) to (split, sha, ref)."""
    sha, (ref, _, _) = element
    return split_of(sha.hex(), splits), sha, ref


def _size(element: tuple[str, bytes, str]) -> tuple[str, tuple[int, int]]:
    """(split, sha, ref) to (split, (bytes, 1))."""
    ref = finding.unpack_ref(element[2])
    return element[0], (ref.stored or ref.size, 1)


def _frames(
    element: tuple[str, tuple[int, int]], job: Job, sizes: Mapping[str, tuple[int, int]]
) -> list[tuple[tuple[str, int], None]]:
    """One empty member for every shard of a split. Nothing is written before them, so a lack of space is told here.

    Raises:
        UserError: no space.
    """
    split, (size, _) = element
    grown = f"the images of {job.src}, some of which grow when they are turned upright or converted,"
    check_space(job, sum(size for size, _ in sizes.values()), grown)
    return [((split, index), None) for index in range(shard_count(size, job.config.shard_mb))]


def check_space(job: Job, need: int, what: str) -> None:
    """Refuses to write so many bytes where the disk cannot hold them; see `disk.check_space`.

    Raises:
        UserError: no space.
    """
    disk.check_space(job.uri, need * _SPACE_MARGIN, what, "free some space or choose another --workdir")


def _shard(
    element: tuple[str, bytes, str], shard_mb: float, sizes: Mapping[str, tuple[int, int]]
) -> tuple[tuple[str, int], tuple[bytes, str]]:
    """(split, sha, ref) to ((split, shard), (sha, ref))."""
    split, sha, ref = element
    return (split, shard_of(sha.hex(), shard_count(sizes[split][0], shard_mb))), (sha, ref)


def _copies(element: tuple[bytes, tuple[str, int, bool]]) -> list[Counts]:
    """Counts of an image that was found more than once."""
    _, (_, copies, conflict) = element
    return [{("duplicates",): copies - 1, ("label_conflicts",): int(conflict)}] if copies > 1 else []


def _shard_of_pair(
    pair: tuple[bytes, tuple[int, bytes]], job: Job, sizes: Mapping[str, tuple[int, int]]
) -> tuple[str, bytes]:
    """(sha of an eval image, …) to (path of its shard, sha)."""
    sha = pair[0].decode()
    split = split_of(sha, job.splits)
    shards = shard_count(sizes[split][0], job.config.shard_mb)
    return f"{job.split_folder(split)}/{shard_name(shard_of(sha, shards), shards)}", pair[0]


def _rewrite(element: tuple[str, Iterable[bytes]], job: Job) -> Counts:
    """Takes images out of a shard, whose file is replaced as a whole; all shards were written before."""
    path, shas = element[0], set(element[1])
    scratch = f"{job.scratch}/{uuid.uuid4().hex}"
    counts: collections.Counter[tuple[str, ...]] = collections.Counter()
    with tf.io.TFRecordWriter(scratch) as writer:
        for record in tf.compat.v1.io.tf_record_iterator(path):
            features = tf.train.Example.FromString(record).features.feature
            if features["image/sha256"].bytes_list.value[0] not in shas:
                writer.write(record)
                continue
            split = features["image/split"].bytes_list.value[0].decode()
            label = features["image/label"].bytes_list.value if "image/label" in features else ()
            counts[("near_duplicates_dropped",)] += 1
            counts[("bytes",)] -= len(features["image/encoded"].bytes_list.value[0])
            counts[("split", split)] -= 1
            counts[("label", label[0].decode(), split) if label else ("unlabelled",)] -= 1
            sha = features["image/sha256"].bytes_list.value[0].decode()
            counts.subtract(identity(sha, split, label[0].decode() if label else None))
    tf.io.gfile.rename(scratch, path, overwrite=True)
    return dict(counts)


def _path_if_wanted(
    element: tuple[bytes, tuple[str, int, bool]], wanted: Mapping[bytes, bool]
) -> Iterator[tuple[bytes, str]]:
    """(sha, path) of an image that is wanted."""
    sha, (ref, _, _) = element
    key = sha.hex().encode()
    if key in wanted:
        yield key, finding.unpack_ref(ref).path


# --- the files beside the splits


def _write_counts(counts: Counts, path: str) -> None:
    """Writes counts as pairs, since their keys are tuples."""
    write_text(path, json.dumps([[list(key), value] for key, value in sorted(counts.items())]))


def read_counts(path: str) -> Counts:
    """Counts by their keys, as `_write_counts` wrote them."""
    with tf.io.gfile.GFile(path, "r") as file:
        return {tuple(key): value for key, value in json.loads(file.read())}


def _write_quarantine(rows: list[tuple[Any, ...]], path: str) -> None:
    """Writes the rows, sorted by path, one JSON object a line."""
    names = ("path", "reason", "detail", "sha256")
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in sorted(rows, key=_row_order)]
    write_text(path, "".join(line + "\n" for line in lines))


def _write_pairs(paths: Mapping[bytes, str], pairs: Mapping[bytes, tuple[int, bytes]], path: str) -> None:
    """Writes the near duplicates, sorted by path, one JSON object a line."""
    rows = sorted((paths[own], paths[other], bits) for own, (bits, other) in pairs.items())
    names = ("eval", "train", "bits")
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def _row_order(row: tuple[Any, ...]) -> tuple[str, ...]:
    """Sorting key of a row; the hash may be missing."""
    return tuple(str(value) for value in row)


def write_text(path: str, text: str) -> None:
    """Writes a small file."""
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(text)
