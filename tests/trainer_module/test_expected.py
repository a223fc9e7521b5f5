"""The embeddings that the trainer notes for whoever checks what is published."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer_module.config import AugmentConfig, ImageConfig
from trainer_module.encoder import Encoder
from trainer_module.errors import UserError
from trainer_module.expected import host_embedder, read_expected, write_expected
from trainer_module.images import centre_view, stored_image

IMAGE, AUGMENT = ImageConfig(storage_size=32, eval_resize=20), AugmentConfig(size=16)
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 55.0)


@pytest.fixture(scope="module")
def encoder(tiny_encoder) -> Encoder:
    return Encoder(tiny_encoder, keras.Model(tiny_encoder.input, tiny_encoder.layers[-2].output))


@pytest.fixture(scope="module")
def pictures(sample_images) -> list[tuple[str, bytes]]:
    return [(f"{n:064x}", sample_images[label][n]) for n, label in enumerate(sorted(sample_images))] * 2


@pytest.fixture
def split_dir(tmp_path: Path, pictures) -> str:
    """A ViewAugmenter output with probes, and with a file of the online kNN's sample, which is none."""
    (tmp_path / "watch").mkdir()
    path = tmp_path / "watch" / "probe-00000-of-00001.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for identity, data in pictures:
            example = tf.train.Example()
            example.features.feature["id"].bytes_list.value.append(identity.encode())
            example.features.feature["encoded"].bytes_list.value.append(data)
            writer.write(example.SerializeToString())
    probe = {"split": "probe", "name": f"watch/{path.name}", "bytes": path.stat().st_size}
    other = {"split": "eval", "name": "watch/gone", "bytes": 1}
    (tmp_path / "views.json").write_text(json.dumps({"watch": [other, probe]}))
    return str(tmp_path / "Split-train")


@pytest.fixture
def weights(encoder):
    """Of a training state; the Keras model's own are others."""
    rng = np.random.default_rng(5)
    variables = encoder.model.trainable_variables, encoder.model.non_trainable_variables
    return [[rng.uniform(0.1, 0.9, v.shape).astype(np.float32) for v in vs] for vs in variables]


def test_the_embeddings_are_those_of_the_training_state_and_come_back_as_they_were(
    encoder, weights, pictures, split_dir, tmp_path
):
    path = str(tmp_path / "expected.tfrecord")
    write_expected(split_dir, host_embedder(encoder, *weights, MEAN, STD), IMAGE, AUGMENT, path)
    model = keras.models.clone_model(encoder.model)
    for variables, values in zip((model.trainable_variables, model.non_trainable_variables), weights, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    backbone = keras.Model(model.input, model.layers[-2].output)
    probes = read_expected(path)
    assert [(probe.id, probe.encoded) for probe in probes] == pictures
    for probe in probes[::5]:
        stored = stored_image(tf.constant(probe.encoded), IMAGE)
        for pixels, found in ((stored, probe.embedding), (probe.square, probe.square_embedding)):
            view = centre_view(pixels, IMAGE.eval_resize, AUGMENT.size)
            features = backbone((view[tf.newaxis] - MEAN) / STD, training=False).numpy()[0]
            np.testing.assert_allclose(found, features / np.linalg.norm(features), rtol=0, atol=1e-6)
        assert probe.square.shape == (32, 32, 3)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_note_is_said_in_one_line(encoder, weights, split_dir, tmp_path, damage):
    path = tmp_path / "expected.tfrecord"
    write_expected(split_dir, host_embedder(encoder, *weights, MEAN, STD), IMAGE, AUGMENT, str(path))
    path.write_bytes(path.read_bytes()[:-7]) if damage == "cut" else path.unlink()
    with pytest.raises(UserError, match=r"is missing or damaged: delete .* and run again"):
        read_expected(str(path))


def test_probes_that_are_not_as_they_were_written_are_refused(encoder, weights, split_dir, tmp_path):
    (path,) = (tmp_path / "watch").iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="run again to make it again"):
        write_expected(split_dir, host_embedder(encoder, *weights, MEAN, STD), IMAGE, AUGMENT, str(tmp_path / "x"))
