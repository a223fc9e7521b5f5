"""The sample of images: the same for the same images, bounded, and embedded by the export itself."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from components.model_card import sample

SHARDS, IN_EACH = 4, 5


def record(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (number, 0, 0)).save(file, "PNG")
    example = tf.train.Example()
    features = {"image/encoded": file.getvalue(), "image/sha256": hashlib.sha256(b"%d" % number).hexdigest().encode()}
    if number % 2:
        features["image/label"] = f"büro {number}".encode()
    for name, value in features.items():
        example.features.feature[name].bytes_list.value.append(value)
    return example.SerializeToString()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("split")
    for shard in range(SHARDS):
        with tf.io.TFRecordWriter(str(folder / f"images-{shard:05d}-of-{SHARDS:05d}.tfrecord")) as writer:
            for number in range(shard * IN_EACH, (shard + 1) * IN_EACH):
                writer.write(record(number))
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> sample.Encoder:
    """An export that embeds an image as its redness, and a red of 3 as no number."""

    class Export(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
        def examples(self, examples):
            parsed = tf.io.parse_example(examples, {"image/encoded": tf.io.FixedLenFeature([], tf.string)})
            red = tf.map_fn(
                lambda png: tf.cast(tf.io.decode_png(png)[0, 0, 0], tf.float32),
                parsed["image/encoded"],
                fn_output_signature=tf.TensorSpec([], tf.float32),
            )
            return {"embedding": tf.stack([tf.where(red == 3.0, np.nan, red), tf.ones_like(red)], axis=1)}

    path = str(tmp_path_factory.mktemp("model"))
    export = Export()
    tf.saved_model.save(export, path, signatures={"examples": export.examples})
    return sample.Encoder(path)


def hashed(number: int) -> bytes:
    return hashlib.sha256(b"model card" + hashlib.sha256(b"%d" % number).hexdigest().encode()).digest()


def test_all_images_come_in_the_order_of_their_hashes_with_what_belongs_to_them(folder, encoder):
    split = sample.read(sample.choose(folder, 1000), encoder, side=12)
    numbers = sorted((n for n in range(SHARDS * IN_EACH) if n != 3), key=hashed)
    assert split.embedding[:, 0].tolist() == numbers
    assert split.labels == tuple(f"büro {n}" if n % 2 else None for n in numbers)
    assert [image.getpixel((0, 0))[0] for image in split.thumbnails] == numbers
    assert {image.size for image in split.thumbnails} == {(12, 8)}
    assert split.dropped == 1


def test_a_limit_takes_the_smallest_hashes_of_as_few_shards_as_are_needed(folder):
    places = sample.choose(folder, 7)
    assert {Path(place.path).name[7:12] for place in places} <= {"00000", "00001"}
    assert [place.rank for place in places] == sorted(map(hashed, range(2 * IN_EACH)))[:7]
    assert sample.choose(folder, 0) == []


def test_images_that_must_not_be_shown_are_not_kept(folder, encoder):
    split = sample.read(sample.choose(folder, 4), encoder, side=None)
    assert split.thumbnails == ()
    assert len(split.embedding) + split.dropped == 4


def test_no_images_are_a_sample_of_the_right_width(encoder, tmp_path):
    split = sample.read(sample.choose(str(tmp_path), 10), encoder, side=12)
    assert split.embedding.shape == (0, 2)


def test_more_images_than_are_held_at_a_time_are_all_embedded(folder, encoder, monkeypatch):
    whole = sample.read(sample.choose(folder, 1000), encoder, side=None)
    monkeypatch.setattr(sample, "_BATCH", 3)
    assert np.array_equal(sample.read(sample.choose(folder, 1000), encoder, side=None).embedding, whole.embedding)
