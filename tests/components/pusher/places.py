"""A bucket behind a proxy as a place of publication, and what readers see of any place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_storage
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client
from google.cloud.storage.retry import DEFAULT_RETRY

from components.pusher import publish
from components.pusher.bucket import Bucket, Transfer
from components.pusher.pointer import Survey

BASE = "gs://models/encoders/birds"
# The library's retries, with less patience, so that a test of many faults takes seconds.
QUICK = Transfer(timeout=1.0, chunk=2**18, retry=DEFAULT_RETRY.with_delay(0.02, 0.2).with_timeout(15.0))


def bucket_behind(proxy: faulty_storage._Server, base: str = BASE, transfer: Transfer = QUICK) -> Bucket:
    endpoint = {"api_endpoint": faulty_storage.url(proxy)}
    return Bucket(base, Client("none", AnonymousCredentials(), client_options=endpoint), transfer)


class Meanwhile:
    """A place at which something happens after a version was staged and before it comes into service."""

    def __init__(self, at: publish.Place, happens: Callable[[], object]) -> None:
        self._at, self._happens = at, happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._at, name)

    def stage(self, model_path: str, seen: Survey) -> str:
        version = self._at.stage(model_path, seen)
        self._happens()
        return version


def tree(root: Path | str) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def read(at: publish.Place) -> dict[str, bytes]:
    """The files that a reader gets: those of the version in service."""
    with at.errors_told(), at.local_copy(publish.in_service(at)) as folder:
        return tree(folder)


def states(at: publish.Place) -> list[str]:
    return [version.state for version in publish.versions(at)]
