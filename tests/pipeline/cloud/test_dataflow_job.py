"""The job that Dataflow's own client sends for our stages: captured on loopback, with what it stages in a bucket."""

import dataclasses

import apache_beam as beam
import dataflow_server
import faulty_storage
import pytest
from apache_beam.internal.gcp import auth
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2

from components.image_example_gen import stages as ingest
from components.image_example_gen.config import IngestConfig
from components.view_augmenter import stages as views
from components.view_augmenter.files import Shard
from components.view_augmenter.sample import SampleJob
from pipeline.cloud import jobs
from pipeline.config import load
from trainer_module.config import AugmentConfig, ImageConfig, SampleConfig

BUCKET = "my-bucket"
SETTINGS = (
    "cloud.region=europe-west4",
    "cloud.service_account=a@b.c",
    "cloud.network=projects/1/global/networks/vpc",
    "cloud.labels=[team=vision]",
    "cloud.dataflow.machine_type=n2-highmem-8",
    "cloud.dataflow.max_workers=7",
    "cloud.dataflow.disk_gb=80",
    "cloud.dataflow.public_ips=false",
)


@dataclasses.dataclass(frozen=True)
class Captured:
    """What reached the service: whose job, the request's Job, and the pipeline that it names in the bucket."""

    project: str
    region: str
    job: dict
    pipeline: beam_runner_api_pb2.Pipeline
    staged: list[str]

    @property
    def pool(self) -> dict:
        (pool,) = self.job["environment"]["workerPools"]
        return pool

    @property
    def options(self) -> dict:
        return self.job["environment"]["sdkPipelineOptions"]["options"]

    def steps(self) -> set[str]:
        """Names of the ParDos and the like that workers run or the service does itself."""
        return {one.unique_name for one in self.pipeline.components.transforms.values() if not one.subtransforms}


def add_ingestion(pipeline):
    job = ingest.Job(
        f"gs://{BUCKET}/photos/*.tar", f"gs://{BUCKET}/examples", IngestConfig(), (("train", 4), ("eval", 5))
    )
    ingest.build(pipeline, job)


def add_views(pipeline):
    job = views.Job(f"gs://{BUCKET}/views", ImageConfig(), AugmentConfig(), 0, 100)
    sample = SampleJob(job.uri, job.scratch, job.image, job.augment, SampleConfig(), {"train": 80, "eval": 20})
    shards = [Shard(f"gs://{BUCKET}/examples/Split-train/images-00000-of-00001.tfrecord", 0, 1)]
    views.build(pipeline, job, sample, {"train": shards, "eval": shards})


@pytest.fixture(scope="module", params=[add_ingestion, add_views], ids=["ImageExampleGen", "ViewAugmenter"])
def captured(request) -> Captured:
    cloud = load("vertex_v5e_8", [f"cloud.root=gs://{BUCKET}/moco", *SETTINGS]).cloud
    with (
        faulty_storage.storage(BUCKET) as bucket,
        faulty_storage.proxy(bucket) as proxy,
        dataflow_server.running() as service,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        patch.setattr(auth._Credentials, "_credentials_init", True)  # none are looked for on the network
        offline = [f"--dataflow_endpoint={service.url}", "--no_auth"]
        pipeline = beam.Pipeline(argv=[*jobs.beam_arguments(cloud, cloud.project), *offline])
        request.param(pipeline)
        pipeline.run()
        objects = bucket.objects()
    ((project, region, job),) = service.jobs
    where = job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
    staged = beam_runner_api_pb2.Pipeline.FromString(objects[where.removeprefix(f"gs://{BUCKET}/")])
    return Captured(project, region, job, staged, sorted(objects))


def test_workers_are_those_of_the_configuration(captured):
    assert (captured.project, captured.region) == ("my-project", "europe-west4")
    pool = captured.pool
    assert (pool["machineType"], pool["diskSizeGb"], pool["numWorkers"]) == ("n2-highmem-8", 80, 1)
    assert pool["autoscalingSettings"] == {"algorithm": "AUTOSCALING_ALGORITHM_BASIC", "maxNumWorkers": 7}
    assert (pool["network"], pool["ipConfiguration"]) == ("vpc", "WORKER_IP_PRIVATE")
    assert captured.job["environment"]["serviceAccountEmail"] == "a@b.c"
    assert captured.job["labels"]["team"] == "vision"
    assert "use_runner_v2" in captured.job["environment"]["experiments"]


def test_every_step_of_ours_runs_in_the_projects_own_image(captured):
    image = load("vertex_v5e_8").cloud.image
    (container,) = captured.pool["sdkHarnessContainerImages"]
    assert container["containerImage"] == captured.pool["workerHarnessContainerImage"] == image
    (environment,) = captured.pipeline.components.environments.values()
    assert environment.urn == common_urns.environments.DOCKER.urn
    assert beam_runner_api_pb2.DockerPayload.FromString(environment.payload).container_image == image
    ours = [
        t for t in captured.pipeline.components.transforms.values() if t.spec.urn == common_urns.primitives.PAR_DO.urn
    ]
    assert {transform.environment_id for transform in ours} == {*captured.pipeline.components.environments}


def test_the_staged_pipeline_holds_every_step(captured, request):
    steps = captured.steps()
    wanted = {
        "ImageExampleGen": {"List", "Find", "GroupShards", "FindAlike", "Write", "WriteCounts", "WriteQuarantine"},
        "ViewAugmenter": {"MakeViews/Write", "TakeSample/Write", "WriteFileList", "WriteSampleList"},
    }[request.node.callspec.id]
    for name in wanted:
        assert any(f"{step}/".startswith(f"{name}/") for step in steps), (name, steps)


def test_nothing_is_staged_that_workers_would_install(captured):
    """The image holds all: a package or a requirements file would be installed anew on each worker's start."""
    names = {path.rpartition("/")[2] for path in captured.staged}
    assert names <= {"pipeline.pb", "submission_environment_dependencies.txt"}
    assert all(path.startswith("moco/dataflow/staging/") for path in captured.staged)
    assert captured.options["temp_location"].startswith(f"gs://{BUCKET}/moco/dataflow/temp/")
