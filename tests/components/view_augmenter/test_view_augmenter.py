"""The ViewAugmenter executor on a real Examples artifact, run by Beam."""

import dataclasses
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import apache_beam as beam
import faulty_storage
import numpy as np
import pytest
import tensorflow as tf
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.types import artifact_utils, channel_utils, standard_artifacts
from tfx.utils import dependency_utils

from components.view_augmenter import executor, sample, stages
from components.view_augmenter.component import ViewAugmenter
from components.view_augmenter.files import find_shards
from pipeline.beam import BEAM_ARGUMENTS
from trainer_module import config_json
from trainer_module.config import AugmentConfig, ImageConfig, SampleConfig, Where
from trainer_module.errors import UserError
from trainer_module.images import centre_view, eval_resize, stored_image
from trainer_module.progress import LOGGER_NAME
from trainer_module.views import view_pair

pytestmark = pytest.mark.long

SAMPLES = Path(__file__).resolve().parents[3] / "configs" / "demo_images"
IMAGE = ImageConfig(storage_size=48)
AUGMENT = AugmentConfig(size=32, pairs_per_image=2)
SEED = 5
IMAGES = 12


def sample_files(split: str = "train") -> list[bytes]:
    """PNG samples, every third of them as JPEG; other ones for each split."""
    with tarfile.open(sorted(SAMPLES.glob("*.tar"))[{"train": 1, "eval": 2}[split]]) as tar:
        files = [tar.extractfile(member) for member in tar.getmembers()[: IMAGES * 30 : 30]]
        return [to_jpeg(file.read()) if n % 3 == 0 else file.read() for n, file in enumerate(files) if file]


def to_jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").resize((200, 150)).save(buffer, "JPEG")
    return buffer.getvalue()


def ingested(data: bytes, label: bytes | None = None) -> bytes:
    features = {"image/encoded": data, "image/sha256": hashlib.sha256(data).hexdigest().encode()}
    if label is not None:
        features["image/label"] = label
    wrapped = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])) for k, v in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=wrapped)).SerializeToString()


def label_of(data: bytes) -> bytes:
    return b"even" if hashlib.sha256(data).digest()[0] % 2 == 0 else b"odd"


def make_examples(
    folder: Path, shards: int, compress: bool = False, labels: bool = False
) -> standard_artifacts.Examples:
    """An Examples artifact whose splits each hold the samples in `shards` files; each fourth has no label."""
    artifact = standard_artifacts.Examples()
    artifact.uri = str(folder)
    artifact.split_names = artifact_utils.encode_split_names(["train", "eval"])
    for split in ("train", "eval"):
        (folder / f"Split-{split}").mkdir(parents=True)
        files = enumerate(sample_files(split))
        records = [ingested(data, label_of(data) if labels and n % 4 else None) for n, data in files]
        per_shard = -(-len(records) // shards)
        for n in range(shards):
            suffix = ".gz" if compress else ""
            path = folder / f"Split-{split}" / f"images-{n:05d}-of-{shards:05d}.tfrecord{suffix}"
            with tf.io.TFRecordWriter(str(path), options="GZIP" if compress else None) as writer:
                for record in records[n * per_shard : (n + 1) * per_shard]:
                    writer.write(record)
    return artifact


def run(
    folder: Path,
    augment: AugmentConfig = AUGMENT,
    shards: int = 1,
    beam_args: tuple[str, ...] = (),
    **examples_options: bool,
) -> standard_artifacts.Examples:
    examples = make_examples(folder / "examples", shards, **examples_options)
    return execute(examples, str(folder / "views"), folder, augment, beam_args)


def execute(
    examples: standard_artifacts.Examples,
    uri: str,
    folder: Path,
    augment: AugmentConfig = AUGMENT,
    beam_args: tuple[str, ...] = (),
) -> standard_artifacts.Examples:
    """The executor's work on a set of examples, its output at `uri`."""
    views = standard_artifacts.Examples()
    views.uri = uri
    context = BaseBeamExecutor.Context(beam_pipeline_args=[*BEAM_ARGUMENTS, *beam_args], tmp_dir=str(folder))
    properties: dict[str, Any] = {
        "image": config_json.dumps(IMAGE),
        "augment": config_json.dumps(augment),
        "seed": SEED,
        "sample": config_json.dumps(SampleConfig()),
        "code": "",
    }
    executor.Executor(context).Do({"examples": [examples]}, {"views": [views]}, properties)
    return views


def read(views: standard_artifacts.Examples, prefix: str) -> list[dict[str, bytes]]:
    """The records of all the files whose names start so, in order."""
    rows = []
    for path in sorted(Path(views.uri, "Split-train").glob(f"{prefix}*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            rows.append({name: feature.bytes_list.value[0] for name, feature in features.items()})
    return rows


def manifest(views: standard_artifacts.Examples) -> dict[str, Any]:
    return json.loads(Path(views.uri, "views.json").read_text())


def sample_rows(views: standard_artifacts.Examples, split: str) -> list[dict[str, bytes]]:
    """What the manifest lists of a split's sample, by id."""
    rows = []
    for entry in manifest(views)["watch"]:
        path = Path(views.uri, entry["name"])
        assert path.stat().st_size == entry["bytes"]
        records = [tf.train.Example.FromString(r) for r in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()]
        assert len(records) == entry["records"] > 0
        if entry["split"] == split:
            rows += [{name: f.bytes_list.value[0] for name, f in r.features.feature.items()} for r in records]
    return sorted(rows, key=lambda row: row["id"])


def tree(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> standard_artifacts.Examples:
    return run(tmp_path_factory.mktemp("one"))


class Kept(logging.Handler):
    """Keeps what is reported of progress."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "progress"):
            self.reports.append(record.progress)


@pytest.fixture(scope="module")
def both_and_reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[standard_artifacts.Examples, list[Any]]:
    """Views beside stored images, of three shards, and what was reported of the progress."""
    logger, kept = logging.getLogger(LOGGER_NAME), Kept()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    try:
        augment = dataclasses.replace(AUGMENT, where=Where.both)
        return run(tmp_path_factory.mktemp("both"), augment, shards=3, labels=True), kept.reports
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)


@pytest.fixture(scope="module")
def both(both_and_reports: tuple[standard_artifacts.Examples, list[Any]]) -> standard_artifacts.Examples:
    return both_and_reports[0]


def test_views_are_the_recipes_of_every_image_in_the_order_of_the_shard(one_shard: standard_artifacts.Examples) -> None:
    for pair in range(AUGMENT.pairs_per_image):
        rows = read(one_shard, f"views-p{pair:04d}-")
        assert len(rows) == IMAGES
        for row, data in zip(rows, sample_files(), strict=True):
            identity = hashlib.sha256(data).hexdigest()
            image = stored_image(tf.constant(data), IMAGE)
            expected = view_pair(image, tf.constant(identity), tf.constant(pair, tf.int64), SEED, AUGMENT).numpy()
            assert row == {"id": identity.encode(), "query": expected[0].tobytes(), "key": expected[1].tobytes()}


def test_bytes_do_not_depend_on_shards_bundles_threads_or_compression(
    one_shard: standard_artifacts.Examples, both: standard_artifacts.Examples, tmp_path: Path
) -> None:
    args = ("--direct_num_workers=2", "--direct_running_mode=multi_threading")
    made = run(tmp_path, shards=5, beam_args=args, compress=True, labels=True)
    for pair in range(AUGMENT.pairs_per_image):
        expected = read(one_shard, f"views-p{pair:04d}-")
        assert read(made, f"views-p{pair:04d}-") == expected
        assert read(both, f"views-p{pair:04d}-") == expected
    for split in ("train", "eval"):
        assert sample_rows(made, split) == sample_rows(both, split)


def test_beam_on_this_machine_packs_no_tfx_for_its_workers() -> None:
    assert dependency_utils.make_beam_dependency_flags([*BEAM_ARGUMENTS]) == [*BEAM_ARGUMENTS]


def test_a_single_pair_is_the_first_of_several(one_shard: standard_artifacts.Examples, tmp_path: Path) -> None:
    single = run(tmp_path, dataclasses.replace(AUGMENT, pairs_per_image=1), shards=2)
    assert read(single, "views-") == read(one_shard, "views-p0000-")


def test_where_both_keeps_the_stored_images_beside_the_same_views(
    one_shard: standard_artifacts.Examples, both: standard_artifacts.Examples
) -> None:
    assert read(both, "views-p0001-") == read(one_shard, "views-p0001-")
    for row, data in zip(read(both, "images-"), sample_files(), strict=True):
        assert row["id"] == hashlib.sha256(data).hexdigest().encode()
        np.testing.assert_array_equal(tf.io.decode_png(row["image"]), stored_image(tf.constant(data), IMAGE))


def test_where_trainer_writes_stored_images_only(both: standard_artifacts.Examples, tmp_path: Path) -> None:
    stored = run(tmp_path, dataclasses.replace(AUGMENT, where=Where.trainer), shards=3)
    assert read(stored, "images-") == read(both, "images-")
    probes = "watch/probe-00000-of-00001.tfrecord"
    images = {f"Split-train/images-0000{n}-of-00003.tfrecord" for n in range(3)}
    assert tree(stored.uri) == {"views.json", probes} | images


def test_the_trainer_would_make_the_same_views_from_the_stored_images(both: standard_artifacts.Examples) -> None:
    for stored, row in zip(read(both, "images-"), read(both, "views-p0001-"), strict=True):
        image = tf.io.decode_png(stored["image"])
        made = view_pair(image, tf.constant(stored["id"]), tf.constant(1, tf.int64), SEED, AUGMENT).numpy()
        assert (made[0].tobytes(), made[1].tobytes()) == (row["query"], row["key"])


def rows_of(path: Path) -> list[dict[str, bytes]]:
    records = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    examples = (tf.train.Example.FromString(record).features.feature for record in records)
    return [{name: feature.bytes_list.value[0] for name, feature in features.items()} for features in examples]


def probe_rows(views: standard_artifacts.Examples) -> list[dict[str, bytes]]:
    (name,) = (file["name"] for file in manifest(views)["watch"] if file["split"] == "probe")
    return rows_of(Path(views.uri, name))


def test_the_manifest_lists_exactly_the_files_there_are(both: standard_artifacts.Examples) -> None:
    content = manifest(both)
    files = {f"Split-train/{file['name']}": file for file in content["files"]}
    assert tree(both.uri) == {"views.json", *files, *(file["name"] for file in content["watch"])}
    for path, file in files.items():
        assert Path(both.uri, path).stat().st_size == file["bytes"]
        assert sum(1 for _ in tf.data.TFRecordDataset(str(Path(both.uri, path)))) == file["records"]
    expected = {"size": 32, "storage_size": 48, "images": IMAGES, "pairs_per_image": 2, "where": "both", "seed": SEED}
    assert {name: content[name] for name in expected} == expected


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_sample_holds_the_centre_views_and_labels_of_both_splits(
    both: standard_artifacts.Examples, split: str
) -> None:
    expected = []
    for n, data in enumerate(sample_files(split)):
        image = stored_image(tf.constant(data), IMAGE)
        view = np.floor(centre_view(image, eval_resize(IMAGE, AUGMENT), AUGMENT.size).numpy() + 0.5).astype(np.uint8)
        if n % 4:
            identity = hashlib.sha256(data).hexdigest().encode()
            expected.append({"id": identity, "image": view.tobytes(), "label": label_of(data)})
    assert sample_rows(both, split) == sorted(expected, key=lambda row: row["id"])


def test_the_sample_is_of_the_lowest_hashes(both: standard_artifacts.Examples, tmp_path: Path) -> None:
    examples = make_examples(tmp_path / "examples", 2, labels=True)
    for folder in ("watch", ".scratch"):
        (tmp_path / "views" / folder).mkdir(parents=True)
    wanted = SampleConfig(bank=1, queries=1)
    counts = {"train": IMAGES, "eval": IMAGES}
    job = sample.SampleJob(str(tmp_path / "views"), str(tmp_path / "views/.scratch"), IMAGE, AUGMENT, wanted, counts)
    function = sample.TakeSampleFn(job)
    function.setup()
    shards = find_shards(f"{examples.uri}/Split-train")
    files = [[file for shard in shards for file in function.process(("train", shard))] for _ in range(2)]
    assert files[0] == files[1]  # a bundle that is retried leaves the same files
    paths = [f"{job.uri}/{file.name}" for file in files[0]]
    found = sorted(tf.data.TFRecordDataset(paths).as_numpy_iterator())
    ids = sorted(tf.train.Example.FromString(record).features.feature["id"].bytes_list.value[0] for record in found)
    assert 1 <= len(ids) < IMAGES * 3 // 4
    assert ids == [row["id"] for row in sample_rows(both, "train")][: len(ids)]
    assert not list(Path(job.scratch).iterdir())


def test_an_unlabelled_set_has_no_sample(one_shard: standard_artifacts.Examples) -> None:
    assert [file["split"] for file in manifest(one_shard)["watch"]] == ["probe"]
    assert len(list(Path(one_shard.uri, "watch").iterdir())) == 1


def test_the_probes_are_encoded_images_of_the_eval_split_labelled_or_not(
    one_shard: standard_artifacts.Examples, both: standard_artifacts.Examples
) -> None:
    images = {hashlib.sha256(data).hexdigest().encode(): data for data in sample_files("eval")}
    expected = [{"id": identity, "encoded": images[identity]} for identity in sorted(images)]
    assert probe_rows(one_shard) == probe_rows(both) == expected


def test_only_the_lowest_hashes_are_probes_of_the_train_split_where_there_is_no_eval_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "PROBES", 3)
    counts = {"train": IMAGES, "eval": 0}
    job = sample.SampleJob(str(tmp_path), str(tmp_path / ".scratch"), IMAGE, AUGMENT, SampleConfig(), counts)
    for folder in ("watch", ".scratch"):
        (tmp_path / folder).mkdir()
    examples = make_examples(tmp_path / "examples", 2)
    shards = [("train", shard) for shard in find_shards(f"{examples.uri}/Split-train")]
    with TestPipeline(argv=[*BEAM_ARGUMENTS]) as pipeline:
        files = pipeline | beam.Create(shards) | sample.TakeSample(job)
        assert_that(files | beam.Map(lambda file: (file.split, file.records)), equal_to([("probe", 3)]))
    ids = sorted(hashlib.sha256(data).hexdigest().encode() for data in sample_files("train"))
    assert [row["id"] for row in rows_of(tmp_path / "watch" / "probe-00000-of-00001.tfrecord")] == ids[:3]


def test_the_eval_split_is_in_no_view(both: standard_artifacts.Examples) -> None:
    trained = {row["id"] for row in read(both, "views-")}
    assert trained == {hashlib.sha256(data).hexdigest().encode() for data in sample_files()}
    assert not trained & {row["id"] for row in sample_rows(both, "eval")}


def test_the_artifact_says_its_split_and_counts(one_shard: standard_artifacts.Examples) -> None:
    assert artifact_utils.decode_split_names(one_shard.split_names) == ["train"]
    assert one_shard.get_int_custom_property("images") == IMAGES
    assert one_shard.get_int_custom_property("pairs") == IMAGES * 2


def test_a_retried_bundle_leaves_the_same_files(tmp_path: Path) -> None:
    examples = make_examples(tmp_path / "examples", 1)
    job = stages.Job(str(tmp_path / "views"), IMAGE, AUGMENT, SEED, IMAGES)
    (tmp_path / "views" / "Split-train").mkdir(parents=True)
    shard = find_shards(f"{examples.uri}/Split-train")[0]
    contents = []
    for _ in range(2):
        function = stages.MakeViewsFn(job)
        function.setup()
        assert [file.records for file in function.process(shard)] == [IMAGES] * 2
        contents.append({p.name: p.read_bytes() for p in Path(job.split_folder).iterdir()})
    assert contents[0] == contents[1]
    assert not list(Path(job.scratch).iterdir())


def test_on_cloud_storage_the_same_bytes_are_written_as_on_disk(tmp_path: Path) -> None:
    """In a process of its own, by TensorFlow's and Beam's own clients of gs://."""
    local = Path(run(tmp_path / "disk", shards=2).uri)
    with (
        faulty_storage.storage("runs") as bucket,
        faulty_storage.public(bucket, tmp_path) as (_, environment),
        faulty_storage.proxy(bucket, _gives_tokens) as plain,
    ):
        account = tmp_path / "account.json"
        key = (tmp_path / "key.pem").read_text()
        service = {"type": "service_account", "client_email": "moco@p.iam.gserviceaccount.com", "private_key": key}
        account.write_text(json.dumps({**service, "token_uri": f"{faulty_storage.url(plain)}/token"}))
        environment["STORAGE_EMULATOR_HOST"] = faulty_storage.url(plain)
        environment["GOOGLE_APPLICATION_CREDENTIALS"] = str(account)
        for file in (tmp_path / "disk" / "examples").rglob("*.tfrecord"):
            bucket.put(f"examples/{file.relative_to(tmp_path / 'disk' / 'examples')}", file.read_bytes())
        process = multiprocessing.get_context("spawn").Process(target=_run_on_cloud, args=(environment, tmp_path))
        process.start()
        process.join()
        written = bucket.objects()
    assert process.exitcode == 0
    there = {name.removeprefix("views/"): data for name, data in written.items() if re.match("views/.*[^/]$", name)}
    assert there == {str(file.relative_to(local)): file.read_bytes() for file in local.rglob("*") if file.is_file()}


def _gives_tokens(_: int, request: faulty_storage.Request) -> faulty_storage.Answer | None:
    token = json.dumps({"access_token": "token", "expires_in": 3600, "token_type": "Bearer"})
    found = request.path == "/token"
    return faulty_storage.Answer(200, {"Content-Type": "application/json"}, token.encode()) if found else None


def _run_on_cloud(environment: dict[str, str], folder: Path) -> None:
    os.environ.update(environment)
    examples = standard_artifacts.Examples()
    examples.split_names = artifact_utils.encode_split_names(["train", "eval"])
    examples.uri = "gs://runs/examples"
    execute(examples, "gs://runs/views", folder)


def test_an_unreadable_record_is_an_error_of_ours_and_nothing_counts_as_done(tmp_path: Path) -> None:
    examples = make_examples(tmp_path / "examples", 1)
    path = next(Path(examples.uri, "Split-train").iterdir())
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(ingested(b"\xff\xd8\xff broken"))
    views = standard_artifacts.Examples()
    views.uri = str(tmp_path / "views")
    parts = {"image": IMAGE, "augment": AUGMENT, "sample": SampleConfig()}
    properties = {name: config_json.dumps(part) for name, part in parts.items()} | {"seed": 0, "code": ""}
    context = BaseBeamExecutor.Context(beam_pipeline_args=[*BEAM_ARGUMENTS], tmp_dir=str(tmp_path))
    with pytest.raises(Exception, match="cannot be read, though ingestion proved it") as caught:
        executor.Executor(context).Do({"examples": [examples]}, {"views": [views]}, properties)
    assert not isinstance(caught.value, UserError)
    assert tree(views.uri) == set()


def test_too_little_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**5))
    with pytest.raises(UserError, match=r"2 pairs of views of 12 images need .* augment.pairs_per_image"):
        run(tmp_path)
    assert not (tmp_path / "views").exists()


def test_the_needed_space_is_what_is_written(both: standard_artifacts.Examples) -> None:
    job = stages.Job(both.uri, IMAGE, dataclasses.replace(AUGMENT, where=Where.both), SEED, IMAGES)
    written = sum(file["bytes"] for file in manifest(both)["files"])
    assert 0.9 * written < executor.needed_bytes(job) < 1.1 * written


def test_progress_counts_up_to_all_pairs(
    both_and_reports: tuple[standard_artifacts.Examples, list[Any]],
) -> None:
    _, reports = both_and_reports
    done = [report.done for report in reports]
    assert done == sorted(done)
    assert done[-1] == reports[-1].total == IMAGES * AUGMENT.pairs_per_image
    assert {(report.task, report.unit) for report in reports} == {("make views", "pairs")}


def test_the_component_passes_its_configuration_as_plain_json() -> None:
    examples = channel_utils.as_channel([standard_artifacts.Examples()])
    wanted = SampleConfig(bank=7)
    node = ViewAugmenter(examples=examples, image=IMAGE, augment=AUGMENT, seed=SEED, sample=wanted, code="abc")
    assert config_json.loads(SampleConfig, node.exec_properties["sample"]) == wanted
    assert config_json.loads(AugmentConfig, node.exec_properties["augment"]) == AUGMENT
    assert config_json.loads(ImageConfig, node.exec_properties["image"]) == IMAGE
    assert (node.exec_properties["seed"], node.exec_properties["code"]) == (SEED, "abc")
    assert node.outputs["views"].type is standard_artifacts.Examples
