"""./moco embed: one row for each image of a source, whatever the image, through a real SavedModel."""

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import faulty_storage
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from colours import D
from PIL import Image

from components.image_example_gen import codec
from components.pusher import publish
from pipeline import cli
from pipeline.embed import Summary, embed, load_encoder
from pipeline.embedding.index import open_index
from pipeline.embedding.table import About
from trainer_module.errors import UserError


@pytest.fixture(scope="module")
def pictures(sample_images) -> list[bytes]:
    return sample_images["flags"][:7]


@pytest.fixture
def source(tmp_path: Path, pictures) -> Path:
    """A folder of 7 pictures, a duplicate, three that cannot be used, one that the model refuses, and a stranger."""
    folder = tmp_path / "source"
    (folder / "flags").mkdir(parents=True)
    for number, data in enumerate(pictures):
        (folder / "flags" / f"{number}.png").write_bytes(data)
    (folder / "flags" / "twin of 0 é.png").write_bytes(pictures[0])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"no image")
    (folder / "torn.png").write_bytes(pictures[1][: len(pictures[1]) // 2])
    nine = tf.io.encode_png(tf.zeros([9, 9, 3], tf.uint8)).numpy()
    (folder / "nine.png").write_bytes(nine)
    (folder / "readme.txt").write_text("none of ours")
    return folder


def read(path: Path) -> dict[str, dict]:
    """The rows of either format by path, as {sha256, embedding, error} with None where there is nothing."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        return {row.pop("path"): row for row in rows}
    arrays = np.load(path)
    assert arrays["embedding"].dtype == np.float32
    rows = zip(arrays["path"], arrays["sha256"], arrays["embedding"], arrays["error"], strict=True)
    return {
        str(path): {
            "sha256": str(sha256),
            "embedding": None if np.isnan(embedding).all() else embedding,
            "error": str(error) or None,
        }
        for path, sha256, embedding, error in rows
    }


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_every_image_gets_one_row_and_a_bad_one_its_error(tmp_path, pushed, source, colours, suffix, batch):
    out = tmp_path / f"out{suffix}"
    summary = embed(str(pushed), str(source), str(out), batch)
    rows = read(out)
    assert (summary.images, summary.errors, summary.dimensions) == (12, 4, D)
    assert set(rows) == {str(path.relative_to(source)) for path in source.rglob("*.png")}
    bad = {"empty.png": "empty", "text.png": "not_an_image", "torn.png": "truncated", "nine.png": "nine is refused"}
    for name, row in rows.items():
        data = (source / name).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        if name in bad:
            assert row["embedding"] is None
            assert bad[name] in row["error"]
        else:
            assert row["error"] is None
            np.testing.assert_allclose(row["embedding"], colours.expected(data), atol=1e-6)


def test_both_formats_hold_the_same(tmp_path, pushed, source):
    files = [tmp_path / "a.npz", tmp_path / "a.parquet"]
    for file in files:
        embed(str(pushed), str(source), str(file))
    one, other = map(read, files)
    assert list(one) == list(other)
    for name, row in one.items():
        assert (row["sha256"], row["error"]) == (other[name]["sha256"], other[name]["error"])
        if row["embedding"] is not None:
            np.testing.assert_array_equal(row["embedding"], np.float32(other[name]["embedding"]))


def test_tar_shards_are_a_source_like_any_other(tmp_path, pushed, source, pictures):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(source / "flags", "flags")
    embed(str(pushed), str(tmp_path / "*.tar"), str(tmp_path / "out.npz"))
    digests = {row["sha256"] for row in read(tmp_path / "out.npz").values()}
    assert digests == {hashlib.sha256(data).hexdigest() for data in pictures}


def test_images_that_are_all_bad_still_give_their_rows(tmp_path, pushed, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    for name in ("out.npz", "out.parquet"):
        assert embed(str(pushed), str(tmp_path / "bad"), str(tmp_path / name)).errors == 1
        assert read(tmp_path / name)["a.png"]["embedding"] is None
    assert np.load(tmp_path / "out.npz")["embedding"].shape == (1, D)
    capsys.readouterr()
    out = str(tmp_path / "out.parquet")
    Path(out).unlink()
    assert cli.main(["embed", "--model", str(pushed), "--images", str(tmp_path / "bad"), "--out", out]) == 2
    said = f"moco: --images {tmp_path}/bad: none could be embedded; column 'error' of {out} says why"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert list(read(tmp_path / "out.parquet")) == ["a.png"]


def test_the_rows_are_in_the_order_of_the_names_and_of_the_archives(tmp_path, pushed, pictures):
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for name in ("z.png", "a.png", "b/1.png", "c.png", "c0.png"):
        (source / name).write_bytes(pictures[0])
    with tarfile.open(source / "b.tar", "w") as tar:
        for name in ("z/2.png", "a/1.png"):
            add(tar, name, pictures[1])
    embed(str(pushed), str(source), str(tmp_path / "out.parquet"), batch=2, shard_rows=2)
    table = pq.read_table(tmp_path / "out.parquet")
    wanted = ["a.png", "b.tar/z/2.png", "b.tar/a/1.png", "b/1.png", "c.png", "c0.png", "z.png"]
    assert table["path"].to_pylist() == wanted
    assert table["label"].to_pylist() == [None, "z", "a", "b", None, None, None]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


THREADS = ("--direct_num_workers=3", "--direct_running_mode=multi_threading")


@pytest.mark.parametrize(
    ("suffix", "runs"),
    [(".npz", [(3, ()), (1000, ())]), (".parquet", [(1, ()), (6, ()), (1000, ()), (3, THREADS)])],
)
def test_the_bytes_do_not_depend_on_shards_or_bundles(tmp_path, pushed, source, pictures, suffix, runs):
    with tarfile.open(source / "flags.tar", "w") as tar:
        for number in range(7):
            add(tar, f"{number}/x.png", pictures[number])
        add(tar, "readme", b"takes a place and gives no row")
        add(tar, "9/x.png", pictures[0])
    written = set()
    for shard_rows, arguments in runs:
        out = tmp_path / f"out{suffix}"
        embed(str(pushed), str(source), str(out), 3, arguments, shard_rows)
        written.add(out.read_bytes())
    assert len(written) == 1


FORMATS = {
    "plain.jpg": ("JPEG", "RGB", {}),
    "cmyk.jpg": ("JPEG", "CMYK", {}),
    "grey.jpg": ("JPEG", "L", {}),
    "turned.jpg": ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
    "plain.png": ("PNG", "RGB", {}),
    "alpha.png": ("PNG", "RGBA", {}),
    "palette.png": ("PNG", "P", {}),
    "wide.png": ("PNG", "I;16", {}),
    "moving.gif": ("GIF", "P", {}),
    "plain.bmp": ("BMP", "RGB", {}),
    "plain.webp": ("WEBP", "RGB", {"lossless": True}),
    "alpha.webp": ("WEBP", "RGBA", {"lossless": True}),
}


def test_every_format_gets_the_embedding_that_the_served_signature_gives_and_when_broken_an_error(tmp_path, pushed):
    source = tmp_path / "source"
    source.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (3, 4, 4), np.uint8)
    picture = Image.fromarray(pixels, "RGBA").resize((30, 20))
    whole, broken = {}, set()
    for name, (kind, mode, options) in FORMATS.items():
        image = Image.fromarray(np.full((20, 30), 40_000, np.uint16)) if mode == "I;16" else picture.convert("RGB")
        stream = io.BytesIO()
        (picture if mode == "RGBA" else image if mode == "I;16" else image.convert(mode)).save(stream, kind, **options)
        whole[name] = stream.getvalue()
        (source / name).write_bytes(whole[name])
        (source / f"torn {name}").write_bytes(whole[name][: len(whole[name]) // 2])
        broken.add(f"torn {name}")
    for name, data in {
        "empty.jpg": b"",
        "text.gif": b"no image",
        "photo.heic": b"\0\0\0\x18ftypheic" + bytes(40),
    }.items():
        (source / name).write_bytes(data)
        broken.add(name)
    embed(str(pushed), str(source), str(tmp_path / "out.parquet"))
    rows = read(tmp_path / "out.parquet")
    assert set(rows) == {*whole, *broken}
    assert {name for name, row in rows.items() if row["error"]} == broken
    signature = tf.saved_model.load(str(pushed / "7")).signatures["serving_default"]
    for name, data in whole.items():
        canonical = codec.canonical(data, codec.Limits(10**6, 8)).encoded
        served = signature(image_bytes=tf.constant([canonical]))["embedding"].numpy()[0]
        np.testing.assert_allclose(rows[name]["embedding"], served, atol=1e-5)
    # What TensorFlow reads just as it is, a client may send just as it is.
    for name in ("plain.jpg", "grey.jpg", "plain.png", "plain.bmp", "moving.gif"):
        served = signature(image_bytes=tf.constant([whole[name]]))["embedding"].numpy()[0]
        np.testing.assert_allclose(rows[name]["embedding"], served, atol=1e-5)


def test_a_file_says_what_made_it(tmp_path, pushed, source):
    for name in ("out.npz", "out.parquet"):
        embed(str(pushed), str(source), str(tmp_path / name))
        about = open_index(str(tmp_path / name)).about
        assert about == About(str(pushed / "7"), load_encoder(str(pushed / "3")).sha256, D, str(source))


def test_the_summary_is_one_line():
    assert (
        str(Summary(2226, 3, 128, 511.6, "x.parquet"))
        == "embedded 2,223 of 2,226 images (3 errors) to x.parquet, 128-d, 512 images/s"
    )
    kept = str(Summary(2226, 0, 128, 511.6, "x.parquet", 1024))
    assert kept == "embedded 2,226 images to x.parquet, 128-d, 512 images/s, 1,024 of them by an earlier start"
    assert str(Summary(1, 0, 8, 2.0, "x.npz")) == "embedded 1 images to x.npz, 8-d, 2 images/s"


# The model.


def test_the_newest_complete_version_is_taken_unless_somebody_went_back(pushed, tmp_path):
    assert publish.resolve(str(pushed)) == f"{pushed}/7"
    assert publish.resolve(f"{pushed}/") == f"{pushed}/7"
    assert publish.resolve(str(pushed / "3")) == str(pushed / "3")
    shutil.copytree(pushed, tmp_path / "pushed")
    publish.rollback(publish.place(str(tmp_path / "pushed")), "3")
    assert publish.resolve(str(tmp_path / "pushed")) == str(tmp_path / "pushed" / "3")
    assert load_encoder(str(tmp_path / "pushed")).dimensions == D


def test_a_model_on_gs_is_embedded_with_as_the_same_one_on_disk(pushed, source, tmp_path, monkeypatch):
    with faulty_storage.storage() as storage, faulty_storage.proxy(storage) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        version = publish.publish(str(pushed / "7"), publish.place("gs://models/colours"))
        embeddings = []
        for model in (str(pushed), "gs://models/colours", "gs://models/colours/", version):
            embed(model, str(source), str(tmp_path / "out.npz"))
            with np.load(tmp_path / "out.npz") as out:
                embeddings.append(out["embedding"])
        for others in embeddings[1:]:
            np.testing.assert_array_equal(others, embeddings[0])
        for missing in ("gs://models/nothing", "gs://models/colours/7"):
            with pytest.raises(UserError, match=f"^--model {missing}: ") as caught:
                load_encoder(missing)
            assert "\n" not in str(caught.value)


def test_a_model_that_is_none_is_refused(tmp_path, pushed, colours):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"\xff\xff\xff")
    (tmp_path / "half").mkdir()
    shutil.copytree(pushed / "12", tmp_path / "half" / "1")
    tf.saved_model.save(colours, str(tmp_path / "unsigned"))
    tf.saved_model.save(colours, str(tmp_path / "other"), signatures={"serving_default": colours.other})
    for name, reason in {
        "nowhere": "no such folder",
        "file": "is a file",
        "empty": "no SavedModel there",
        "broken": "cannot be loaded",
        "half": "versions 1 are incomplete",
        "unsigned": "no signature serving_default",
        "other": "takes x and returns y",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            load_encoder(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


# The rest of what is typed.


def test_an_out_that_cannot_be_written_is_refused(tmp_path, pushed, source):
    (tmp_path / "folder.npz").mkdir()
    (source / "plain.png").write_bytes(b"")
    for out, reason in {
        "out.csv": "must end in .npz or .parquet",
        "source/plain.png/": "is a file",
        "nowhere/out/": "does not exist",
        "out": "must end in",
        "nowhere/out.npz": "does not exist",
        "folder.npz": "is a folder",
    }.items():
        with pytest.raises(UserError, match=reason):
            embed(str(pushed), str(source), f"{tmp_path}/{out}")
    for out in ("gs://bucket/out.npz", "s3://bucket/out/"):
        with pytest.raises(UserError, match="on this machine"):
            embed(str(pushed), str(source), out)


def test_a_batch_of_none_and_a_source_without_images_are_refused(tmp_path, pushed, source):
    with pytest.raises(UserError, match="--batch 0"):
        embed(str(pushed), str(source), str(tmp_path / "out.npz"), batch=0)
    with pytest.raises(UserError, match="nowhere"):
        embed(str(pushed), str(tmp_path / "nowhere"), str(tmp_path / "out.npz"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("none of ours")
    with pytest.raises(UserError, match="no images"):
        embed(str(pushed), str(tmp_path / "texts"), str(tmp_path / "out.npz"))
    assert sorted(os.listdir(tmp_path)) == ["source", "texts"]


def test_a_source_with_spans_is_refused_with_the_newest(tmp_path, pushed, source):
    (tmp_path / "day").mkdir()
    for number in ("09", "10"):
        shutil.copytree(source / "flags", tmp_path / "day" / number)
    with pytest.raises(UserError, match=rf"\{{SPAN:2\}} is for './moco run'.* e.g. --images {tmp_path}/day/10$"):
        embed(str(pushed), f"{tmp_path}/day/{{SPAN:2}}", str(tmp_path / "out.npz"))
