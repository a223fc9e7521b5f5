"""./moco embed: one row for each image of a source, whatever the image, through a real SavedModel."""

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import faulty_storage
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from components.pusher import publish
from pipeline.embed import Encoder, Summary, embed, load_encoder
from trainer_module.errors import UserError

D = 5


class Colours(tf.Module):
    """Embeds an image as D fixed mixtures of its mean colour, of unit length; refuses an image of 9 pixels width."""

    def __init__(self):
        mixture = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)
        self.mixture = tf.Variable(mixture)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serving_default(self, image_bytes):
        means = tf.map_fn(self.mean, image_bytes, fn_output_signature=tf.TensorSpec([3], tf.float32))
        return {"embedding": tf.math.l2_normalize(means @ self.mixture, axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def other(self, x):
        return {"y": x}

    def mean(self, encoded):
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        tf.debugging.assert_none_equal(tf.shape(image)[1], 9, message="nine is refused")
        return tf.reduce_mean(tf.cast(image, tf.float32), [0, 1]) / 255 + 1e-3

    def expected(self, encoded: bytes) -> np.ndarray:
        vector = self.mean(encoded).numpy() @ self.mixture.numpy()
        return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def colours() -> Colours:
    return Colours()


@pytest.fixture(scope="module")
def pushed(colours, tmp_path_factory) -> Path:
    """A folder of versions: 7 is the newest complete one; 12 lacks its variables and 30 its graph."""
    folder = tmp_path_factory.mktemp("models")
    tf.saved_model.save(colours, str(folder / "7"), signatures={"serving_default": colours.serving_default})
    shutil.copytree(folder / "7", folder / "3")
    shutil.copytree(folder / "7", folder / "12")
    (folder / "12" / "variables" / "variables.index").unlink()
    (folder / "30" / "variables").mkdir(parents=True)
    (folder / ".pushing-99").mkdir()
    return folder


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


def test_images_that_are_all_bad_still_give_their_rows(tmp_path, pushed):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    for name in ("out.npz", "out.parquet"):
        assert embed(str(pushed), str(tmp_path / "bad"), str(tmp_path / name)).errors == 1
        assert read(tmp_path / name)["a.png"]["embedding"] is None
    assert np.load(tmp_path / "out.npz")["embedding"].shape == (1, D)


def test_the_file_appears_when_it_is_whole_and_not_before(tmp_path, pushed, source, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.parquet").write_text("the old one")
    calls = []

    def fail_at_the_second(_, encoded):
        calls.append(len(encoded))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [np.zeros(D, np.float32)] * len(encoded)

    monkeypatch.setattr(Encoder, "__call__", fail_at_the_second)
    for name in ("a.parquet", "b.npz"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            embed(str(pushed), str(source), str(out / name), batch=3)
    assert os.listdir(out) == ["a.parquet"]
    assert (out / "a.parquet").read_text() == "the old one"


def test_the_summary_is_one_line():
    assert (
        str(Summary(2226, 3, 128, 511.6, "x.parquet"))
        == "embedded 2,226 images (3 errors) to x.parquet, 128-d, 512 images/s"
    )
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
    for out, reason in {
        "out.csv": "must end in .npz or .parquet",
        "out": "must end in",
        "nowhere/out.npz": "does not exist",
        "folder.npz": "is a folder",
    }.items():
        with pytest.raises(UserError, match=reason):
            embed(str(pushed), str(source), str(tmp_path / out))
    with pytest.raises(UserError, match="on this machine"):
        embed(str(pushed), str(source), "gs://bucket/out.npz")


def test_a_batch_of_none_and_a_source_without_images_are_refused(tmp_path, pushed, source):
    with pytest.raises(UserError, match="--batch 0"):
        embed(str(pushed), str(source), str(tmp_path / "out.npz"), batch=0)
    with pytest.raises(UserError, match="nowhere"):
        embed(str(pushed), str(tmp_path / "nowhere"), str(tmp_path / "out.npz"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("none of ours")
    with pytest.raises(UserError, match="no images"):
        embed(str(pushed), str(tmp_path / "texts"), str(tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()
