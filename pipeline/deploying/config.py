"""What can be set about a deployment, as frozen dataclasses, and what is refused."""

import dataclasses
import re

from pipeline.cloud.labels import labelled
from pipeline.serving.config import check_range
from trainer_module.errors import UserError


@dataclasses.dataclass(frozen=True)
class FilesConfig:
    """TensorFlow Serving by docker, or under KServe.

    Attributes:
        name: the model's name in requests.
        image: TensorFlow Serving's; empty for the release that goes with this project's TensorFlow.
        max_batch: rows in one call of the model.
        max_wait_ms: how long a row waits for company while a thread is free, ms.
        max_queue: rows that wait; more are refused.
        threads: calls of the model at a time.
        rest_port, grpc_port: on this machine, by docker.
        min_replicas, max_replicas: of servers, under KServe.
        cpus: of one server, under KServe.
        memory_gb: of one server, GB, under KServe.
    """

    name: str = "encoder"
    image: str = ""
    max_batch: int = 64
    max_wait_ms: float = 2.0
    max_queue: int = 1024
    threads: int = 2
    rest_port: int = 8501
    grpc_port: int = 8500
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 4.0
    memory_gb: float = 4.0


@dataclasses.dataclass(frozen=True)
class VertexConfig:
    """A model and an endpoint of Vertex AI.

    Attributes:
        name: id and display name of the model.
        endpoint: id of the endpoint; made where there is none. Empty: the model's name.
        image: a tensorflow/serving of your own in Artifact Registry; empty for Vertex AI's prebuilt one.
        machine_type: of each server.
        accelerator: such as NVIDIA_TESLA_T4; empty for none.
        accelerators: of each server.
        min_replicas, max_replicas: servers.
        traffic: percent of the endpoint's requests that the model gets; the others share the rest as before.
        replace: whether models without traffic are taken off the endpoint afterwards.
        service_account: e-mail of the account that the servers act as; empty for the default one.
        labels: key=value each, on the model and the endpoint.
    """

    name: str = "encoder"
    endpoint: str = ""
    image: str = ""
    machine_type: str = "n1-standard-4"
    accelerator: str = ""
    accelerators: int = 1
    min_replicas: int = 1
    max_replicas: int = 1
    traffic: int = 100
    replace: bool = False
    service_account: str = ""
    labels: tuple[str, ...] = ()

    @property
    def endpoint_id(self) -> str:
        """Of the endpoint that is asked for."""
        return self.endpoint or self.name.replace("_", "-")


_RANGES: dict[str, tuple[float, float]] = {
    "max_batch": (1, 4096),
    "max_wait_ms": (0, 10_000),
    "max_queue": (1, 1_000_000),
    "threads": (1, 1024),
    "rest_port": (1, 65_535),
    "grpc_port": (1, 65_535),
    "min_replicas": (0, 1000),
    "max_replicas": (1, 1000),
    "cpus": (0.1, 1000),
    "memory_gb": (0.5, 10_000),
    "accelerators": (1, 16),
    "traffic": (0, 100),
}


def validate(config: FilesConfig | VertexConfig) -> None:
    """Refuses values that cannot work.

    Raises:
        UserError: names the option, its value and one that works.
    """
    for field in dataclasses.fields(config):
        if field.name in _RANGES:
            check_range(field.name, getattr(config, field.name), *_RANGES[field.name])
    if config.min_replicas > config.max_replicas:
        raise UserError(
            f"--min-replicas {config.min_replicas} is above --max-replicas {config.max_replicas}; e.g. --max-replicas "
            f"{config.min_replicas}"
        )
    if isinstance(config, VertexConfig):
        _check_vertex(config)
    elif not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", config.name):
        raise UserError(f"--name {config.name!r} may have small letters, digits and '-' within; e.g. --name encoder")
    elif config.rest_port == config.grpc_port:
        raise UserError(f"--rest-port and --grpc-port are both {config.rest_port}; e.g. --grpc-port 8500")


def _check_vertex(config: VertexConfig) -> None:
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,62}", config.name):
        raise UserError(
            f"--name {config.name!r} may have small letters, digits, '_' and '-' behind the first; e.g. --name encoder"
        )
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?|[1-9]\d{0,20}", config.endpoint_id):
        raise UserError(
            f"--endpoint {config.endpoint_id!r} may have small letters, digits and '-' behind the first; e.g. "
            "--endpoint encoder"
        )
    if config.min_replicas < 1:
        raise UserError("--min-replicas 0 is not possible on an endpoint of Vertex AI; e.g. --min-replicas 1")
    labelled(config.labels)
