"""The training job and Beam's flags, read by the libraries that send them: nothing that these do not know."""

import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, SetupOptions, WorkerOptions
from apache_beam.runners.portability.stager import Stager
from google.cloud.aiplatform_v1.types import AcceleratorType, CustomJob
from google.cloud.aiplatform_v1.types import custom_job as types
from google.protobuf import json_format

from pipeline import beam
from pipeline.cloud import jobs
from pipeline.cloud.machines import REGIONS, Machines, machines
from pipeline.config import load, preset_names
from trainer_module.config import StrategyKind

EXAMPLES = [name for name in preset_names() if name.startswith("vertex_")]


def parsed(name, *overrides):
    job = jobs.custom_job(load(name, overrides).cloud, "moco-train")
    project = job.pop("project")
    message = CustomJob.pb(CustomJob())
    for field in ("display_name", "labels"):
        assert field in job
    # The clients take plain dictionaries; both ways of reading one refuse a field that there is not.
    json_format.ParseDict({**job, "job_spec": with_durations(job["job_spec"])}, message, ignore_unknown_fields=False)
    assert CustomJob(job) == CustomJob.wrap(message)
    return project, CustomJob(job)


def with_durations(spec):
    """JSON's form of a protobuf duration is text; the clients' dictionaries have its fields."""
    timeout = f"{spec['scheduling']['timeout']['seconds']}s"
    return {**spec, "scheduling": {**spec["scheduling"], "timeout": timeout}}


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_is_a_custom_job_with_no_field_that_vertex_does_not_know(name):
    project, job = parsed(name)
    assert project == "my-project"
    (pool,) = job.job_spec.worker_pool_specs
    assert pool.replica_count == 1
    assert pool.container_spec.image_uri.startswith(load(name).cloud.region)
    assert job.job_spec.scheduling.restart_job_on_worker_restart


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vertex_cpu", ("n2-standard-16", "", AcceleratorType.ACCELERATOR_TYPE_UNSPECIFIED, 0)),
        ("vertex_v3_8", ("cloud-tpu", "", AcceleratorType.TPU_V3, 8)),
        ("vertex_v4_8", ("ct4p-hightpu-4t", "2x2x1", AcceleratorType.ACCELERATOR_TYPE_UNSPECIFIED, 0)),
        ("vertex_v5e_8", ("ct5lp-hightpu-8t", "2x4", AcceleratorType.ACCELERATOR_TYPE_UNSPECIFIED, 0)),
        ("vertex_v5e_16", ("ct5lp-hightpu-4t", "4x4", AcceleratorType.ACCELERATOR_TYPE_UNSPECIFIED, 0)),
        ("vertex_v5e_64", ("ct5lp-hightpu-4t", "8x8", AcceleratorType.ACCELERATOR_TYPE_UNSPECIFIED, 0)),
    ],
)
def test_a_tpu_is_named_in_exactly_one_of_the_two_forms(name, expected):
    machine = parsed(name)[1].job_spec.worker_pool_specs[0].machine_spec
    assert (machine.machine_type, machine.tpu_topology, machine.accelerator_type, machine.accelerator_count) == expected
    assert bool(machine.tpu_topology) + bool(machine.accelerator_type) == (name != "vertex_cpu")


def test_hosts_and_cores_follow_from_the_slice():
    assert machines(load("vertex_v5e_8").cloud.trainer) == Machines("v5e", 8, 1)
    assert machines(load("vertex_v5e_16").cloud.trainer) == Machines("v5e", 16, 4)
    assert machines(load("vertex_v5e_64").cloud.trainer) == Machines("v5e", 64, 16)
    assert machines(load("vertex_v4_8").cloud.trainer) == Machines("v4", 4, 1)
    assert machines(load("vertex_v3_8").cloud.trainer) == Machines("v3", 8, 1)
    assert machines(load("vertex_cpu").cloud.trainer) == Machines("", 0, 1)
    two = load("vertex_v5e_8", ["cloud.trainer.machine_type=ct5lp-hightpu-4t"]).cloud.trainer
    assert machines(two) == Machines("v5e", 8, 2)


def test_only_the_hosts_of_a_larger_slice_leave_their_chips_to_a_server():
    def environment(name):
        return [(one.name, one.value) for one in parsed(name)[1].job_spec.worker_pool_specs[0].container_spec.env]

    assert environment("vertex_v5e_16") == [("TPU_LOAD_LIBRARY", "0")]
    assert environment("vertex_v5e_8") == environment("vertex_cpu") == []


def test_the_image_with_libtpu_is_for_the_training_on_tpu_alone():
    def image(name):
        return parsed(name)[1].job_spec.worker_pool_specs[0].container_spec.image_uri

    assert image("vertex_v5e_8").endswith("/moco-tpu:latest")
    assert image("vertex_cpu").endswith("/moco:latest")


def test_spot_restart_and_timeout_are_the_jobs_scheduling():
    scheduling = parsed("vertex_v5e_16", "cloud.trainer.timeout_hours=1.5")[1].job_spec.scheduling
    assert scheduling.strategy is types.Scheduling.Strategy.SPOT
    assert scheduling.timeout.total_seconds() == 5400
    assert not scheduling.disable_retries
    standard = parsed("vertex_v5e_8", "cloud.trainer.restart=false")[1].job_spec.scheduling
    assert standard.strategy is types.Scheduling.Strategy.STRATEGY_UNSPECIFIED
    assert standard.disable_retries
    assert not standard.restart_job_on_worker_restart


def test_account_network_and_labels_reach_the_job():
    network = "projects/1/global/networks/vpc"
    _, job = parsed(
        "vertex_v5e_8", "cloud.service_account=a@b.c", f"cloud.network={network}", "cloud.labels=[team=vision,run=1]"
    )
    assert (job.job_spec.service_account, job.job_spec.network) == ("a@b.c", network)
    assert dict(job.labels) == {"team": "vision", "run": "1"}


def test_every_region_that_has_the_tpu_is_accepted():
    for region in REGIONS["v5e"]:
        load("vertex_v5e_8", [f"cloud.region={region}"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_tpu_is_trained_on_by_its_own_host_and_processors_as_configured(name):
    config = load(name)
    train = jobs.train_there(config.train, config.cloud)
    if name == "vertex_cpu":
        assert train == config.train
    else:
        assert (train.strategy, train.tpu.name) == (StrategyKind.tpu, "local")


def test_beam_knows_every_flag_and_dataflow_gets_image_machines_account_and_network():
    cloud = load(
        "vertex_v5e_8",
        [
            "cloud.service_account=a@b.c",
            "cloud.network=projects/1/global/networks/vpc",
            "cloud.labels=[team=vision,run=1]",
            "cloud.dataflow.public_ips=false",
            "cloud.dataflow.max_workers=7",
        ],
    ).cloud
    options = beam.options(jobs.beam_arguments(cloud, cloud.project))
    google, worker = options.view_as(GoogleCloudOptions), options.view_as(WorkerOptions)
    assert (google.project, google.region) == ("my-project", "us-west4")
    assert google.temp_location == "gs://my-bucket/moco/dataflow/temp"
    assert google.service_account_email == "a@b.c"
    assert google.labels == ["team=vision", "run=1"]
    assert worker.sdk_container_image == cloud.image
    assert (worker.machine_type, worker.max_num_workers, worker.num_workers) == ("n2-standard-4", 7, 1)
    assert (worker.autoscaling_algorithm, worker.network, worker.use_public_ips) == ("THROUGHPUT_BASED", "vpc", False)
    assert options.view_as(SetupOptions).sdk_location == "container"


def test_nothing_is_staged_for_the_workers_whose_user_could_not_write_it(tmp_path):
    cloud = load("vertex_v5e_8").cloud
    options = beam.options(jobs.beam_arguments(cloud, cloud.project))
    assert Stager.create_job_resources(options, str(tmp_path)) == []


def test_without_autoscaling_dataflow_has_all_workers_from_the_start():
    cloud = load("vertex_cpu", ["cloud.dataflow.autoscaling=none", "cloud.dataflow.subnetwork=regions/r/subnetworks/s"])
    worker = beam.options(jobs.beam_arguments(cloud.cloud, "p")).view_as(WorkerOptions)
    assert (worker.autoscaling_algorithm, worker.num_workers, worker.max_num_workers) == ("NONE", 4, 4)
    assert (worker.subnetwork, worker.network) == ("regions/r/subnetworks/s", None)
