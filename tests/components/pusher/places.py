"""A bucket behind a proxy as a place of publication, and what readers see of any place."""

from pathlib import Path

import faulty_storage
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client
from google.cloud.storage.retry import DEFAULT_RETRY

from components.pusher import publish
from components.pusher.bucket import Bucket, Transfer

BASE = "gs://models/encoders/birds"
# The library's retries, with less patience, so that a test of many faults takes seconds.
QUICK = Transfer(timeout=1.0, chunk=2**18, retry=DEFAULT_RETRY.with_delay(0.02, 0.2).with_timeout(15.0))


def bucket_behind(proxy: faulty_storage._Server, base: str = BASE, transfer: Transfer = QUICK) -> Bucket:
    endpoint = {"api_endpoint": faulty_storage.url(proxy)}
    return Bucket(base, Client("none", AnonymousCredentials(), client_options=endpoint), transfer)


def tree(root: Path | str) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def read(at: publish.Place) -> dict[str, bytes]:
    """The files that a reader gets: those of the version in service."""
    with at.errors_told(), at.local_copy(publish.in_service(at)) as folder:
        return tree(folder)


def states(at: publish.Place) -> list[str]:
    return [version.state for version in publish.versions(at)]
