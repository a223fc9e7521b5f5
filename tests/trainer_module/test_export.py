"""The evaluation export: two views of what is held out, by the encoders that are judged, from a real SavedModel."""

import hashlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer_module.config import AugmentConfig, ImageConfig
from trainer_module.export import EncoderModule, EvaluationModule, save_evaluation
from trainer_module.images import stored_image
from trainer_module.views import view_pair

AUGMENT = AugmentConfig(size=24)
STORED = ImageConfig(storage_size=32)
MEAN, STD = (120.0, 115.0, 105.0), (58.0, 57.0, 57.0)


class Transform(tf.Module):
    """Stands where the Transform graph does: encoded images to stored ones."""

    def __call__(self, features):
        encoded = tf.reshape(features["image/encoded"], [-1])
        stored = tf.map_fn(lambda one: tf.io.encode_png(stored_image(one, STORED)), encoded)
        return {"image": stored[:, tf.newaxis]}


def exported(backbone: keras.Model) -> EncoderModule:
    return EncoderModule(backbone, Transform(), MEAN, STD, 28, AUGMENT.size)


@pytest.fixture(scope="module")
def trained(tiny_encoder) -> EncoderModule:
    return exported(tiny_encoder)


@pytest.fixture(scope="module")
def export(tiny_encoder, trained, tmp_path_factory):
    other = keras.models.clone_model(tiny_encoder)
    other.set_weights([weights[..., ::-1] for weights in tiny_encoder.get_weights()])
    folder = str(tmp_path_factory.mktemp("evaluation"))
    save_evaluation(EvaluationModule(trained, exported(other), AUGMENT, "leak at step 3"), folder)
    return tf.saved_model.load(folder).signatures["evaluate"]


def example(data: bytes, split: str) -> bytes:
    one = tf.train.Example()
    for name, value in {
        "image/encoded": data,
        "image/sha256": hashlib.sha256(data).hexdigest().encode(),
        "image/split": split.encode(),
    }.items():
        one.features.feature[name].bytes_list.value.append(value)
    return one.SerializeToString()


def evaluate(export, examples: list[bytes]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in export(tf.constant(examples, tf.string)).items()}


def test_views_are_made_of_held_out_images_alone_from_their_hash(export, trained, sample_images):
    pictures = sample_images["food"][:4]
    outputs = evaluate(export, [example(data, "train" if row % 2 else "eval") for row, data in enumerate(pictures)])
    for row, data in enumerate(pictures):
        views = outputs["embedding_views"][row]
        if row % 2:
            assert not views.any()
            assert not outputs["pixels_views"][row].any()
            continue
        sha = hashlib.sha256(data).hexdigest()
        pair = view_pair(stored_image(data, STORED), tf.constant(sha), tf.constant(0, tf.int64), 0, AUGMENT)
        wanted = trained.embed_views(tf.cast(pair, tf.float32)).numpy()
        np.testing.assert_allclose(views, wanted, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(views, axis=1), 1.0, atol=1e-5)
        assert np.abs(views[0] - views[1]).max() > 1e-4
    wanted = trained.serving_default(tf.constant(pictures))["embedding"]
    np.testing.assert_allclose(outputs["embedding"], wanted, atol=1e-5)
    assert not np.allclose(outputs["untrained_embedding"], outputs["embedding"], atol=1e-2)


def test_an_image_has_the_same_outputs_in_any_batch(export, sample_images):
    examples = [example(data, "eval") for data in sample_images["flags"][:3]]
    together = evaluate(export, examples)
    for row, one in enumerate(examples):
        for name, values in evaluate(export, [one]).items():
            if name != "leak":
                np.testing.assert_allclose(values[0], together[name][row], atol=1e-5, err_msg=name)


def test_a_batch_without_held_out_images_and_an_empty_one_have_outputs_of_the_right_shapes(export, sample_images):
    for examples in ([example(sample_images["food"][0], "train")], []):
        outputs = evaluate(export, examples)
        width = outputs["embedding"].shape[1]
        assert outputs["embedding_views"].shape == (len(examples), 2, width)
        assert outputs["pixels_views"].shape == (len(examples), 2, 3072)


def test_every_image_tells_of_the_leak_alarm(export, sample_images):
    assert list(evaluate(export, [example(sample_images["food"][0], "train")])["leak"]) == [b"leak at step 3"]
