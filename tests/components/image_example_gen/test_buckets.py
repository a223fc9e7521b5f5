"""gs:// sources, read over Google Cloud Storage's own protocol from an emulator on loopback."""

import socket
from pathlib import Path

import pytest

from components.image_example_gen import buckets, sources
from components.image_example_gen.config import IngestConfig
from trainer_module.errors import UserError


@pytest.fixture(scope="module")
def mirrored(upload, sample_images, sample_tars, tmp_path_factory) -> Path:
    """Pictures in folders and a tar shard, in the bucket and in a local folder."""
    folder = tmp_path_factory.mktemp("local")
    files = {f"{label}/{i}.png": data for label in ("food", "flags") for i, data in enumerate(sample_images[label][:5])}
    files["shards/x.tar"] = sample_tars[0].read_bytes()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    upload({f"set/{name}": data for name, data in files.items()})
    return folder


def test_a_bucket_gives_the_images_and_labels_of_the_same_folder_on_disk(mirrored):
    def told(source: str) -> list[tuple[str, str | None, bytes]]:
        items = list(sources.read_images(source, IngestConfig()))
        assert all(isinstance(item, sources.Found) for item in items)
        return [(item.ref.path, item.ref.label, item.data) for item in items if isinstance(item, sources.Found)]

    local = told(str(mirrored))
    assert len(local) > 100
    assert told("gs://pictures/set") == local


def test_a_range_of_an_object_is_read_and_no_byte_more(mirrored):
    path, data = "gs://pictures/set/food/0.png", (mirrored / "food" / "0.png").read_bytes()
    client = buckets.client()
    assert buckets.read(client, path, 10, 20) == data[10:30]
    assert buckets.read(client, path, len(data) - 3, 10) == data[-3:]
    assert buckets.read(client, path, 0, 0) == b""
    assert sources.Reader().read(sources.Ref(path, 5, 7, "0.png", None)) == data[5:12]
    with pytest.raises(OSError, match="gone"):
        buckets.read(client, "gs://pictures/gone", 0, 1)


def test_what_a_check_refuses_is_told_in_one_line(mirrored, monkeypatch):
    sources.check("gs://pictures/set/food")
    sources.check("gs://pictures/set/*/*.png")
    for source, words in (
        ("gs://no such/x", "cannot be the name of a bucket"),
        ("gs://", "cannot be the name of a bucket"),
        ("gs://another-bucket/x", "there is no bucket gs://another-bucket"),
        ("gs://pictures/nothing/*.jpg", "there is nothing at"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            sources.check(source)
        assert "\n" not in str(caught.value)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match=r"no answer about gs://pictures .*check the network"):
            sources.check("gs://pictures/set")
