"""Models that cost nothing, and a bucket to publish them to."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty_storage
import pytest
from places import bucket_behind

from components.pusher.bucket import Bucket


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
