"""What can be set about serving, as a frozen dataclass."""

import dataclasses
import math
import re

from components.image_example_gen.config import PILLOW_MAX_PIXELS, IngestConfig
from trainer_module.errors import UserError

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Limits, ports and times.

    Attributes:
        model: a SavedModel, or a folder of published versions; may be gs://.
        name: the model's name in requests.
        host: address to listen at.
        rest_port, grpc_port: 0 lets the kernel choose.
        max_batch: rows in one call of the model.
        max_wait_ms: how long a row waits for company while a worker is free.
        max_queue: rows that are admitted and not yet answered; more are refused.
        workers: calls of the model at a time; with two, one prepares its images while the other computes.
        max_request_mb: MiB of one request.
        max_buffered_mb: MiB of all requests that are being read or answered.
        max_image_mb: MiB of one encoded image.
        max_pixels: pixels of one image.
        max_connections: open at a time, of REST and of gRPC each.
        timeout: seconds until a request without a deadline of its own is given up, in which its body must come, and in
            which its client must take the answer, by REST.
        idle: seconds in which the head of the next HTTP request must come, or the next call of a gRPC connection.
        grace: seconds that requests in flight get when the server is stopped.
        poll: seconds between looks for a new version.
    """

    model: str
    name: str = "encoder"
    host: str = "127.0.0.1"
    rest_port: int = 8501
    grpc_port: int = 8500
    max_batch: int = 64
    max_wait_ms: float = 2.0
    max_queue: int = 1024
    workers: int = 2
    max_request_mb: float = 32.0
    max_buffered_mb: float = 256.0
    max_image_mb: float = 16.0
    max_pixels: int = 50_000_000
    max_connections: int = 1024
    timeout: float = 30.0
    idle: float = 120.0
    grace: float = 30.0
    poll: float = 2.0

    @property
    def max_request_bytes(self) -> int:
        """Of one request."""
        return int(self.max_request_mb * MIB)

    @property
    def min_side(self) -> int:
        """Of an image, in pixels: what ingestion takes."""
        return IngestConfig.min_side


_RANGES: dict[str, tuple[float, float]] = {
    "rest_port": (0, 65_535),
    "grpc_port": (0, 65_535),
    "max_batch": (1, 4096),
    "max_wait_ms": (0, 10_000),
    "max_queue": (1, 1_000_000),
    "workers": (1, 64),
    "max_request_mb": (0.001, 1024),
    "max_buffered_mb": (0.001, 1024 * 1024),
    "max_image_mb": (0.001, 1024),
    "max_pixels": (64, PILLOW_MAX_PIXELS),
    "max_connections": (1, 100_000),
    "timeout": (0.01, 86_400),
    "idle": (0.01, 86_400),
    "grace": (0, 86_400),
    "poll": (0.01, 86_400),
}


def option(field: str) -> str:
    """A field as it is typed."""
    return "--" + field.replace("_", "-")


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Refuses a number that lies outside its range, both ends of which belong to it.

    Raises:
        UserError: names the option, its value and the nearest valid one.
    """
    if not (math.isfinite(value) and low <= value <= high):
        nearest = low if not value > low else high
        typed = option(field)
        raise UserError(f"{typed} {value:g} must lie in {low:g} to {high:g}; e.g. {typed} {nearest:g}")


def validate(config: ServeConfig) -> None:
    """Refuses values that cannot work.

    Raises:
        UserError: names the option, its value and the nearest valid one.
    """
    for field, (low, high) in _RANGES.items():
        check_range(field, getattr(config, field), low, high)
    if not re.fullmatch(r"[\w.-]+", config.name):
        raise UserError(f"--name {config.name!r} may have letters, digits, '_', '-' and '.'; e.g. --name encoder")
    if config.rest_port == config.grpc_port != 0:
        raise UserError(
            f"--rest-port and --grpc-port are both {config.rest_port}; e.g. --grpc-port {config.rest_port - 1}"
        )
    if config.max_buffered_mb < config.max_request_mb:
        raise UserError(
            f"--max-buffered-mb {config.max_buffered_mb:g} is below --max-request-mb {config.max_request_mb:g}; "
            f"e.g. --max-buffered-mb {8 * config.max_request_mb:g}"
        )
