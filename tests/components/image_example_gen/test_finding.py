"""References to images: batches of files in order, threads that keep it, and images that are read a second time."""

import gzip
import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.image_example_gen import codec, finding, sources
from components.image_example_gen.config import IngestConfig

NAMES = st.lists(st.sampled_from(["a.png", "b.jpg", "c.tar", "d.tfrecord", "e.tgz", "f"]), max_size=30)


@given(NAMES, st.integers(1, 5))
def test_batches_keep_the_order_and_leave_archives_alone(names: list[str], size: int) -> None:
    files = [sources.File(f"/{number}/{name}", name, number, 0) for number, name in enumerate(names)]
    batches = list(finding.batches(files, size))
    assert [finding.restored(file) for batch in batches for file in batch] == files
    archives = (sources.Kind.tar, sources.Kind.tfrecord)
    for batch in batches:
        kinds = [sources.kind_of(finding.restored(file).relative) for file in batch]
        assert 0 < len(kinds) <= size
        assert len(kinds) == 1 or not set(kinds) & set(archives)


def test_names_that_are_no_unicode_survive() -> None:
    file = sources.File(os.fsdecode(b"/x/\xff.png"), os.fsdecode(b"\xff.png"), 3, 4)
    ((batch,),) = finding.batches([file], 8)
    assert finding.restored(batch) == file


def test_threads_keep_the_order_and_take_a_bounded_number_ahead() -> None:
    threads = finding.Threads()
    taken = 0

    def numbers():
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield number

    results = threads.in_order(lambda number: number * 2, numbers())
    assert [next(results) for _ in range(100)] == [2 * number for number in range(100)]
    assert taken < 100 + 8 * (2 * 8 + 2)
    assert sum(1 for _ in results) == 9_900
    threads.close()


def test_a_failure_in_a_thread_is_raised() -> None:
    threads = finding.Threads()
    with pytest.raises(ZeroDivisionError):
        list(threads.in_order(lambda number: 1 // number, [1, 0, 2]))
    threads.close()


def test_an_image_is_read_again_only_if_it_is_the_same(tmp_path, sample_images) -> None:
    path = tmp_path / "flags" / "x.png"
    path.parent.mkdir()
    path.write_bytes(sample_images["flags"][0])
    finder = finding.Finder(IngestConfig(), str(tmp_path), threads := finding.Threads())
    ((kind, (sha, packed)),) = finder.find(next(finding.batches(sources.sorted_files(str(tmp_path)), 8)))
    threads.close()
    ref = finding.unpack_ref(packed)
    assert (kind, ref.path, ref.label) == ("ref", "flags/x.png", "flags")
    assert finding.read_again(ref, sha.hex()) == sample_images["flags"][0]
    other = bytearray(sample_images["flags"][0])
    other[-1] ^= 1
    path.write_bytes(other)
    assert codec.sha256(bytes(other)) != sha.hex()
    with pytest.raises(OSError, match="changed"):
        finding.read_again(ref, sha.hex())


def found(path, scratch):
    """What the stages find of one file: kinds, and (path, reason) of what is bad."""
    (scratch / "unpacked").mkdir(exist_ok=True)
    threads = finding.Threads()
    (batch,) = finding.batches(sources.list_files(str(path)), 8)
    results = list(finding.Finder(IngestConfig(), str(scratch), threads).find(batch))
    threads.close()
    for kind, value in results:
        if kind == "ref":
            finding.read_again(finding.unpack_ref(value[1]), value[0].hex())
    return [kind for kind, _ in results], [value[:2] for kind, value in results if kind == "bad"]


@pytest.mark.parametrize("suffix", ["tgz", "tfrecord.gz"])
def test_a_cut_compressed_archive_gives_all_that_it_holds_and_is_told_once(tmp_path, sample_images, suffix) -> None:
    pictures = [bytes(picture) for several in sample_images.values() for picture in several][:40]
    whole = io.BytesIO()
    if suffix == "tgz":
        with tarfile.open(fileobj=whole, mode="w:gz") as archive:
            for number, data in enumerate(pictures):
                info = tarfile.TarInfo(f"c/{number}.png")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        import tensorflow as tf

        with tf.io.TFRecordWriter(str(tmp_path / "plain")) as writer:
            for data in pictures:
                feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))
                features = tf.train.Features(feature={"image": feature})
                writer.write(tf.train.Example(features=features).SerializeToString())
        whole.write(gzip.compress((tmp_path / "plain").read_bytes()))
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    kinds, bad = found(path, tmp_path)
    streamed = [item for item in sources.read_images(str(path), IngestConfig()) if isinstance(item, sources.Found)]
    assert kinds.count("ref") >= len(streamed) > 10
    assert bad == [(path.name, "damaged_archive")]


def test_a_compressed_archive_that_is_none_is_told_once(tmp_path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(b"this is no gzip")
    assert found(path, tmp_path) == (["bad"], [("x.tar.gz", "damaged_archive")])


def test_what_could_be_unpacked_is_in_the_file(tmp_path) -> None:
    data = os.urandom(300_000)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(data)[:200_000])
    trouble = sources.unpack(sources.File(str(path), path.name, 200_000, 0), str(tmp_path / "out"))
    assert "EOFError" in trouble
    unpacked = (tmp_path / "out").read_bytes()
    assert data.startswith(unpacked)
    assert len(unpacked) > 190_000
