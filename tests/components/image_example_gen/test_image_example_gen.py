"""Real runs of the executor and of the driver: FnApiRunner, real artifacts, a real metadata store."""

import collections
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import faulty_storage
import pytest
import tensorflow as tf
from faulty_storage import Fault
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tfx import v1 as tfx
from tfx.orchestration import metadata
from tfx.types import standard_artifacts
from tfx.utils import proto_utils

from components import disk
from components.image_example_gen import buckets, codec, component, executor, finding, near_duplicates, sources, stages
from components.image_example_gen.component import ImageExampleGen
from components.image_example_gen.config import COLUMNS, IngestConfig, Labels, NearDuplicates
from pipeline.beam import BEAM_ARGUMENTS
from trainer_module.errors import UserError

pytestmark = pytest.mark.long

SPLITS = (("train", 8000), ("eval", 10_000))
SAMPLE = pathlib.Path(__file__).resolve().parents[3] / "configs" / "demo_images"


def sample(count: int) -> dict[str, bytes]:
    """Real pictures of the sample, spread over its labels: path within the shard to bytes."""
    items = [item for item in sources.read_images(str(SAMPLE), IngestConfig()) if isinstance(item, sources.Found)]
    chosen = items[:: max(1, len(items) // count)][:count]
    return {item.ref.path.split("/", 1)[1]: item.data for item in chosen}


def write_all(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def ingest(src: object, uri: pathlib.Path, options: tuple[str, ...] = (), **values: Any) -> standard_artifacts.Examples:
    """Runs the executor with the component's own parameters, as TFX's launcher would."""
    node = component.ImageExampleGen(str(src), IngestConfig(**values))
    properties = {
        name: proto_utils.proto_to_json(value) if hasattr(value, "SerializeToString") else value
        for name, value in node.exec_properties.items()
    }
    examples = standard_artifacts.Examples()
    examples.uri = str(uri)
    context = executor.Executor.Context(beam_pipeline_args=[*BEAM_ARGUMENTS, *options])
    executor.Executor(context).Do({}, {"examples": [examples]}, properties)
    return examples


def read_split(uri: pathlib.Path, split: str) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((uri / f"Split-{split}").iterdir()):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            rows.append(
                {
                    name: value.int64_list.value[0] if value.HasField("int64_list") else value.bytes_list.value[0]
                    for name, value in features.items()
                }
            )
    return rows


def read_all(uri: pathlib.Path) -> list[dict[str, Any]]:
    return read_split(uri, "train") + read_split(uri, "eval")


def counts(uri: pathlib.Path) -> dict[str, Any]:
    return json.loads((uri / "ingest.json").read_text())


def quarantine(uri: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (uri / "quarantine.jsonl").read_text().splitlines()]


def content(uri: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(uri)): path.read_bytes() for path in sorted(uri.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, bytes], pathlib.Path, standard_artifacts.Examples]:
    """90 real pictures in folders, shards and records; duplicates, broken and foreign files among them."""
    folder = tmp_path_factory.mktemp("mixed")
    pictures = sample(90)
    names = list(pictures)
    write_all(folder / "src", {name: pictures[name] for name in names[:40]})
    for path, mode, part in (("x.tar", "w", names[40:60]), ("y.tgz", "w:gz", names[60:80])):
        with tarfile.open(folder / "src" / path, mode) as archive:
            for name in part:
                info = tarfile.TarInfo(name)
                info.size = len(pictures[name])
                archive.addfile(info, io.BytesIO(pictures[name]))
    with tf.io.TFRecordWriter(str(folder / "src" / "z.tfrecord.gz"), tf.io.TFRecordOptions("GZIP")) as writer:
        for name in names[80:]:
            example = tf.train.Example()
            example.features.feature["image/encoded"].bytes_list.value.append(pictures[name])
            example.features.feature["image/label"].bytes_list.value.append(b"slashed/l\xc3\xa4bel")
            writer.write(example.SerializeToString())
    rotated = Image.Exif()
    rotated[0x0112] = 6
    turned = io.BytesIO()
    Image.open(io.BytesIO(pictures[names[0]])).convert("RGB").resize((40, 20)).save(turned, "JPEG", exif=rotated)
    write_all(
        folder / "src",
        {
            "odd ones/turned.jpg": turned.getvalue(),
            "odd ones/copy.png": pictures[names[0]],
            "odd ones/copy of a shard's.png": pictures[names[45]],
            "odd ones/text.jpg": b"not an image",
            "odd ones/text again.jpg": b"not an image",
            "odd ones/zero.png": b"",
            "odd ones/cut.png": pictures[names[0]][:-100],
            "odd ones/notes.txt": b"hello",
        },
    )
    return pictures, folder / "out", ingest(folder / "src", folder / "out", shard_mb=0.05)


def test_every_image_lands_once_with_all_its_features(mixed: tuple) -> None:
    pictures, uri, _ = mixed
    rows = {row["image/sha256"].decode(): row for row in read_all(uri)}
    assert len(rows) == len(read_all(uri)) == 91
    for data in pictures.values():
        row = rows[hashlib.sha256(data).hexdigest()]
        assert row["image/encoded"] == data
        assert set(row) == {*COLUMNS, "image/encoded", "image/sha256"}
        assert (row["image/format"], row["image/height"], row["image/width"]) == (b"png", 64, 64)
    (turned,) = [row for row in rows.values() if row["image/path"] == b"odd ones/turned.jpg"]
    assert (turned["image/format"], turned["image/height"], turned["image/width"]) == (b"png", 40, 20)
    for split in ("train", "eval"):
        assert {row["image/split"] for row in read_split(uri, split)} == {split.encode()}


def test_a_bucket_is_ingested_into_the_same_bytes_as_the_same_folder_on_disk(
    upload: Any, tmp_path: pathlib.Path
) -> None:
    files = {f"set/{name}": data for name, data in sample(40).items()} | {"set/food/broken.jpg": b"\xff\xd8 broken"}
    write_all(tmp_path / "local", files)
    upload(files)
    ingest(tmp_path / "local" / "set", tmp_path / "from disk")
    ingest("gs://pictures/set", tmp_path / "from bucket", ("--no_auth",))
    assert content(tmp_path / "from bucket") == content(tmp_path / "from disk")
    assert counts(tmp_path / "from bucket")["quarantined"] == 1


@pytest.fixture(scope="module")
def shaky() -> Iterator[faulty_storage.Storage]:
    """A bucket with 20 pictures, which is reached through proxies."""
    with faulty_storage.storage("pictures") as made:
        with faulty_storage.proxy(made) as proxy, pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
            for name, data in sample(20).items():
                buckets.client().bucket("pictures").blob(f"set/{name}").upload_from_string(data)
        yield made


@pytest.fixture
def ingest_through(
    shaky: faulty_storage.Storage, monkeypatch: pytest.MonkeyPatch
) -> Callable[[faulty_storage.Plan, pathlib.Path], int]:
    """Ingests the bucket through a plan; gives the number of requests."""
    monkeypatch.setattr(buckets, "PATIENCE", buckets.Patience(timeout=5.0, total=20.0, pause=0.01))

    def run(plan: faulty_storage.Plan, uri: pathlib.Path) -> int:
        with faulty_storage.proxy(shaky, plan) as proxy:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
            ingest("gs://pictures/set", uri)
            return len(proxy.requests)

    return run


def test_faults_of_a_bucket_now_and_then_change_no_byte_of_what_is_ingested(
    ingest_through: Callable[[faulty_storage.Plan, pathlib.Path], int], tmp_path: pathlib.Path
) -> None:
    kinds = (Fault.answer_cut, Fault.unavailable, Fault.answer_lost, Fault.answer_slow)
    requests = ingest_through(faulty_storage.no_faults, tmp_path / "whole")
    ingest_through(lambda number, _: kinds[number // 3 % 4] if number % 3 == 1 else None, tmp_path / "shaken")
    assert requests > 40
    assert content(tmp_path / "shaken") == content(tmp_path / "whole")
    assert counts(tmp_path / "whole")["quarantined"] == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_an_outage_ends_in_one_line_and_leaves_nothing_half_written(
    ingest_through: Callable[[faulty_storage.Plan, pathlib.Path], int],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    monkeypatch.setattr(buckets, "PATIENCE", buckets.Patience(timeout=5.0, total=0.1, pause=0.01))
    first = round(41 * share)
    line = r"no whole answer about gs://pictures/set.*; check the network, and run again"
    with pytest.raises(UserError, match=line) as caught:
        ingest_through(lambda number, _: Fault.answer_cut if number >= first else None, tmp_path / "out")
    assert str(caught.value).startswith("--images: ")
    assert content(tmp_path / "out") == {}


def test_a_jpeg_that_only_pillow_forgives_is_quarantined_and_not_found_out_later(tmp_path: pathlib.Path) -> None:
    """One marker in the midst of the scan: Pillow decodes on, TensorFlow refuses the file."""
    picture = io.BytesIO()
    Image.effect_noise((200, 200), 60).convert("RGB").save(picture, "JPEG", quality=90)
    good = picture.getvalue()
    forgiven = {}
    for at in range(len(good) // 4, len(good) - 10, 97):
        data = good[:at] + b"\xff\xe4" + good[at + 2 :]
        try:
            codec.canonical(data, codec.Limits(10**6, 8))
            tf.io.decode_jpeg(data)
        except codec.BadImage:
            continue
        except tf.errors.InvalidArgumentError:
            forgiven[f"a/{at}.jpg"] = data
    assert forgiven
    name, data = next(iter(forgiven.items()))
    write_all(tmp_path / "src", {f"b/{path}": picture for path, picture in sample(30).items()} | {name: data})
    ingest(tmp_path / "src", tmp_path / "out")
    assert [(row["path"], row["reason"]) for row in quarantine(tmp_path / "out")] == [(name, "damaged")]


def test_labels_come_from_folders_shards_and_records(mixed: tuple) -> None:
    pictures, uri, _ = mixed
    names = {hashlib.sha256(data).hexdigest(): name for name, data in pictures.items()}
    for row in read_all(uri):
        name = names.get(row["image/sha256"].decode())
        label = row["image/label"].decode()
        if b".tfrecord" in row["image/path"]:
            assert label == "slashed/läbel"
        elif row["image/path"].startswith(b"odd ones/"):
            assert label == "odd ones"
        else:
            assert label == name.split("/")[0]


def test_the_first_path_of_duplicates_stands_and_conflicts_are_counted(mixed: tuple) -> None:
    pictures, uri, _ = mixed
    shared = hashlib.sha256(pictures[list(pictures)[45]]).hexdigest().encode()
    (row,) = [row for row in read_all(uri) if row["image/sha256"] == shared]
    assert row["image/path"] == b"odd ones/copy of a shard's.png"  # before "x.tar/..."
    found = counts(uri)
    assert found["duplicates"] == 2
    assert found["label_conflicts"] == 2


def test_bad_files_are_quarantined_with_path_reason_and_hash(mixed: tuple) -> None:
    _, uri, _ = mixed
    rows = quarantine(uri)
    assert [(row["path"], row["reason"]) for row in rows] == [
        ("odd ones/cut.png", "truncated"),
        ("odd ones/text again.jpg", "not_an_image"),
        ("odd ones/text.jpg", "not_an_image"),
        ("odd ones/zero.png", "empty"),
    ]
    assert rows[1]["sha256"] == hashlib.sha256(b"not an image").hexdigest()


def test_counts_add_up_in_the_file_and_on_the_artifact(mixed: tuple) -> None:
    _, uri, examples = mixed
    found = counts(uri)
    assert found["read"] == found["ingested"] + found["quarantined"] + found["duplicates"] == 97
    assert (found["ingested"], found["quarantined"], found["skipped"], found["unlabelled"]) == (91, 4, 1, 0)
    assert found["train"] == len(read_split(uri, "train"))
    assert found["eval"] == len(read_split(uri, "eval"))
    assert sum(label["train"] for label in found["labels"].values()) == found["train"]
    assert sum(label["eval"] for label in found["labels"].values()) == found["eval"]
    assert found["bytes"] == sum(len(row["image/encoded"]) for row in read_all(uri))
    assert examples.get_string_custom_property("manifest") == found["manifest"]
    for name in found.keys() - {"labels", "manifest"}:
        assert examples.get_int_custom_property(name) == found[name]
    assert json.loads(examples.split_names) == ["train", "eval"]


def test_shards_are_of_the_set_size_numbered_without_gaps_and_sorted(mixed: tuple) -> None:
    _, uri, _ = mixed
    names = sorted(path.name for path in (uri / "Split-train").iterdir())
    assert len(names) > 2
    assert names == [f"images-{index:05d}-of-{len(names):05d}.tfrecord" for index in range(len(names))]
    for path in (uri / "Split-train").iterdir():
        records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
        features = [tf.train.Example.FromString(record).features.feature for record in records]
        hashes = [feature["image/sha256"].bytes_list.value[0] for feature in features]
        assert hashes == sorted(hashes)
        assert sum(map(len, records)) < 3 * 0.05 * 2**20
    assert not (uri / ".scratch").exists()


def test_two_runs_with_other_beam_options_write_the_same_bytes(mixed: tuple, tmp_path: pathlib.Path) -> None:
    _, uri, _ = mixed
    options = ("--direct_running_mode=multi_threading", "--direct_num_workers=3")
    ingest(uri.parent / "src", tmp_path / "out", options, shard_mb=0.05)
    assert content(tmp_path / "out") == content(uri)


def manifest_of(uri: pathlib.Path) -> str:
    """By the definition, from what stands in the shards."""
    total = 0
    for row in read_all(uri):
        label = row["image/label"].decode() if "image/label" in row else None
        what = [row["image/split"].decode(), row["image/sha256"].decode(), label]
        total += int.from_bytes(hashlib.sha256(json.dumps(what).encode()).digest(), "little")
    return f"{total % 2**256:064x}"


def test_the_manifest_names_the_images_by_content_split_and_label_whatever_their_shards_paths_and_copies(
    mixed: tuple, tmp_path: pathlib.Path
) -> None:
    _, uri, _ = mixed
    assert counts(uri)["manifest"] == manifest_of(uri)
    pictures = sample(30)
    write_all(tmp_path / "src", pictures | {f"{name}.again.png": data for name, data in pictures.items()})
    ingest(tmp_path / "src", tmp_path / "out", shard_mb=0.01)
    moved = {f"{name.split('/')[0]}/{number}.png": data for number, (name, data) in enumerate(pictures.items())}
    ingest(write_all(tmp_path / "moved", moved), tmp_path / "of moved")
    assert counts(tmp_path / "out")["manifest"] == counts(tmp_path / "of moved")["manifest"] != counts(uri)["manifest"]


@pytest.mark.parametrize("other", [("b" * 64, "train", "cat"), ("a" * 64, "eval", "cat"), ("a" * 64, "train", None)])
def test_manifests_tell_content_split_and_label_apart_and_forget_what_is_dropped(other: tuple) -> None:
    one, changed = collections.Counter(stages.identity("a" * 64, "train", "cat")), stages.identity(*other)
    assert stages.manifest(one) != stages.manifest(changed)
    both = one + collections.Counter(changed)
    both.subtract(one)
    assert stages.manifest(both) == stages.manifest(changed)
    assert stages.manifest({}) == "0" * 64


def test_an_image_keeps_its_side_whatever_its_path_and_company(mixed: tuple, tmp_path: pathlib.Path) -> None:
    pictures, uri, _ = mixed
    before = {row["image/sha256"]: row["image/split"] for row in read_all(uri)}
    moved = {f"other {index % 3}/{index}": data for index, data in enumerate(list(pictures.values())[:30])}
    write_all(tmp_path / "src", moved)
    ingest(tmp_path / "src", tmp_path / "out", labels=Labels.none)
    after = read_all(tmp_path / "out")
    assert len(after) == 30
    assert all(before[row["image/sha256"]] == row["image/split"] for row in after)
    assert not any("image/label" in row for row in after)
    assert counts(tmp_path / "out")["unlabelled"] == 30


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.floats(0.01, 0.99))
def test_the_split_is_a_function_of_content_and_a_larger_eval_share_only_adds(data: bytes, share: float) -> None:
    sha = hashlib.sha256(data).hexdigest()

    def side(held_out: float) -> str:
        output = component._split_config(held_out)
        ends, end = [], 0
        for split in output.split_config.splits:
            end += split.hash_buckets
            ends.append((split.name, end))
        return stages.split_of(sha, ends)

    if side(share) == "eval":
        assert side((1 + share) / 2) == "eval"


def test_shares_of_splits_and_shards_are_as_asked() -> None:
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(20_000)]
    held_out = [sha for sha in hashes if stages.split_of(sha, SPLITS) == "eval"]
    assert abs(len(held_out) / len(hashes) - 0.2) < 0.01
    sizes = [sum(stages.shard_of(sha, 7) == index for sha in held_out) for index in range(7)]
    assert min(sizes) > 0.8 * len(held_out) / 7


words = st.text("ab/ é", min_size=1, max_size=4)
refs = st.builds(
    sources.Ref,
    words,
    st.integers(0, 5),
    st.integers(0, 1 << 40),
    words,
    st.one_of(st.none(), st.sampled_from(["x", "y"])),
    st.integers(0, 1 << 40),
)


@given(refs, words)
def test_a_reference_survives_its_packing(ref: sources.Ref, folder: str) -> None:
    ref = ref._replace(file="/" + ref.file.rstrip("/") + ".tar")
    single = ref._replace(file=f"/{folder}/{ref.path}x", path=f"{ref.path}x")
    assert finding.unpack_ref(finding.pack_ref(ref)) == ref
    assert finding.unpack_ref(finding.pack_ref(single)) == single


@settings(max_examples=200, deadline=None)
@given(st.lists(refs, min_size=1, max_size=8), st.randoms(use_true_random=False), st.integers(1, 7))
def test_duplicates_merge_alike_in_any_order_and_grouping(
    found: list[sources.Ref], shuffler: random.Random, cut: int
) -> None:
    combine = stages.FirstCopy()

    def merged(parts: list[list[sources.Ref]]) -> tuple[str, int, bool]:
        accumulators = []
        for part in parts:
            accumulator = combine.create_accumulator()
            for ref in part:
                accumulator = combine.add_input(accumulator, finding.pack_ref(ref))
            accumulators.append(accumulator)
        return combine.extract_output(combine.merge_accumulators(accumulators))

    ref, copies, conflict = merged([found])
    assert copies == len(found)
    assert finding.unpack_ref(ref).path == min(one.path for one in found)
    assert conflict == (len({one.label for one in found}) > 1)
    shuffled = shuffler.sample(found, len(found))
    assert merged([found]) == merged([shuffled[:cut], shuffled[cut:]])


def refused(src: pathlib.Path, uri: pathlib.Path, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        ingest(src, uri, **values)
    assert "\n" not in str(caught.value)
    left = [path for path in uri.rglob("*") if path.is_file()] if uri.exists() else []
    assert left == []
    return str(caught.value)


def test_too_many_bad_images_stop_the_run_and_leave_their_list(tmp_path: pathlib.Path) -> None:
    pictures = dict(list(sample(20).items()))
    write_all(tmp_path / "src", pictures | {f"bad/{number}.png": b"text %d" % number for number in range(30)})
    message = refused(tmp_path / "src", tmp_path / "out")
    assert "30 of 50" in message
    assert "60.0%" in message
    assert "ingest.max_bad_fraction=0.5" in message
    kept = tmp_path / "out.quarantine.jsonl"
    assert str(kept) in message
    assert "bad/0.png: not_an_image" in message
    assert len(kept.read_text().splitlines()) == 30
    ingest(tmp_path / "src", tmp_path / "out", max_bad_fraction=0.6)
    assert counts(tmp_path / "out")["ingested"] == 20


def test_no_usable_image_at_all_is_said(tmp_path: pathlib.Path) -> None:
    write_all(tmp_path / "src", {"a/x.png": b"text", "a/y.jpg": b""})
    assert "2 of 2 images cannot be used" in refused(tmp_path / "src", tmp_path / "out", max_bad_fraction=1.0)
    write_all(tmp_path / "texts", {"a/x.txt": b"text"})
    assert "no images in" in refused(tmp_path / "texts", tmp_path / "out2")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(tmp_path / "empty", tmp_path / "out3")
    assert "there is no" in refused(tmp_path / "missing", tmp_path / "out4")


def test_too_few_images_for_two_splits_are_refused_with_their_number(tmp_path: pathlib.Path) -> None:
    chosen = [
        data for data in sample(60).values() if stages.split_of(hashlib.sha256(data).hexdigest(), SPLITS) == "train"
    ]
    write_all(tmp_path / "src", {f"a/{index}.png": data for index, data in enumerate(chosen[:3])})
    message = refused(tmp_path / "src", tmp_path / "out")
    assert message.startswith("3 usable images are too few")
    assert "eval split" in message
    assert "ingest.eval_fraction=0.2" in message


def test_three_images_and_one_label_are_enough_where_both_splits_get_some(tmp_path: pathlib.Path) -> None:
    sides: dict[str, list[bytes]] = {"train": [], "eval": []}
    for data in sample(60).values():
        sides[stages.split_of(hashlib.sha256(data).hexdigest(), SPLITS)].append(data)
    chosen = [*sides["train"][:2], sides["eval"][0]]
    write_all(tmp_path / "src", {f"one/{index}.png": data for index, data in enumerate(chosen)})
    ingest(tmp_path / "src", tmp_path / "out")
    found = counts(tmp_path / "out")
    assert (found["train"], found["eval"], found["labels"]) == (2, 1, {"one": {"train": 2, "eval": 1}})


def test_a_source_larger_than_the_free_space_is_refused_before_the_work(tmp_path: pathlib.Path) -> None:
    (tmp_path / "src").mkdir()
    with open(tmp_path / "src" / "a.png", "wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).total + 1)  # a sparse file: no block of it is written
    message = refused(tmp_path / "src", tmp_path / "out")
    assert "free some space" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """40 JPEGs that a camera held on its side; upright they are PNGs, several times as large."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, data in sample(40).items():
        stream = io.BytesIO()
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((400, 300), Image.Resampling.BICUBIC)
        picture.save(stream, "JPEG", exif=exif)
        files[f"{name}.jpg"] = stream.getvalue()
    return write_all(tmp_path_factory.mktemp("turned"), files)


def size_of(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_shards_of_images_that_grow_are_of_the_set_size(turned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ingest(turned, tmp_path / "out", shard_mb=0.5)
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "Split-train").iterdir()]
    assert counts(tmp_path / "out")["ingested"] == 40
    assert sum(sizes) > 3 * size_of(turned)
    assert sum(sizes) / len(sizes) < 0.5 * 2**20
    assert max(sizes) < 2 * 0.5 * 2**20


def test_the_space_that_growing_images_need_is_told_before_they_are_written(
    turned: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: real._replace(free=2 * size_of(turned)))
    message = refused(turned, tmp_path / "out")
    assert "grow when they are turned upright or converted" in message
    assert "free some space" in message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
def test_a_full_disk_is_known_from_the_errors_that_it_raises() -> None:
    with pytest.raises(OSError, match="space") as of_python, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(tf.errors.OpError, match="space") as of_tensorflow, tf.io.TFRecordWriter("/dev/full") as writer:
        writer.write(b"x" * (1 << 20))
    assert disk.is_full(of_python.value)
    assert disk.is_full(of_tensorflow.value)
    assert disk.is_full(RuntimeError(f"Beam's text of it: {of_python.value}"))
    assert not disk.is_full(OSError("something else"))


class Chain:
    """A pipeline of ImageExampleGen, and StatisticsGen where asked, with a metadata store of its own."""

    def __init__(self, root: pathlib.Path, images: str):
        self.root = root
        self.images = images

    def run(self, code: str = "1", statistics: bool = False, **values: Any) -> None:
        node = ImageExampleGen(self.images, IngestConfig(**values), code=code)
        following = [tfx.components.StatisticsGen(examples=node.outputs["examples"])] if statistics else []
        pipeline = tfx.dsl.Pipeline(
            pipeline_name="images",
            pipeline_root=str(self.root / "root"),
            components=[node, *following],
            enable_cache=True,
            metadata_connection_config=self.store(),
            beam_pipeline_args=[*BEAM_ARGUMENTS],
        )
        tfx.orchestration.LocalDagRunner().run(pipeline)

    def store(self) -> Any:
        return tfx.orchestration.metadata.sqlite_metadata_connection_config(str(self.root / "metadata.db"))

    def artifacts(self) -> list[Any]:
        with metadata.Metadata(self.store()) as handle:
            found = handle.store.get_artifacts_by_type("Examples")
        return sorted((one for one in found if one.state == one.LIVE), key=lambda one: one.id)


def test_the_driver_reruns_on_any_change_below_and_on_nothing_else(tmp_path: pathlib.Path) -> None:
    write_all(
        tmp_path / "src",
        {
            f"{name}/deep/er/{index}.png": data
            for index, (name, data) in enumerate((path.split("/")[0], data) for path, data in sample(40).items())
        },
    )
    chain = Chain(tmp_path, str(tmp_path / "src"))
    chain.run(statistics=True)
    chain.run()
    assert len(chain.artifacts()) == 1
    uri = pathlib.Path(chain.artifacts()[0].uri)
    assert counts(uri)["ingested"] == 40
    statistics = list((tmp_path / "root" / "StatisticsGen").rglob("Split-train/FeatureStats.pb"))
    assert len(statistics) == 1
    text = statistics[0].read_bytes()
    assert b"image/sha256" in text
    extra = next(data for name, data in sample(41).items() if data not in sample(40).values())
    write_all(tmp_path / "src", {"animals/deep/er/extra.png": extra})
    chain.run()
    assert len(chain.artifacts()) == 2
    chain.run(code="2")
    assert len(chain.artifacts()) == 3
    chain.run(code="2", min_side=9)
    assert len(chain.artifacts()) == 4


def test_the_latest_span_and_version_are_read(tmp_path: pathlib.Path) -> None:
    pictures = list(sample(60).items())
    for folder, part in (("span-1/v1", pictures[:20]), ("span-2/v1", pictures[20:40]), ("span-2/v2", pictures[30:60])):
        write_all(tmp_path / "days" / folder, dict(part))
    chain = Chain(tmp_path, f"{tmp_path}/days/span-{{SPAN}}/v{{VERSION}}")
    chain.run()
    (artifact,) = chain.artifacts()
    assert artifact.custom_properties["span"].int_value == 2
    assert artifact.custom_properties["version"].int_value == 2
    found = counts(pathlib.Path(artifact.uri))
    assert found["ingested"] == 30
    assert set(found["labels"]) == {name.split("/")[0] for name, _ in pictures[30:60]}


def test_a_span_that_matches_nothing_is_refused_in_one_line(tmp_path: pathlib.Path) -> None:
    for name in ("nothing like it", "span-x"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="no span found") as caught:
            Chain(tmp_path, f"{tmp_path}/span-{{SPAN}}").run()
        assert "\n" not in str(caught.value)
        assert "(?P" not in str(caught.value)
    with pytest.raises(UserError, match="--images"):
        Chain(tmp_path, f"{tmp_path}/v{{VERSION}}").run()


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> pathlib.Path:
    """60 real pictures, and a recompressed copy of each, so that many pairs are cut apart by the split."""
    pictures = sample(60)
    for name, data in list(pictures.items()):
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(stream, "JPEG", quality=70)
        pictures[name.rpartition(".")[0] + "-copy.jpg"] = stream.getvalue()
    return write_all(tmp_path_factory.mktemp("copied"), pictures)


def alike(uri: pathlib.Path, bits: int) -> set[bytes]:
    """Paths of the eval images that look like a train image, by comparing all pairs."""
    prints = {
        split: [
            (near_duplicates.perceptual_hash(Image.open(io.BytesIO(row["image/encoded"]))), row["image/path"])
            for row in read_split(uri, split)
        ]
        for split in ("train", "eval")
    }
    return {
        path for one, path in prints["eval"] if any(bin(one ^ other).count("1") <= bits for other, _ in prints["train"])
    }


def test_near_duplicates_across_the_split_are_counted_and_listed(copied, tmp_path):
    ingest(copied, tmp_path / "out", shard_mb=0.05)
    wanted, found = alike(tmp_path / "out", 4), counts(tmp_path / "out")
    assert found["near_duplicates"] == len(wanted) > 5
    assert found["near_duplicates_dropped"] == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "near_duplicates.jsonl").read_text().splitlines()]
    assert {row["eval"].encode() for row in listed} == wanted
    assert {row["train"].encode() for row in listed} <= {r["image/path"] for r in read_split(tmp_path / "out", "train")}
    assert all(row["bits"] <= 4 for row in listed)


def test_near_duplicates_are_dropped_from_the_eval_split_alone_and_always_the_same(copied, tmp_path):
    ingest(copied, tmp_path / "kept", shard_mb=0.05)
    ingest(copied, tmp_path / "out", shard_mb=0.05, near_duplicates=NearDuplicates.drop)
    ingest(copied, tmp_path / "again", ("--direct_num_workers=2",), shard_mb=0.05, near_duplicates=NearDuplicates.drop)
    dropped = alike(tmp_path / "kept", 4)
    kept = [row for row in read_split(tmp_path / "kept", "eval") if row["image/path"] not in dropped]
    assert read_split(tmp_path / "out", "eval") == kept
    assert read_split(tmp_path / "out", "train") == read_split(tmp_path / "kept", "train")
    assert content(tmp_path / "out") == content(tmp_path / "again")
    found = counts(tmp_path / "out")
    assert found["eval"] == len(kept)
    assert found["near_duplicates_dropped"] == len(dropped)
    parts = ("ingested", "quarantined", "duplicates", "near_duplicates_dropped")
    assert found["read"] == sum(found[part] for part in parts)
    assert sum(found["labels"][label]["eval"] for label in found["labels"]) == len(kept)
    assert found["manifest"] == manifest_of(tmp_path / "out")
    assert found["bytes"] == sum(len(row["image/encoded"]) for row in read_all(tmp_path / "out"))


def test_near_duplicates_are_not_looked_for_where_that_is_off(copied, tmp_path):
    ingest(copied, tmp_path / "out", near_duplicates=NearDuplicates.ignore)
    assert counts(tmp_path / "out")["near_duplicates"] == 0
    assert (tmp_path / "out" / "near_duplicates.jsonl").read_text() == ""
