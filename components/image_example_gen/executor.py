"""ImageExampleGen's executor: runs the stages, judges what came of them, and publishes the files beside the splits."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
from tfx import types
from tfx.components.example_gen import utils
from tfx.components.example_gen.driver import update_output_artifact
from tfx.components.util import examples_utils
from tfx.dsl.components.base import base_beam_executor
from tfx.proto import example_gen_pb2
from tfx.types import artifact_utils, standard_component_specs
from tfx.utils import proto_utils

from components import disk
from components.image_example_gen import driver, sources, stages
from components.image_example_gen.config import from_json
from components.image_example_gen.parameters import unpack_parameters
from components.image_example_gen.stages import NEAR_DUPLICATES_FILE, QUARANTINE_FILE, Counts, Job
from trainer_module.errors import UserError

INGEST_FILE = "ingest.json"


class Executor(base_beam_executor.BaseBeamExecutor):
    """Writes the Examples artifact: shards, then `quarantine.jsonl`, and `ingest.json` last, as the sign of the end."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See the base class.

        Raises:
            UserError: nothing to read, too much of it bad, an empty split, or no space.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        examples = artifact_utils.get_single_instance(output_dict[standard_component_specs.EXAMPLES_KEY])
        if utils.FINGERPRINT_PROPERTY_NAME not in exec_properties:  # no driver came before, as on Kubeflow
            exec_properties = driver.resolve(exec_properties)
            update_output_artifact(exec_properties, examples.mlmd_artifact)
        job = make_job(exec_properties, examples.uri)
        found = sources.survey(job.src)
        # As much as the source, and compressed archives once more while they are unpacked. What grows in canonical form
        # is known when the headers have been read, and told by the stages.
        stages.check_space(job, found.size + found.packed, f"the images of {job.src}")
        try:
            summary = self._ingest(job)
        except BaseException:
            for folder in [job.split_folder(name) for name, _ in job.splits]:
                _remove(folder)
            raise
        finally:
            _remove(job.scratch)
        _describe_artifact(examples, job, summary)

    def _ingest(self, job: Job) -> dict[str, Any]:
        """Runs the pipeline, judges what came of it and publishes the two files beside the splits."""
        for folder in [f"{job.scratch}/unpacked", *(job.split_folder(name) for name, _ in job.splits)]:
            tf.io.gfile.makedirs(folder)
        with disk.fullness_told(job.uri), self._make_beam_pipeline() as pipeline:
            stages.build(pipeline, job)
        summary = _summary(job, stages.read_counts(f"{job.scratch}/counts.json"))
        judge(job, summary, f"{job.scratch}/{QUARANTINE_FILE}")
        for name in (QUARANTINE_FILE, NEAR_DUPLICATES_FILE):
            tf.io.gfile.rename(f"{job.scratch}/{name}", f"{job.uri}/{name}", overwrite=True)
        stages.write_text(f"{job.scratch}/{INGEST_FILE}", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        tf.io.gfile.rename(f"{job.scratch}/{INGEST_FILE}", f"{job.uri}/{INGEST_FILE}", overwrite=True)
        return summary


def make_job(exec_properties: Mapping[str, Any], uri: str) -> Job:
    """Rebuilds the job from TFX's execution properties."""
    inputs, outputs, custom = example_gen_pb2.Input(), example_gen_pb2.Output(), example_gen_pb2.CustomConfig()
    proto_utils.json_to_proto(exec_properties[standard_component_specs.INPUT_CONFIG_KEY], inputs)
    proto_utils.json_to_proto(exec_properties[standard_component_specs.OUTPUT_CONFIG_KEY], outputs)
    proto_utils.json_to_proto(exec_properties[standard_component_specs.CUSTOM_CONFIG_KEY], custom)
    utils.generate_output_split_names(inputs, outputs)  # refuses what TFX refuses
    end, splits = 0, []
    for split in outputs.split_config.splits:
        end += split.hash_buckets
        splits.append((split.name, end))
    base = exec_properties[standard_component_specs.INPUT_BASE_KEY]
    src = sources.join_pattern(base, inputs.splits[0].pattern)
    return Job(src, uri.rstrip("/"), from_json(unpack_parameters(custom)["ingest"]), tuple(splits))


def judge(job: Job, summary: Mapping[str, Any], quarantine: str) -> None:
    """Stops the run where its images cannot be used. The quarantine file is then kept beside the artifact.

    Raises:
        UserError: nothing read, too much quarantined, or an empty split.
    """
    read, bad, ingested = summary["read"], summary["quarantined"], summary["ingested"]
    if not read:
        raise sources.no_images(job.src)
    if bad > job.config.max_bad_fraction * read or not ingested:
        # TFX removes the artifact's folder when the executor fails.
        kept = f"{job.uri}.{QUARANTINE_FILE}"
        tf.io.gfile.copy(quarantine, kept, overwrite=True)
        limit = f"{bad / read:.1%}, past ingest.max_bad_fraction={job.config.max_bad_fraction}" if ingested else "all"
        first = "; ".join(_first_rows(quarantine, 3))
        raise UserError(f"{bad} of {read} images cannot be used ({limit}): see {kept} ({first})")
    for name, _ in job.splits:
        if not summary[name]:
            images = "image is" if ingested == 1 else "images are"
            dropped = summary["near_duplicates_dropped"]
            why = f", and {dropped} near duplicates were dropped" if dropped else ""
            text = f"{ingested} usable {images} too few: by hash none falls into the {name} split{why}"
            raise UserError(f"{text}; add images or change ingest.eval_fraction={job.config.eval_fraction}")


def _first_rows(path: str, count: int) -> Iterator[str]:
    """The first quarantined images, as a person reads them."""
    with tf.io.gfile.GFile(path, "r") as file:
        for line, _ in zip(file, range(count), strict=False):
            row = json.loads(line)
            yield f"{row['path']}: {row['reason']}"


def _summary(job: Job, counts: Counts) -> dict[str, Any]:
    """The content of ingest.json: read = ingested + quarantined + duplicates + near_duplicates_dropped.

    `manifest` names what was ingested by content, split and label, see `stages.identity`.
    """
    names = [name for name, _ in job.splits]
    labels: dict[str, dict[str, int]] = {}
    for key, value in sorted(counts.items()):
        if key[0] == "label":
            labels.setdefault(key[1], dict.fromkeys(names, 0))[key[2]] = value
    by_split = {name: counts.get(("split", name), 0) for name in names}
    return {
        "read": counts.get(("read",), 0),
        "ingested": sum(by_split.values()),
        "quarantined": counts.get(("bad",), 0),
        "duplicates": counts.get(("duplicates",), 0),
        "near_duplicates": counts.get(("near_duplicates",), 0),
        "near_duplicates_dropped": counts.get(("near_duplicates_dropped",), 0),
        "label_conflicts": counts.get(("label_conflicts",), 0),
        "skipped": counts.get(("skipped",), 0),
        **by_split,
        "unlabelled": counts.get(("unlabelled",), 0),
        "bytes": counts.get(("bytes",), 0),
        "manifest": stages.manifest(counts),
        "labels": labels,
    }


def _describe_artifact(examples: types.Artifact, job: Job, summary: Mapping[str, Any]) -> None:
    """Sets what the following components read of the artifact, the counts, and the manifest."""
    examples.split_names = artifact_utils.encode_split_names([name for name, _ in job.splits])
    examples_utils.set_payload_format(examples, example_gen_pb2.PayloadFormat.Value("FORMAT_TF_EXAMPLE"))
    examples.set_string_custom_property("manifest", summary["manifest"])
    for name, value in summary.items():
        if isinstance(value, int):
            examples.set_int_custom_property(name, value)


def _remove(folder: str) -> None:
    """Removes a folder if it is there."""
    if tf.io.gfile.exists(folder):
        tf.io.gfile.rmtree(folder)
