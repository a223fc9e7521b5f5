"""The compiled pipeline, run from its file alone: every container's command, the training job among them."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from google.cloud.aiplatform_v1.types import CustomJob
from job_service import JobService, served
from local_service import RUN_EXECUTOR, LocalService, execute, preload

from pipeline.cloud.smoke import BOOT, TRAINING
from pipeline.cloud.targets import Target

pytestmark = pytest.mark.long

BUCKET = "gs://bucket"
HOST = "us-central1-aiplatform.googleapis.com"
SETTINGS = (
    "image.storage_size=32",
    "image.eval_resize=16",
    "augment.size=16",
    "augment.pairs_per_image=1",
    "encoder.name=pipeline.tpu.small_encoder.two_convolutions",
    "encoder.width=64",
    "encoder.dim=16",
    "train.global_batch=16",
    "train.queue=64",
    "train.epochs=40",
    "evaluate.min_gain=-1.0",
    "evaluate.knn_k=5",
    "ingest.shard_mb=0.1",
    f"cloud.root={BUCKET}/moco",
    "cloud.project=my-project",
    "cloud.image=image",
    "cloud.beam=worker",
)
IMPORTED_ONCE = (
    "pipeline.cloud.compiling",
    RUN_EXECUTOR,
    "tfx.scripts.run_executor",
    "components.image_example_gen.vertex_driver",
    "components.vertex_trainer.executor",
    "components.evaluator.component",
    "components.model_card.executor",
    "components.serving_check.executor",
    "components.pusher.executor",
    "components.view_augmenter.executor",
    "components.transform.preprocessing",
)


class Run:
    def __init__(self, service: LocalService, jobs: JobService, bucket: Path) -> None:
        self.service, self.jobs, self.bucket = service, jobs, bucket

    def container(self) -> list[str]:
        """What the training job's container starts."""
        (pool,) = self.jobs.created[0].custom_job.job_spec.worker_pool_specs
        return [*pool.container_spec.command, *pool.container_spec.args]

    def artifact(self, task: str, key: str) -> dict:
        (artifact,) = self.service.artifacts[task][key]
        return artifact

    def read(self, task: str, key: str, path: str) -> dict:
        return json.loads(Path(self.artifact(task, key)["uri"], path).read_text())


def compiled_for(target: Target, bucket: Path) -> dict:
    """What the command writes; a mounted bucket is a folder."""
    file = bucket / f"pipeline{target.suffixes[0]}"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["python", "-m", "pipeline", "compile", "--target", target.value, "--config", "demo", *settings]
    execute([*command, "--out", str(file)], {**os.environ}, bucket / "compile")
    text = file.read_text().replace(BUCKET, str(bucket))
    return json.loads(text) if target is Target.vertex else {"pipelineSpec": yaml.safe_load(text)}


@pytest.fixture(scope="module")
def run(tmp_path_factory, sample_images) -> Run:
    """A run with the images of the second of two spans, and two epochs in place of forty."""
    bucket = tmp_path_factory.mktemp("bucket")
    for span, count in ((1, 3), (2, 40)):
        for label in ("food", "flags", "people"):
            folder = bucket / "photos" / f"day-{span}" / label
            folder.mkdir(parents=True)
            for index, data in enumerate(sample_images[label][:count]):
                (folder / f"{index}.png").write_bytes(data)
    preload(IMPORTED_ONCE)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def train(custom_job: CustomJob) -> None:
        (pool,) = custom_job.job_spec.worker_pool_specs
        container = pool.container_spec
        execute([*container.command, *container.args], environment, bucket / "runs" / "CustomJob")

    jobs = JobService(train)
    with served(jobs, HOST, tmp_path_factory.mktemp("keys")) as reaching:
        service = LocalService(
            compiled_for(Target.vertex, bucket),
            {"images": f"{bucket}/photos/day-{{SPAN}}/*", "epochs": 2},
            bucket / "runs",
            {**environment, **reaching},
        )
        service.run()
        yield Run(service, jobs, bucket)


def test_the_driver_finds_the_latest_span_and_its_fingerprint_is_in_the_cache_key(run):
    said = run.artifact("ImageExampleGen", "examples")["metadata"]
    assert (said["custom:span"], said["read"]) == (2, 120)
    assert said["input_fingerprint"]


def test_the_training_job_has_the_runs_epochs_and_checkpoints_of_its_own_that_are_gone_in_the_end(run):
    (request,) = run.jobs.created
    assert request.parent == "projects/my-project/locations/us-central1"
    training = run.read("Trainer", "model_run", "training.json")
    assert (training["epochs"], training["replicas"]) == (2, 2)
    assert training["steps"] < 40
    assert not list((run.bucket / "moco" / "checkpoints").glob("*/*"))


def test_the_smoke_test_of_an_image_finds_all_that_was_started_here(run):
    with pytest.raises(RuntimeError) as missing:  # this is no image: at least Beam's own program is not here
        execute(["python", "-m", "pipeline.cloud.smoke", "cpu"], run.service.environment, run.bucket / "smoke")
    said = str(missing.value)
    spec = run.service.job["pipelineSpec"]["deploymentSpec"]["executors"]
    for container in (one["container"] for one in spec.values() if "container" in one):
        at = container["args"].index("--executor_class_path")
        assert f"ok       {' '.join([*container['command'], *container['args'][at : at + 2]])}\n" in said
    assert f"ok       {' '.join(run.container()[: len(TRAINING)])}\n" in said
    assert run.container()[: len(TRAINING)] == [*TRAINING]
    assert f"missing  {BOOT} can be started" in said
    assert said.count("\nmissing  ") <= 2  # and the user, who may be root here


def test_the_blessing_names_its_model_as_the_services_resolver_wants_it(run):
    said = run.artifact("Evaluator", "blessing")["metadata"]
    assert said["blessed"] == 1
    assert said["current_model_id"] == run.artifact("Trainer", "model")["name"]


def test_the_model_is_published_with_a_card_of_what_was_done(run):
    pushed = run.artifact("Pusher", "pushed_model")["metadata"]
    assert pushed["pushed"] == 1
    published = run.bucket / "moco" / "serving" / "encoder"
    card = json.loads((published / "latest.json").read_text())
    assert pushed["pushed_destination"].startswith(str(published))
    card = json.loads(Path(pushed["pushed_destination"], "assets.extra", "model_card.json").read_text())
    assert card["training"]["epochs"] == card["config"]["train.epochs"] == 2
    assert not [key for key in card["config"] if key.startswith("cloud.")]


def test_a_model_that_the_resolver_finds_again_is_not_compared_with_itself(run):
    for task in ("BaselineResolver-model-blessing-resolver", "BaselineResolver-model-resolver"):
        run.service.run_task(task)
    assert run.artifact("BaselineResolver-model-resolver", "model")["uri"] == run.artifact("Trainer", "model")["uri"]
    run.service.run_task("Evaluator")
    assert run.artifact("Evaluator", "blessing")["metadata"]["blessed"] == 1
    assert "baseline_model_id" not in run.artifact("Evaluator", "blessing")["metadata"]


def test_on_kubeflow_images_and_baseline_are_found_without_driver_and_resolver(run):
    parameters = {**run.service.parameters, "span": "1"}
    kubeflow = LocalService(
        compiled_for(Target.kubeflow, run.bucket), parameters, run.bucket / "kubeflow", run.service.environment
    )
    kubeflow.run_task("ImageExampleGen")
    said = kubeflow.artifacts["ImageExampleGen"]["examples"][0]["metadata"]
    assert (said["custom:span"], said["read"]) == (1, 9)
    assert said["input_fingerprint"] != run.artifact("ImageExampleGen", "examples")["metadata"]["input_fingerprint"]
    kubeflow.artifacts |= run.service.artifacts
    for task in ("BlessedModels", "BaselineResolver"):
        kubeflow.run_task(task)
    (resolved,) = kubeflow.artifacts["BaselineResolver"]["model"]
    assert resolved["metadata"]["none"] == 1
    kubeflow.artifacts["Trainer"] = {"model": [{**run.artifact("Trainer", "model"), "uri": "another"}]}
    kubeflow.run_task("BaselineResolver")
    (resolved,) = kubeflow.artifacts["BaselineResolver"]["model"]
    assert resolved["uri"] == run.artifact("Trainer", "model")["uri"]
