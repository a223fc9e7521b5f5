"""Online kNN on a sample of real images, by the encoder's backbone under one and several replicas."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer_module.config import SampleConfig, WatchConfig
from trainer_module.encoder import Encoder
from trainer_module.errors import UserError
from trainer_module.knn import knn_top1, unit
from trainer_module.online_knn import OnlineKnn, backbone_embedder, make_online_knn, open_sample
from trainer_module.progress import LOGGER_NAME
from trainer_module.strategy import make_strategy

SIZE = 16
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 55.0)
CONFIG = WatchConfig(knn_epochs=1, knn_k=5)


@pytest.fixture(scope="module")
def pictures(sample_images: dict[str, list[bytes]]) -> list[tuple[bytes, np.ndarray, bytes]]:
    """Id, pixels and label of 80 pictures."""
    rows = []
    for label in list(sample_images)[:4]:
        for data in sample_images[label][:20]:
            image = tf.image.resize(tf.io.decode_png(data, channels=3), [SIZE, SIZE], antialias=True)
            rows.append((hashlib.sha256(data).hexdigest().encode(), np.uint8(image), label.encode()))
    return rows


def write(root: Path, rows: list[tuple[bytes, np.ndarray, bytes]], shards: int) -> str:
    """A ViewAugmenter output with the sample alone; returns its train split."""
    entries = []
    (root / "watch").mkdir(parents=True)
    for split, of_split in (("train", rows[::2] + rows[1::4]), ("eval", rows[3::4])):
        for n in range(shards):
            path = root / "watch" / f"{split}-{n:05d}.tfrecord"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for identity, image, label in of_split[n::shards]:
                    features = {"id": identity, "image": image.tobytes(), "label": label}
                    lists = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])) for k, v in features.items()}
                    writer.write(tf.train.Example(features=tf.train.Features(feature=lists)).SerializeToString())
            entries.append({"split": split, "name": f"watch/{path.name}", "bytes": path.stat().st_size})
    (root / "views.json").write_text(json.dumps({"size": SIZE, "watch": entries}))
    return str(root / "Split-train")


def pixels(images: np.ndarray) -> np.ndarray:
    return unit(images.reshape(len(images), -1))


@pytest.fixture(scope="module")
def encoder(tiny_encoder) -> Encoder:
    """The tiny encoder, whose backbone ends before its dense layer, with statistics that inference can tell."""
    own = keras.models.clone_model(tiny_encoder)
    own.layers[2].moving_mean.assign(0.3 + tf.range(8.0) / 10)
    return Encoder(own, keras.Model(own.input, own.layers[-2].output))


def embedder(encoder: Encoder, replicas: int):
    strategy = make_strategy(replicas)
    with strategy.scope():
        query, stats = (
            [tf.Variable(v.value, synchronization=tf.VariableSynchronization.ON_READ, trainable=False,
                         aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA) for v in variables]
            for variables in (encoder.model.trainable_variables, encoder.model.non_trainable_variables)
        )  # fmt: skip
    return backbone_embedder(strategy, encoder, query, stats, MEAN, STD), query


@pytest.mark.parametrize("replicas", [1, 2])
def test_features_are_the_backbones_in_inference_mode(encoder, pictures, replicas: int):
    embed, _ = embedder(encoder, replicas)
    images = np.stack([image for _, image, _ in pictures])
    expected = encoder.backbone((images.astype(np.float32) - MEAN) / STD, training=False).numpy()
    np.testing.assert_allclose(embed(images), unit(expected), atol=1e-5)
    np.testing.assert_allclose(embed(images[:3]), unit(expected[:3]), atol=1e-5)


def test_features_are_of_the_present_weights(encoder, pictures):
    embed, query = embedder(encoder, 2)
    images = np.stack([image for _, image, _ in pictures[:8]])
    before = embed(images)
    query[0].assign(-query[0])
    assert np.abs(embed(images) - before).max() > 1e-3


def test_the_score_is_that_of_the_evaluators_knn(pictures, tmp_path: Path):
    sample = open_sample(write(tmp_path, pictures, 1))
    ordered = [sorted(rows) for rows in (pictures[::2] + pictures[1::4], pictures[3::4])]
    (bank, bank_labels), (queries, query_labels) = (
        (pixels(np.stack([r[1] for r in rows])), np.unique([r[2] for r in pictures]).searchsorted([r[2] for r in rows]))
        for rows in ordered
    )
    expected = knn_top1(bank, bank_labels, queries, query_labels, 5, 0.1)
    assert OnlineKnn(sample, pixels, CONFIG)() == expected
    assert 0.3 < expected < 1


def test_the_score_does_not_depend_on_the_shards(pictures, tmp_path: Path):
    scores = {
        OnlineKnn(open_sample(write(tmp_path / str(shards), pictures, shards)), pixels, CONFIG)()
        for shards in (1, 3, 7)
    }
    assert len(scores) == 1


def test_only_the_wanted_number_of_lowest_hashes_is_looked_at(pictures, tmp_path: Path):
    sample = open_sample(write(tmp_path, pictures, 3))
    wanted = WatchConfig(knn_k=1, sample=SampleConfig(bank=6, queries=4))
    bank, queries = sorted(pictures[::2] + pictures[1::4])[:6], sorted(pictures[3::4])[:4]
    names = np.unique([label for _, _, label in pictures])
    (x, y), (u, v) = (
        (pixels(np.stack([image for _, image, _ in rows])), names.searchsorted([label for _, _, label in rows]))
        for rows in (bank, queries)
    )
    assert OnlineKnn(sample, pixels, wanted)() == knn_top1(x, y, u, v, 1, 0.1)


def test_features_that_are_not_finite_give_no_score(pictures, tmp_path: Path):
    sample = open_sample(write(tmp_path, pictures, 1))
    assert np.isnan(OnlineKnn(sample, lambda images: np.full((len(images), 4), np.nan, np.float32), CONFIG)())


@pytest.mark.parametrize("kept", [[], ["train"], ["eval"]])
def test_without_labelled_images_in_both_splits_it_is_left_out_and_said(
    pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: list[str]
):
    folder = write(tmp_path, pictures, 1)
    manifest = json.loads((tmp_path / "views.json").read_text())
    manifest["watch"] = [entry for entry in manifest["watch"] if entry["split"] in kept]
    (tmp_path / "views.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        assert make_online_knn(folder, CONFIG, pixels) is None
    assert [r.note for r in caplog.records] == ["online kNN is left out: it needs labelled images in both splits"]


def test_zero_epochs_asks_for_nothing(tmp_path: Path):
    assert make_online_knn(str(tmp_path / "none"), WatchConfig(knn_epochs=0), pixels) is None


def test_a_missing_or_truncated_file_is_named(pictures, tmp_path: Path):
    folder = write(tmp_path / "a", pictures, 2)
    path = tmp_path / "a" / "watch" / "eval-00001.tfrecord"
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"eval-00001.tfrecord has \d+ bytes instead of \d+: delete"):
        open_sample(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"eval-00001.tfrecord has 0 bytes"):
        open_sample(folder)
    path.write_bytes(data[:-9] + b"scribbled")
    with pytest.raises(UserError, match=r"images of the online kNN in .*watch are damaged"):
        OnlineKnn(open_sample(folder), pixels, CONFIG)()
    shutil.rmtree(tmp_path / "a")
