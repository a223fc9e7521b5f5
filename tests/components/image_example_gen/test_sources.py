"""What --images can be, without TFX."""

import gzip
import io
import json
import os
import pathlib
import random
import socket
import struct
import subprocess
import sys
import tarfile
import unicodedata
from typing import Any

import pytest
from apache_beam.io.filesystem import CompressionTypes, FileMetadata
from apache_beam.io.localfilesystem import LocalFileSystem
from PIL import Image

from components.image_example_gen import sources
from components.image_example_gen.config import IngestConfig, Labels, from_json, to_json, validate
from components.image_example_gen.sources import Bad, Found, Kind, Skipped
from trainer_module.errors import UserError

CONFIG = IngestConfig()


def png(colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (colour % 256, colour // 256, 7)).save(out, "PNG")
    return out.getvalue()


def write(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: pathlib.Path, members: dict[str, bytes], mode: str = "w") -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def masked_crc(data: bytes) -> bytes:
    from google_crc32c import value

    check = value(data)
    return struct.pack("<I", ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(records: list[bytes]) -> bytes:
    lengths = [struct.pack("<Q", len(record)) for record in records]
    return b"".join(
        size + masked_crc(size) + record + masked_crc(record) for size, record in zip(lengths, records, strict=True)
    )


def example(**values: bytes | int) -> bytes:
    from tensorflow.core.example import example_pb2, feature_pb2

    def feature(value: bytes | int) -> feature_pb2.Feature:
        if isinstance(value, int):
            return feature_pb2.Feature(int64_list=feature_pb2.Int64List(value=[value]))
        return feature_pb2.Feature(bytes_list=feature_pb2.BytesList(value=[value]))

    features = {name.replace("__", "/"): feature(value) for name, value in values.items()}
    return example_pb2.Example(features=feature_pb2.Features(feature=features)).SerializeToString()


def read(src: object, config: IngestConfig = CONFIG) -> list[sources.Item]:
    return list(sources.read_images(sources.join_pattern(*sources.split_pattern(str(src))), config))


def labels(src: object, config: IngestConfig = CONFIG) -> dict[str, str | None]:
    """Path to label of all images; also proves that each reference, and each path, leads back to the bytes."""
    found = [item for item in read(src, config) if isinstance(item, Found)]
    for item in found:
        if not sources.is_compressed(item.ref.file):
            assert sources.read_ref(item.ref) == item.data
    joined = sources.join_pattern(*sources.split_pattern(str(src)))
    named = {item.ref.path: item.data for item in sources.read_named(joined, [item.ref.path for item in found], config)}
    assert named == {item.ref.path: item.data for item in found}
    return {item.ref.path: item.ref.label for item in found}


def test_the_first_folder_level_is_the_label_whatever_the_depth(tmp_path: pathlib.Path) -> None:
    for number, name in enumerate(["cats/a.png", "cats/deep/er/b.png", "dogs/a.PNG", "loose.png"]):
        write(tmp_path / name, png(number))
    expected = {"cats/a.png": "cats", "cats/deep/er/b.png": "cats", "dogs/a.PNG": "dogs", "loose.png": None}
    assert labels(tmp_path) == expected
    assert labels(f"{tmp_path}/") == expected
    assert set(labels(tmp_path, IngestConfig(labels=Labels.none)).values()) == {None}


def test_images_that_are_named_are_read_as_far_as_they_are_there(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a" / "x.png", png(1))
    write_tar(tmp_path / "b.tar", {"c/y.png": png(2), "c/z.png": png(3)})
    (tmp_path / "folder.tar" / "x.png").mkdir(parents=True)
    names = ["a/x.png", "b.tar/c/z.png", "b.tar/c/gone.png", "a/gone.png", "gone.tar/x.png", "folder.tar/x.png", "a"]
    found = sources.read_named(str(tmp_path), names, CONFIG)
    assert {item.ref.path: item.data for item in found} == {"a/x.png": png(1), "b.tar/c/z.png": png(3)}


def test_a_flat_folder_is_unlabelled(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "b.png", png(2))
    assert labels(tmp_path) == {"a.png": None, "b.png": None}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*/*.png", {"cats/a.png": "cats", "dogs/a.png": "dogs"}),
        ("cats/*.png", {"a.png": None}),
        ("c*", {"cats/a.png": "cats", "cats/deep/b.png": "cats"}),
        ("**", {"cats/a.png": "cats", "cats/deep/b.png": "cats", "dogs/a.png": "dogs"}),
        ("**/*.png", {"cats/a.png": "cats", "cats/deep/b.png": "cats", "dogs/a.png": "dogs"}),
        ("cats/a.png", {"a.png": None}),
    ],
)
def test_a_glob_takes_files_and_folders_each_once(
    tmp_path: pathlib.Path, pattern: str, expected: dict[str, str | None]
) -> None:
    for number, name in enumerate(["cats/a.png", "cats/deep/b.png", "dogs/a.png"]):
        write(tmp_path / name, png(number))
    assert labels(tmp_path / pattern) == expected
    assert len(read(tmp_path / pattern)) == len(expected)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_shards_hold_a_folder_tree(tmp_path: pathlib.Path, mode: str) -> None:
    suffix = ".tar" if mode == "w" else ".tar.gz"
    write_tar(tmp_path / f"s0{suffix}", {"./cats/a.png": png(1), "cats/x/b.png": png(2), "._cats": b"x"}, mode)
    write_tar(tmp_path / f"s1{suffix}", {"dogs/a.png": png(3), "c.png": png(4), "README.txt": b"hello"}, mode)
    assert labels(tmp_path) == {
        f"s0{suffix}/cats/a.png": "cats",
        f"s0{suffix}/cats/x/b.png": "cats",
        f"s1{suffix}/dogs/a.png": "dogs",
        f"s1{suffix}/c.png": None,
    }
    assert [item for item in read(tmp_path) if isinstance(item, Skipped)] == [Skipped(f"s1{suffix}/README.txt")]
    assert labels(tmp_path / f"*{suffix}") == labels(tmp_path)
    assert set(labels(tmp_path / f"s1{suffix}")) == {f"s1{suffix}/dogs/a.png", f"s1{suffix}/c.png"}


def test_webdataset_keys_label_their_images(tmp_path: pathlib.Path) -> None:
    members = {
        "000.png": png(0),
        "000.cls": b"tabby cat\n",
        "001.json": json.dumps({"label": "a/b"}).encode(),
        "001.png": png(1),
        "002.png": png(2),
        "002.txt": b"dog",
        "003.png": png(3),
        "003.txt": b"a long caption that describes everything there is to be seen in this picture",
        "folder/004.seg.png": png(4),
        "folder/004.cls": b"7",
        "005.png": png(5),
    }
    found = labels(write_tar(tmp_path / "w.tar", members))
    assert {path.removeprefix("w.tar/"): label for path, label in found.items()} == {
        "000.png": "tabby cat",
        "001.png": "a/b",
        "002.png": "dog",
        "003.png": None,
        "folder/004.seg.png": "7",
        "005.png": None,
    }


@pytest.mark.parametrize("name", ["x.tfrecord", "x.tfrecord.gz", "x.record", "train-00000-of-00002"])
def test_tfrecords_of_examples(tmp_path: pathlib.Path, name: str) -> None:
    records = [
        example(image__encoded=png(1), image__class__text=b"caf\xc3\xa9", image__class__label=3),
        example(image__encoded=png(2), image__class__label=3),
        example(image=png(3), label=5),
        example(image__encoded=png(4)),
    ]
    data = tfrecord(records)
    write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert list(labels(tmp_path).values()) == ["café", "3", "5", None]


def test_keys_of_examples_can_be_named(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "x.tfrecord", tfrecord([example(photo=png(1), kind=b"x"), example(other=png(2))]))
    config = IngestConfig(image_key="photo", label_key="kind")
    first, second = read(tmp_path, config)
    assert isinstance(first, Found)
    assert first.ref.label == "x"
    assert isinstance(second, Bad)
    assert "ingest.image_key" in second.detail


def test_folders_inside_a_tar_are_the_labels_whatever_captions_lie_beside_the_images(tmp_path: pathlib.Path) -> None:
    for order in (1, -1):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name, data in [("dogs/a0.txt", b"a brown dog"), ("dogs/a0.png", b"\x89PNG\r\n\x1a\n")][::order]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        items = sources.read_images(str(tmp_path / "x.tar"), IngestConfig())
        assert [item.ref.label for item in items if isinstance(item, sources.Found)] == ["dogs"]


def test_an_unreadable_file_counts_as_changed_once_it_may_be_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    readable = sources.survey(str(tmp_path)).fingerprint
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert sources.survey(str(tmp_path)).fingerprint != readable


def test_labels_keep_spaces_and_unicode_in_one_normal_form(tmp_path: pathlib.Path) -> None:
    composed, decomposed = unicodedata.normalize("NFC", "Bäume"), unicodedata.normalize("NFD", "Bäume")
    write(tmp_path / "two words" / "a.png", png(1))
    write(tmp_path / composed / "b.png", png(2))
    write(tmp_path / decomposed / "c.png", png(3))
    write(tmp_path / "日本" / "d.png", png(4))
    assert sorted(label or "" for label in labels(tmp_path).values()) == sorted(
        ["two words", composed, composed, "日本"]
    )


def test_other_files_are_skipped_and_counted_hidden_ones_ignored(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a" / "real.png", png(1))
    write(tmp_path / "a" / "nameless", png(2))
    write(tmp_path / "a" / "broken.jpg", b"text")
    for name in ("notes.txt", "labels.csv", "LICENSE", "drawing.svg"):
        write(tmp_path / "a" / name, b"plain")
    for name in (".DS_Store", "._real.png", "Thumbs.db", "__MACOSX/x.png", ".git/y.png"):
        write(tmp_path / "a" / name, png(9))
    (tmp_path / "a" / "nowhere.png").symlink_to(tmp_path / "missing.png")
    items = read(tmp_path)
    assert sorted(item.ref.path for item in items if isinstance(item, Found)) == [
        "a/broken.jpg",
        "a/nameless",
        "a/real.png",
    ]
    assert len([item for item in items if isinstance(item, Skipped)]) == 4
    assert len(items) == 7


def test_links_are_followed_but_never_in_circles(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "store" / "a.png", png(1))
    (tmp_path / "set" / "cats").mkdir(parents=True)
    (tmp_path / "set" / "cats" / "a.png").symlink_to(tmp_path / "store" / "a.png")
    (tmp_path / "set" / "dogs").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "cats" / "again").symlink_to(tmp_path / "set")
    found = labels(tmp_path / "set")
    assert found["cats/a.png"] == "cats"
    assert found["dogs/a.png"] == "dogs"
    assert len(found) < 10


def test_links_among_folders_do_not_multiply_their_files(tmp_path: pathlib.Path) -> None:
    names = [f"f{number}" for number in range(7)]
    for number, name in enumerate(names):
        write(tmp_path / "set" / name / "a.png", png(number))
        for other in set(names) - {name}:
            (tmp_path / "set" / name / f"to-{other}").symlink_to(tmp_path / "set" / other)
    expected = {f"{name}/a.png": name for name in names}
    for src in ("set", "set/*", "set/**", "set/**/*.png", "set/*/*.png"):
        assert labels(tmp_path / src) == expected, src
        assert len(list(sources.list_files(f"{tmp_path}/{src}"))) == 7, src


def test_a_folder_is_listed_where_it_lies_or_else_under_its_first_link(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "store" / "deep" / "a.png", png(1))
    write(tmp_path / "set" / "z" / "b.png", png(2))
    for name in ("b", "c"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "set" / "z")
    assert labels(tmp_path / "set") == {"b/deep/a.png": "b", "z/b.png": "z"}
    assert labels(tmp_path / "set" / "**" / "deep") == {"b/deep/a.png": "b"}
    assert labels(tmp_path / "set" / "c") == {"deep/a.png": "deep"}


def test_a_folder_that_a_pattern_passes_is_still_found_by_a_link_that_it_matches(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "set" / "store" / "a.png", png(1))
    (tmp_path / "set" / "cats").symlink_to(tmp_path / "set" / "store")
    assert labels(tmp_path / "set" / "**" / "cats") == {"cats/a.png": "cats"}


def test_links_that_lead_nowhere_or_to_themselves_stop_nothing(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.png", png(1))
    for name in ("b.png", "c"):
        (tmp_path / name).symlink_to(tmp_path / name)
    items = read(tmp_path)
    assert [item.ref.path for item in items if isinstance(item, Found)] == ["a.png"]
    assert [(item.path, item.reason) for item in items if isinstance(item, Bad)] == [("b.png", "unreadable")]


def test_a_pipe_is_refused_as_a_source_and_passed_over_in_a_folder(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.png", png(1))
    os.mkfifo(tmp_path / "b.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "c.png"))
    assert list(labels(tmp_path)) == ["a.png"]
    assert list(labels(tmp_path / "*.png")) == ["a.png"]
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match="a pipe, a socket or a device; name a file or a folder"):
            sources.check(f"{tmp_path}/{name}")
        with pytest.raises(UserError, match="nothing matches"):
            sources.check(f"{tmp_path}/{name[0]}*")


def test_a_name_that_is_no_unicode_is_quarantined(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.png", png(1))
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.png", "wb") as file:
        file.write(png(2))
    bad = [item for item in read(tmp_path) if isinstance(item, Bad)]
    assert [(item.path, item.reason) for item in bad] == [("\\xff\\xfe.png", "unreadable")]
    bad[0].path.encode()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_cut_archive_gives_what_it_holds_and_a_bad_row(tmp_path: pathlib.Path, mode: str) -> None:
    suffix = ".tar" if mode == "w" else ".tgz"
    whole = write_tar(tmp_path / f"x{suffix}", {f"c/{n}.png": os.urandom(3000) for n in range(20)}, mode)
    whole.write_bytes(whole.read_bytes()[:30_000])
    items = read(tmp_path)
    assert len([item for item in items if isinstance(item, Found)]) in range(5, 10)
    assert [(item.path, item.reason) for item in items if isinstance(item, Bad)] == [(f"x{suffix}", "damaged_archive")]


def header(name: str, **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [1 << 33, 1 << 62, 1 << 70, -512, -(1 << 40)])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_hostile_size_in_an_archive_is_damage(tmp_path: pathlib.Path, kind: bytes, size: int, suffix: str) -> None:
    whole = write_tar(tmp_path / "x.tar", {"c/a.png": png(1)}).read_bytes()[:1024]
    data = whole + header("c/b.png", size=size, type=kind) + bytes(2048)
    (tmp_path / "x.tar").unlink()
    write(tmp_path / f"x{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    items = read(tmp_path)
    assert [item.ref.path for item in items if isinstance(item, Found)] == [f"x{suffix}/c/a.png"]
    if kind != tarfile.XHDTYPE:
        assert "damaged_archive" in [item.reason for item in items if isinstance(item, Bad)]


def test_an_archive_with_any_bytes_changed_stops_nothing(tmp_path: pathlib.Path) -> None:
    """Headers keep a valid checksum, so that what is wrong gets as far as it can."""
    whole = write_tar(tmp_path / "x.tar", {f"c/{'n' * 120}{n}.png": png(n) for n in range(4)}).read_bytes()
    draw = random.Random(7)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            block = draw.randrange(len(data) // 512) * 512
            at = block + draw.choice([draw.randrange(512), 124, 125, 135, 156, 482])
            data[at] = draw.choice([0, 0x20, 0x30, 0x39, 0x4B, 0x4C, 0x53, 0x78, 0x80, 0xFF, draw.randrange(256)])
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        (tmp_path / "x.tar").write_bytes(bytes(data))
        assert all(isinstance(item, Found | Bad | Skipped) for item in read(tmp_path))


def test_names_nested_without_end_are_damage(tmp_path: pathlib.Path) -> None:
    long_name = header("l", size=512, type=tarfile.GNUTYPE_LONGNAME) + b"n" * 511 + b"\0"
    write(tmp_path / "x.tar", long_name * 2000 + header("a.png"))
    assert [item.reason for item in read(tmp_path) if isinstance(item, Bad)] == ["damaged_archive"]


@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
def test_no_image_of_an_archive_vanishes_for_its_name_or_as_a_link(tmp_path: pathlib.Path, suffix: str) -> None:
    path = write_tar(tmp_path / f"x{suffix}", {}, "w" if suffix == ".tar" else "w:gz")
    names = ["/a/abs.png", ".//b/dots.png", "../../c/up.png", "d/../e/over.png", "./f/plain.png"]
    with tarfile.open(path, "w" if suffix == ".tar" else "w:gz") as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(png(number))
            archive.addfile(info, io.BytesIO(png(number)))
        for name, kind in (("g/hard.png", tarfile.LNKTYPE), ("g/soft.png", tarfile.SYMTYPE), ("g/x", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "f/plain.png"
            archive.addfile(info)
    assert {name.removeprefix(f"x{suffix}/"): label for name, label in labels(tmp_path).items()} == {
        "a/abs.png": "a",
        "b/dots.png": "b",
        "c/up.png": "c",
        "e/over.png": "e",
        "f/plain.png": "f",
    }
    items = read(tmp_path)
    assert [(item.path, item.reason) for item in items if isinstance(item, Bad)] == [
        (f"x{suffix}/g/hard.png", "not_in_archive"),
        (f"x{suffix}/g/soft.png", "not_in_archive"),
    ]
    assert "f/plain.png" in next(item.detail for item in items if isinstance(item, Bad))
    assert [item.path for item in items if isinstance(item, Skipped)] == [f"x{suffix}/g/x"]


@pytest.mark.parametrize("sidecar", [b"[" * 100_000, b'{"label":' * 5_000, b"\xff\xfe", b'{"label": [1]}'])
def test_a_sidecar_that_says_nothing_leaves_its_image(tmp_path: pathlib.Path, sidecar: bytes) -> None:
    write_tar(tmp_path / "x.tar", {"0.json": sidecar, "0.png": png(1)})
    assert labels(tmp_path) == {"x.tar/0.png": None}


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (rb'{"label":"caf\ud83d"}', "caf\ufffd"),
        (rb'{"label":"\ud83d\ude00"}', "\U0001f600"),
        (rb'{"label":"a\nb"}', "a\ufffdb"),
        (rb'{"label":"a\u2028b\u0085"}', "a\ufffdb"),
        (rb'{"label":" a\tb\r\n"}', "a\ufffdb"),
        (rb'{"label":"a\u0000"}', "a"),
        (rb'{"label":"\n"}', None),
    ],
)
def test_a_label_is_one_line_of_valid_unicode(tmp_path: pathlib.Path, written: bytes, label: str | None) -> None:
    write_tar(tmp_path / "x.tar", {"0.json": written, "0.png": png(1)})
    assert labels(tmp_path) == {"x.tar/0.png": label}


def test_a_folder_with_a_line_break_in_its_name_is_a_label_that_vocabularies_can_hold(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a\nb" / "x.png", png(1))
    assert list(labels(tmp_path).values()) == ["a\ufffdb"]


def test_a_broken_header_in_the_middle_of_an_archive_is_noticed(tmp_path: pathlib.Path) -> None:
    whole = write_tar(tmp_path / "x.tar", {f"c/{n}.png": png(n) for n in range(20)})
    data = bytearray(whole.read_bytes())
    data[10 * 1024 + 5] ^= 0xFF
    whole.write_bytes(bytes(data))
    items = read(tmp_path)
    assert isinstance(items[-1], Bad)
    assert items[-1].reason == "damaged_archive"


def test_a_damaged_tfrecord_gives_what_it_holds_and_a_bad_row(tmp_path: pathlib.Path) -> None:
    data = tfrecord([example(image__encoded=png(n)) for n in range(4)])
    write(tmp_path / "cut.tfrecord", data[:-20])
    write(tmp_path / "text.tfrecord", b"this is no TFRecord at all")
    write(tmp_path / "foreign.tfrecord", tfrecord([b"\xff\xff\xff"]))
    items = read(tmp_path)
    assert len([item for item in items if isinstance(item, Found)]) == 3
    bad = {item.path: item.reason for item in items if isinstance(item, Bad)}
    assert bad == {
        "cut.tfrecord": "damaged_archive",
        "text.tfrecord": "damaged_archive",
        "foreign.tfrecord/00000000": "not_an_example",
    }


@pytest.mark.parametrize("name", ["x.tfrecord", "x.tfrecord.gz"])
@pytest.mark.parametrize("length", [1 << 33, 1 << 63, (1 << 64) - 1, (1 << 64) - 16])
def test_a_record_longer_than_its_file_is_damage(tmp_path: pathlib.Path, name: str, length: int) -> None:
    good, hostile = tfrecord([example(image__encoded=png(1))]), struct.pack("<Q", length)
    data = good + hostile + masked_crc(hostile) + b"too little"
    write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    first, second = read(tmp_path)
    assert isinstance(first, Found)
    assert isinstance(second, Bad)
    assert (second.path, second.reason) == (name, "damaged_archive")
    assert "cut off" in second.detail


@pytest.mark.parametrize("name", ["x.tfrecord", "x.tfrecord.gz"])
def test_a_record_too_long_for_an_image_is_passed_over(tmp_path: pathlib.Path, name: str) -> None:
    data = tfrecord([example(image__encoded=bytes(17 << 20)), example(image__encoded=png(1))])
    write(tmp_path / name, gzip.compress(data, 1) if name.endswith("gz") else data)
    first, second = read(tmp_path, IngestConfig(max_pixels=10_000))
    assert isinstance(first, Bad)
    assert first.reason == "too_many_bytes"
    assert isinstance(second, Found)


def test_a_file_too_long_for_its_pixels_is_never_read_into_memory(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    (item,) = read(tmp_path)
    assert isinstance(item, Bad)
    assert item.reason == "too_many_bytes"


@pytest.mark.parametrize("make", ["missing", "empty", "texts", "glob", "bad span", "blank"])
def test_a_source_without_images_is_refused_in_one_line(tmp_path: pathlib.Path, make: str) -> None:
    write(tmp_path / "texts" / "a.txt", b"no image")
    (tmp_path / "empty").mkdir()
    src = {"glob": f"{tmp_path}/*.jpg", "bad span": f"{tmp_path}/day-{{SPAN}}", "blank": " "}.get(
        make, f"{tmp_path}/{make}"
    )
    with pytest.raises(UserError) as caught:
        sources.check(src)
    assert "\n" not in str(caught.value)
    assert make == "blank" or str(tmp_path) in str(caught.value)


def test_check_accepts_every_kind_of_source(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "span-1" / "v2" / "deep" / "a.png", png(1))
    write(tmp_path / "nameless" / "x", png(1))
    write_tar(tmp_path / "tars" / "a.tgz", {"a.png": png(1)}, "w:gz")
    for src in ("", "span-{SPAN}", "span-{SPAN}/v{VERSION}", "s*", "nameless", "tars", "tars/a.tgz", "tars/*.tgz"):
        sources.check(f"{tmp_path}/{src}")


def test_a_locked_folder_is_named_and_a_locked_file_quarantined(tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(__file__).resolve().parents[3]
    folder = write(tmp_path / "set" / "locked" / "a.png", png(1)).parent
    file = write(tmp_path / "open" / "b.png", png(2))
    mode = 0o700 if os.getuid() == 0 else 0o000  # the superuser may read everything, so he becomes another user below
    code = f"""
import os, sys
sys.path.insert(0, {str(root)!r})
import PIL.Image
from components.image_example_gen import sources
from components.image_example_gen.config import IngestConfig
from trainer_module.errors import UserError
folders = [os.open(name, os.O_RDONLY) for name in {[str(tmp_path / "set"), str(tmp_path / "open")]!r}]
if os.getuid() == 0:
    os.setuid(65534)
os.fchdir(folders[0])
try:
    list(sources.list_files("."))
except UserError as error:
    print(error)
os.fchdir(folders[1])
print(*[(type(item).__name__, item.path, item.reason) for item in sources.read_images(".", IngestConfig())])
"""
    for path in (folder, file):
        path.chmod(mode)
    for path in (folder.parent, file.parent):
        path.chmod(0o755)
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    finally:
        folder.chmod(0o755)
    first, second = done.stdout.splitlines()
    assert "locked may not be read" in first
    assert second == "('Bad', 'b.png', 'unreadable')"


def test_the_fingerprint_sees_every_change_however_deep(tmp_path: pathlib.Path) -> None:
    deep = write(tmp_path / "a" / "b" / "c" / "x.png", png(1))
    write(tmp_path / "a" / "y.png", png(2))
    seen = {sources.survey(str(tmp_path)).fingerprint}

    def changed() -> bool:
        now = sources.survey(str(tmp_path)).fingerprint
        fresh = now not in seen
        seen.add(now)
        return fresh

    assert not changed()
    os.utime(deep, ns=(1, 1))
    assert changed()
    before = deep.stat()
    deep.write_bytes(deep.read_bytes() + b"x")
    os.utime(deep, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changed()
    deep.rename(deep.with_name("z.png"))
    assert changed()
    write(tmp_path / "new" / "n.png", png(3))
    assert changed()
    write(tmp_path / "new" / ".DS_Store", b"x")
    assert not changed()


def test_split_pattern_is_tfx_input_base_and_pattern(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "odd [name]" / "a.png", png(1))
    write(tmp_path / "one.tar", b"")
    base = str(tmp_path)
    assert sources.split_pattern(base) == (base, "*")
    assert sources.split_pattern(f"{base}/odd [name]") == (f"{base}/odd [name]", "*")
    assert sources.split_pattern(f"{base}/one.tar") == (base, "one.tar")
    assert sources.split_pattern(f"{base}/day-{{SPAN}}/v{{VERSION}}") == (base, "day-{SPAN}/v{VERSION}")
    assert sources.split_pattern("gs://b/dir/*.tar") == ("gs://b/dir", "*.tar")
    assert sources.split_pattern("gs://b/dir/") == ("gs://b/dir", "*")
    assert sources.split_pattern("gs://b/dir/x.tar") == ("gs://b/dir", "x.tar")
    assert sources.join_pattern("gs://b/dir", "*") == "gs://b/dir"
    assert sources.join_pattern("/", "*.png") == "/*.png"


def test_names_tell_archives_and_images() -> None:
    kinds = {
        "a.JPG": Kind.image,
        "a.heic": Kind.image,
        "a.tar": Kind.tar,
        "a.TGZ": Kind.tar,
        "a.tar.gz": Kind.tar,
        "a.tfrecord.gz": Kind.tfrecord,
        "data_tfrecord-00000-of-00001.gz": Kind.tfrecord,
        "validation-00012-of-00128": Kind.tfrecord,
        "readme.txt": Kind.other,
        "x.gz": Kind.other,
    }
    assert {name: sources.kind_of(name) for name in kinds} == kinds


class BucketFileSystem(LocalFileSystem):
    """A file system of Beam with a scheme of its own, buckets being local folders: test-bucket://tmp/x is /tmp/x."""

    PREFIX = "test-bucket://"

    @classmethod
    def scheme(cls) -> str:
        return "test-bucket"

    def has_dirs(self) -> bool:
        return False

    def _local(self, path: str) -> str:
        return "/" + path.removeprefix(self.PREFIX)

    def exists(self, path: str) -> bool:
        return os.path.isfile(self._local(path))

    def metadata(self, path: str) -> FileMetadata:
        status = os.stat(self._local(path))
        return FileMetadata(path, status.st_size, status.st_mtime)

    def _list(self, dir_or_prefix: str):
        for folder, _, names in os.walk(os.path.dirname(self._local(dir_or_prefix))):
            for name in names:
                path = self.PREFIX + os.path.join(folder, name)[1:]
                if path.startswith(dir_or_prefix):
                    yield self.metadata(path)

    def open(self, path: str, mime_type: str = "", compression_type: str = CompressionTypes.AUTO):
        return super().open(self._local(path), mime_type, compression_type)


def test_remote_sources_are_read_through_beams_file_systems(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "set" / "cats" / "deep" / "a.png", png(1))
    write(tmp_path / "set" / "b.png", png(2))
    write(tmp_path / "set" / ".hidden" / "c.png", png(3))
    write_tar(tmp_path / "set" / "tars" / "s.tar", {"dogs/a.png": png(4)})
    write_tar(tmp_path / "set" / "tars" / "z.tgz", {"dogs/a.png": png(5)}, "w:gz")
    write(tmp_path / "set" / "r.tfrecord", tfrecord([example(image__encoded=png(6), label=1)]))
    base = f"{BucketFileSystem.PREFIX}{str(tmp_path)[1:]}"
    assert labels(f"{base}/set") == {
        "cats/deep/a.png": "cats",
        "b.png": None,
        "r.tfrecord/00000000": "1",
        "tars/s.tar/dogs/a.png": "dogs",
        "tars/z.tgz/dogs/a.png": "dogs",
    }
    assert labels(f"{base}/set/tars/*.tar") == {"s.tar/dogs/a.png": "dogs"}
    assert labels(f"{base}/set/tars/s.tar") == {"s.tar/dogs/a.png": "dogs"}
    assert labels(f"{base}/set/ca*") == {"cats/deep/a.png": "cats"}
    sources.check(f"{base}/set")
    first = sources.survey(f"{base}/set").fingerprint
    write(tmp_path / "set" / "cats" / "deep" / "a.png", png(1) + b"x")
    assert sources.survey(f"{base}/set").fingerprint != first
    with pytest.raises(UserError, match="nothing at"):
        sources.check(f"{base}/nowhere")
    with pytest.raises(UserError, match="cannot be listed"):
        sources.check("unknown-scheme://x/y")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_fraction": 1.0}, "ingest.eval_fraction=1.0 .* 0.9999"),
        ({"eval_fraction": 0.0}, "ingest.eval_fraction=0.0 .* 0.0001"),
        ({"max_bad_fraction": 1.5}, "ingest.max_bad_fraction=1.5 .* 1$"),
        ({"min_side": 0}, "ingest.min_side=0 .* 1"),
        ({"max_pixels": 10**9}, "ingest.max_pixels=1000000000 .* 178956970"),
        ({"shard_mb": 0.0}, "ingest.shard_mb=0.0 .* 0.001"),
    ],
)
def test_impossible_limits_are_refused_with_the_nearest_valid_value(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(IngestConfig(**values))


def test_a_configuration_survives_its_way_through_tfx() -> None:
    config = IngestConfig(max_pixels=12345, labels=Labels.none, label_key="x/ü")
    assert from_json(to_json(config)) == config
    validate(config)
