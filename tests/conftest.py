"""Fixtures that every room's tests share: the sample images that the project carries."""

import signal
import tarfile
from pathlib import Path

import pytest

from trainer_module.strategy import prepare_devices

REPLICAS = 8


def pytest_sessionstart() -> None:
    """Splits the CPU before any test starts TensorFlow; later it is too late.

    Ctrl-C is listened to again, here and so in the processes that tests start: jobs in a shell's background ignore it.
    """
    prepare_devices(REPLICAS)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def sample_tars() -> list[Path]:
    """Paths of the demo's tar shards, in order."""
    tars = sorted((Path(__file__).parent.parent / "configs" / "demo_images").glob("*.tar"))
    assert tars, "configs/demo_images holds no tar shards"
    return tars


@pytest.fixture(scope="session")
def sample_images(sample_tars: list[Path]) -> dict[str, list[bytes]]:
    """The demo's pictures as PNG bytes, by label, in the order of the shards."""
    images: dict[str, list[bytes]] = {}
    for tar in sample_tars:
        with tarfile.open(tar) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream is not None and member.name.endswith(".png"):
                    images.setdefault(member.name.removeprefix("./").split("/")[-2], []).append(stream.read())
    return images
