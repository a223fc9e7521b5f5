"""Models that cost nothing, places to publish them to, and what readers see there."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty_storage
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client
from google.cloud.storage.retry import DEFAULT_RETRY

from components.pusher import publish
from components.pusher.bucket import Bucket, Transfer

BASE = "gs://models/encoders/birds"
# The library's retries, with less patience, so that a test of many faults takes seconds.
QUICK = Transfer(timeout=1.0, chunk=2**18, retry=DEFAULT_RETRY.with_delay(0.02, 0.2).with_timeout(15.0))


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with the files of a SavedModel, whose contents are one word again and again."""

    def make(word: str, size: int = 3000) -> Path:
        folder = tmp_path / "models" / word
        files = {"saved_model.pb": 100, "variables/variables.index": 10, "variables/variables.data": size}
        for name, length in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((word.encode() * length)[:length])
        (folder / "assets.extra").mkdir()
        (folder / "assets.extra" / "model_card.json").write_text(json.dumps({"model_sha256": word}))
        return folder

    return make


@pytest.fixture
def storage() -> Iterator[faulty_storage.Storage]:
    with faulty_storage.storage() as made:
        yield made


@pytest.fixture
def proxy(storage: faulty_storage.Storage) -> Iterator[faulty_storage._Server]:
    with faulty_storage.proxy(storage) as made:
        yield made


@pytest.fixture
def bucket(proxy: faulty_storage._Server) -> Bucket:
    return bucket_behind(proxy)


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
