"""gs:// sources, read over Google Cloud Storage's own protocol from an emulator, with and without faults."""

import io
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import faulty_storage
import pytest
from faulty_storage import REFUSALS, Answer, Fault, Request, at_request, refusal

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
    assert buckets.read(path, 10, 20) == data[10:30]
    assert buckets.read(path, len(data) - 3, 10) == data[-3:]
    assert buckets.read(path, 0, 0) == b""
    assert sources.read_ref(sources.Ref(path, 5, 7, "0.png", None)) == data[5:12]
    with pytest.raises(OSError, match="gone"):
        buckets.read("gs://pictures/gone", 0, 1)


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


# Faults, at every request of the protocol in turn.

FAULTS = (
    Fault.request_lost,
    Fault.answer_lost,
    Fault.answer_cut,
    Fault.answer_slow,
    Fault.answer_stalls,
    Fault.flipped_download,
    None,  # refused: 503, 429 and 408 in turn
)


@pytest.fixture(scope="module")
def shaky(sample_images) -> Iterator[faulty_storage.Storage]:
    """A bucket with images in a folder, one without an extension, and a tar shard; reached through proxies."""
    pictures = sample_images["food"][:6]
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for number, data in enumerate(pictures[3:]):
            info = tarfile.TarInfo(f"flags/{number}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    objects = {"food/0.png": pictures[0], "food/1.png": pictures[1], "food/2": pictures[2], "x.tar": shard.getvalue()}
    with faulty_storage.storage("pictures") as made:
        with faulty_storage.proxy(made) as proxy, pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
            for name, data in objects.items():
                buckets.client().bucket("pictures").blob(f"set/{name}").upload_from_string(data)
        yield made


@pytest.fixture
def read_through(shaky, monkeypatch):
    """Lists and reads the set twice, as ingestion does, through a plan; gives what was read, and the requests."""
    monkeypatch.setattr(buckets, "PATIENCE", buckets.Patience(timeout=0.5, total=4.0, pause=0.01))

    def run(plan: faulty_storage.Plan) -> tuple[list[tuple[str, str | None, bytes]], list[Request]]:
        with faulty_storage.proxy(shaky, plan) as proxy:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
            items = list(sources.read_images("gs://pictures/set", IngestConfig()))
            assert all(isinstance(item, sources.Found) for item in items), items
            again = [(item.ref.path, item.ref.label, sources.read_ref(item.ref)) for item in items]
            assert again == [(item.ref.path, item.ref.label, item.data) for item in items]
            return again, proxy.requests

    return run


def applies(fault: Fault | None, request: Request) -> bool:
    if fault is Fault.flipped_download:  # a part of an object has no checksum of its own; TLS guards it
        return request.is_download and "range" not in request.headers
    return fault is not Fault.answer_slow or request.is_download


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name if fault else "refused")
def test_a_fault_at_any_request_is_got_over_and_the_bytes_are_those_of_a_faultless_run(fault, read_through):
    whole, requests = read_through(faulty_storage.no_faults)
    assert len(whole) == 6
    assert len(requests) > 10
    numbers = [number for number, request in enumerate(requests) if applies(fault, request)]
    assert numbers
    for number in numbers:
        strikes = fault or REFUSALS[number % len(REFUSALS)]
        assert read_through(at_request(number, strikes))[0] == whole, f"{strikes} at {requests[number]}"


@pytest.mark.parametrize("fault", [Fault.answer_lost, Fault.answer_cut, Fault.unavailable])
def test_an_outage_from_any_request_on_ends_in_one_line_and_in_no_quarantine(fault, read_through, monkeypatch):
    whole, requests = read_through(faulty_storage.no_faults)
    monkeypatch.setattr(buckets, "PATIENCE", buckets.Patience(timeout=0.5, total=0.05, pause=0.01))
    for first in range(len(requests)):
        with pytest.raises(UserError, match=r"no whole answer about gs://pictures/set.*; check the network") as caught:
            read_through(lambda number, _, first=first: fault if number >= first else None)
        assert "\n" not in str(caught.value)
    assert read_through(faulty_storage.no_faults)[0] == whole


def test_an_object_that_is_gone_since_it_was_listed_is_no_fault_of_the_network(shaky, monkeypatch):
    def delete(number: int, request: Request) -> Answer | None:
        gone = request.is_download and "food%2F1.png" in request.path
        return refusal(404, "notFound", "No such object") if gone else None

    with faulty_storage.proxy(shaky, delete) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        items = list(sources.read_images("gs://pictures/set", IngestConfig()))
    (bad,) = (item for item in items if not isinstance(item, sources.Found))
    assert isinstance(bad, sources.Bad)
    assert (bad.path, bad.reason) == ("food/1.png", "unreadable")
    assert len(items) == 6


def test_what_may_not_be_read_ends_in_one_line(read_through):
    def forbid(number: int, request: Request) -> Answer | None:
        return refusal(403, "forbidden", "no storage.objects.get access") if request.is_download else None

    with pytest.raises(UserError, match="may not be read with your credentials"):
        read_through(forbid)


def test_an_archive_is_read_ahead_and_from_any_place(read_through, shaky, monkeypatch):
    with faulty_storage.proxy(shaky) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        data = shaky.objects()["set/x.tar"]
        with buckets.open_object("gs://pictures/set/x.tar") as stream:
            assert (stream.read(10), stream.seek(600), stream.read(5)) == (data[:10], 600, data[600:605])
            assert len(proxy.requests) == 2  # its size, and all of it
            assert (stream.seek(-3, io.SEEK_END), stream.read()) == (len(data) - 3, data[-3:])
            assert stream.read(1) == b""
