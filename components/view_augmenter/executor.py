"""ViewAugmenter's executor: runs the stages, checks that nothing is missing, and publishes the manifest."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tfx import types
from tfx.components.util import examples_utils
from tfx.dsl.components.base import base_beam_executor
from tfx.proto import example_gen_pb2
from tfx.types import artifact_utils

from components import disk
from components.view_augmenter import stages
from components.view_augmenter.files import Shard, compression, find_shards
from components.view_augmenter.sample import SPLITS, SampleFile, SampleJob
from components.view_augmenter.stages import SPLIT, Job, OutputFile
from trainer_module import config_json
from trainer_module.config import AugmentConfig, ImageConfig, SampleConfig
from trainer_module.input import MANIFEST

_SPACE_MARGIN = 1.02  # ids and framing of the records


class Executor(base_beam_executor.BaseBeamExecutor):
    """Writes the views, and views.json last, as the sign of the end."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See the base class.

        Raises:
            UserError: the disk cannot hold the views.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        views = artifact_utils.get_single_instance(output_dict["views"])
        examples = artifact_utils.get_single_instance(input_dict["examples"])
        shards = {split: find_shards(artifact_utils.get_split_uri(input_dict["examples"], split)) for split in SPLITS}
        images = {split: count_images(examples, split, shards[split]) for split in SPLITS}
        job = make_job(exec_properties, views.uri, images[SPLIT])
        sample = make_sample_job(exec_properties, job, images)
        check_space(job, sample.bytes())
        with _scratch_folder(job, sample):
            self._run(job, sample, shards)
            files, sampled = _read_file_list(job), _read_sample_list(job)
        stages.write_json(f"{job.uri}/{MANIFEST}", make_manifest(job, files, sampled))
        _describe_artifact(views, job, [*files, *sampled])

    def _run(self, job: Job, sample: SampleJob, shards: dict[str, list[Shard]]) -> None:
        with disk.fullness_told(job.uri), self._make_beam_pipeline() as pipeline:
            stages.build(pipeline, job, sample, shards)


def make_job(exec_properties: dict[str, Any], uri: str, images: int) -> Job:
    """Rebuilds the job from TFX's execution properties."""
    image = config_json.loads(ImageConfig, exec_properties["image"])
    augment = config_json.loads(AugmentConfig, exec_properties["augment"])
    return Job(uri.rstrip("/"), image, augment, exec_properties["seed"], images)


def make_sample_job(exec_properties: dict[str, Any], job: Job, images: dict[str, int]) -> SampleJob:
    """The sample of the same artifact; `images` of each split."""
    wanted = config_json.loads(SampleConfig, exec_properties["sample"])
    return SampleJob(job.uri, job.scratch, job.image, job.augment, wanted, images)


def count_images(examples: types.Artifact, split: str, shards: list[Shard]) -> int:
    """Images of a split: as ImageExampleGen noted them on the artifact, else counted."""
    if examples.has_custom_property(split):
        return examples.get_int_custom_property(split)
    return sum(1 for shard in shards for _ in tf.data.TFRecordDataset(shard.path, compression(shard.path)))


def needed_bytes(job: Job) -> int:
    """What the output files will take on disk; for stored images, at the least."""
    pixels = job.pairs * 2 * job.augment.size**2 + job.keeps_images * job.image.storage_size**2
    return round(job.images * pixels * 3 * _SPACE_MARGIN)


def check_space(job: Job, further: int = 0) -> None:
    """Refuses to start where the disk cannot hold what will be written.

    Args:
        job: what is to be done.
        further: bytes that are written beside its files.

    Raises:
        UserError: names both figures.
    """
    mend = "lower augment.pairs_per_image, set augment.where=trainer, or use another --workdir"
    what = f"{job.pairs} pairs of views of {job.images} images"
    disk.check_space(job.uri, needed_bytes(job) + further, what, mend)


def make_manifest(job: Job, files: list[OutputFile], sampled: list[SampleFile]) -> dict[str, Any]:
    """The content of views.json."""
    return {
        "size": job.augment.size,
        "storage_size": job.image.storage_size,
        "images": job.images,
        "pairs_per_image": job.pairs,
        "where": job.augment.where.name,
        "seed": job.seed,
        "files": [dataclasses.asdict(file) for file in files],
        "watch": [dataclasses.asdict(file) for file in sampled],
    }


def _read_file_list(job: Job) -> list[OutputFile]:
    """What the pipeline wrote, checked to be everything.

    Raises:
        RuntimeError: records are missing.
    """
    with tf.io.gfile.GFile(stages.file_list(job)) as file:
        files = [OutputFile(**entry) for entry in json.load(file)]
    expected, found = job.images * (job.pairs + job.keeps_images), sum(file.records for file in files)
    if found != expected:
        raise RuntimeError(f"{job.uri} has {found} records instead of {expected}")
    return files


def _read_sample_list(job: Job) -> list[SampleFile]:
    with tf.io.gfile.GFile(stages.sample_list(job)) as file:
        return [SampleFile(**entry) for entry in json.load(file)]


@contextlib.contextmanager
def _scratch_folder(job: Job, sample: SampleJob) -> Iterator[None]:
    for folder in (job.split_folder, sample.folder, job.scratch):
        tf.io.gfile.makedirs(folder)
    try:
        yield
    finally:
        tf.io.gfile.rmtree(job.scratch)


def _describe_artifact(views: types.Artifact, job: Job, files: Sequence[OutputFile | SampleFile]) -> None:
    """Sets what the following components read of the artifact, and the counts."""
    views.split_names = artifact_utils.encode_split_names([SPLIT])
    examples_utils.set_payload_format(views, example_gen_pb2.PayloadFormat.FORMAT_TF_EXAMPLE)
    views.set_int_custom_property("images", job.images)
    views.set_int_custom_property("pairs", job.images * job.pairs)
    views.set_int_custom_property("bytes", sum(file.bytes for file in files))
