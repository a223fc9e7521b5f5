"""The requests and flags that a cloud configuration stands for: plain values, made without asking anyone."""

import posixpath
from typing import Any

from pipeline.beam import BEAM_ARGUMENTS
from pipeline.cloud.config import Autoscaling, BeamPlace, CloudConfig
from pipeline.cloud.machines import machines
from trainer_module.config import StrategyKind, TpuConfig, TrainConfig

_LOAD_LIBRARY = "TPU_LOAD_LIBRARY"  # trainer_module.tpu_slice, which would import TensorFlow's room here
_THIS_TPU = "local"

# Vertex AI fills it in when a container starts (google-cloud-pipeline-components, _placeholders.py).
VERTEX_PROJECT = "{{$.pipeline_google_cloud_project_id}}"


def labels(cloud: CloudConfig) -> dict[str, str]:
    """The labels by their keys."""
    return dict(label.split("=", 1) for label in cloud.labels)


def custom_job(cloud: CloudConfig, name: str) -> dict[str, Any]:
    """The training job as google.cloud.aiplatform_v1.types.CustomJob in JSON's types, with `project` beside it.

    TFX's Trainer takes it as `ai_platform_training_args` and adds the containers' commands. A slice of several hosts is
    one replica of one pool: the topology says how many machines that makes ("Configure compute resources for training",
    TPUs: "replicaCount must be 1"), and each runs the same command, see components.vertex_trainer.host.

    Args:
        cloud: a valid configuration.
        name: shown in the console.
    """
    trainer, has = cloud.trainer, machines(cloud.trainer)
    machine: dict[str, Any] = {"machine_type": trainer.machine_type}
    if trainer.accelerator:
        machine |= {"accelerator_type": trainer.accelerator, "accelerator_count": trainer.count}
    elif trainer.topology:
        machine |= {"tpu_topology": trainer.topology}
    container: dict[str, Any] = {"image_uri": cloud.tpu_image if has.tpu else cloud.image}
    if has.hosts > 1:
        container["env"] = [{"name": _LOAD_LIBRARY, "value": "0"}]
    scheduling: dict[str, Any] = {
        "timeout": {"seconds": round(trainer.timeout_hours * 3600)},
        "restart_job_on_worker_restart": trainer.restart,
        "disable_retries": not trainer.restart,
    }
    if trainer.spot:
        scheduling["strategy"] = "SPOT"
    spec: dict[str, Any] = {
        "worker_pool_specs": [{"machine_spec": machine, "replica_count": 1, "container_spec": container}],
        "scheduling": scheduling,
    }
    if cloud.service_account:
        spec["service_account"] = cloud.service_account
    if cloud.network:
        spec["network"] = cloud.network
    return {"project": cloud.project, "display_name": name, "labels": labels(cloud), "job_spec": spec}


def train_there(train: TrainConfig, cloud: CloudConfig) -> TrainConfig:
    """The training with the TPU of its job, if that has one; a slice of several hosts is named when it is there."""
    if not machines(cloud.trainer).tpu:
        return train
    tpu = TpuConfig(name=_THIS_TPU)
    return TrainConfig(**{**vars(train), "strategy": StrategyKind.tpu, "tpu": tpu})


def beam_arguments(cloud: CloudConfig, project: str) -> tuple[str, ...]:
    """Beam's flags, for every stage; those without Beam take no notice.

    Args:
        cloud: a valid configuration.
        project: that pays; may be a placeholder that the service fills in.
    """
    if cloud.beam is BeamPlace.worker:
        return (*BEAM_ARGUMENTS, f"--project={project}")
    dataflow = cloud.dataflow
    temp = dataflow.temp or posixpath.join(cloud.root, "dataflow")
    fixed = dataflow.autoscaling is Autoscaling.none
    arguments = [
        "--runner=DataflowRunner",
        f"--project={project}",
        f"--region={cloud.region}",
        f"--temp_location={posixpath.join(temp, 'temp')}",
        f"--staging_location={posixpath.join(temp, 'staging')}",
        # It holds the SDK, this project and its requirements, so nothing is installed when a worker starts.
        f"--sdk_container_image={cloud.image}",
        "--sdk_location=container",
        "--experiments=use_runner_v2",
        # Else a list of the packages is staged for each worker, whose folder for it is root's, and the image's user is
        # not root (boot.go, "failed to retrieve staged files").
        "--experiments=disable_logging_submission_environment",
        f"--worker_machine_type={dataflow.machine_type}",
        f"--autoscaling_algorithm={'NONE' if fixed else 'THROUGHPUT_BASED'}",
        f"--num_workers={dataflow.max_workers if fixed else 1}",
        f"--max_num_workers={dataflow.max_workers}",
        f"--disk_size_gb={dataflow.disk_gb}",
    ]
    if cloud.service_account:
        arguments.append(f"--service_account_email={cloud.service_account}")
    if dataflow.subnetwork:
        arguments.append(f"--subnetwork={dataflow.subnetwork}")
    elif cloud.network:
        arguments.append(f"--network={posixpath.basename(cloud.network)}")  # Dataflow knows it by its short name
    if not dataflow.public_ips:
        arguments.append("--no_use_public_ips")
    return (*arguments, *(f"--labels={label}" for label in cloud.labels))
