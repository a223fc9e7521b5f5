"""Any Keras model as an encoder: weights from the seed, no noise, no scaling of its own, a pure step; refusals."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.build import build
from trainer_module.config import EncoderConfig, Head, KeyBnConfig, KeyBnMode, Precision, TrainConfig
from trainer_module.encoder import build_encoder
from trainer_module.errors import UserError
from trainer_module.torch_weights import load_initial_weights, torch_tensors, write_tensors

SIZE = 32


def noisy(input_shape, include_top=True, weights="imagenet", include_preprocessing=True):
    """A model with all that an encoder must not have: a top, pretrained weights, scaling, dropout, random weights."""
    assert weights is None
    image = keras.Input(input_shape)
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 4.0, 4.0])(x)
    x = keras.layers.SeparableConv2D(6, 3, strides=2)(x)
    x = keras.layers.BatchNormalization(scale=False, momentum=0.7, epsilon=1e-3)(x)
    x = keras.layers.Dropout(0.5)(keras.layers.ReLU()(x))
    x = keras.layers.GaussianNoise(0.9)(keras.layers.Conv2D(8, 1)(x))
    return keras.Model(image, keras.layers.Dense(10)(x) if include_top else x)


def pooled(input_shape):
    image = keras.Input(input_shape)
    return keras.Model(image, keras.layers.Dense(5)(keras.layers.Flatten()(image)))


def flat_norm(input_shape):
    image = keras.Input(input_shape)
    return keras.Model(image, keras.layers.BatchNormalization()(keras.layers.Flatten()(image)))


def cropping(input_shape):
    image = keras.Input(input_shape)
    return keras.Model(image, keras.layers.Conv2D(4, 1)(keras.layers.RandomCrop(8, 8)(image)))


def sequence(input_shape):
    image = keras.Input(input_shape)
    return keras.Model(image, keras.layers.Reshape((SIZE, SIZE * 3))(image))


def no_model(input_shape):
    return str(input_shape)


def subclassed(input_shape):
    class Own(keras.Model):
        def call(self, x):
            return x

    return Own()


def encoder_of(function, seed=0, precision=Precision.float32, **kwargs):
    return build_encoder(EncoderConfig(name_of(function), dim=4), SIZE, precision, seed, **kwargs)


def name_of(function):
    return function if isinstance(function, str) else f"{__name__}.{function.__name__}"


def call(encoder, x, training):
    model = encoder.model
    return model.stateless_call(
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
        tf.constant(x),
        training=training,
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, SIZE, SIZE, 3)).astype("float32")


def test_same_seed_gives_same_weights_and_names_whatever_was_built_before():
    first = encoder_of(noisy, 1)
    keras.layers.Conv2D(1, 1)
    again, other = encoder_of(noisy, 1), encoder_of(noisy, 2)
    assert [v.path for v in first.model.variables] == [v.path for v in again.model.variables]
    for a, b in zip(first.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(first.model.get_weights()[0] != other.model.get_weights()[0])


def test_neither_noise_nor_scaling_nor_top_is_left(images):
    encoder = encoder_of(noisy)
    assert encoder.backbone.output_shape == (None, 8)
    assert {v.dtype for v in encoder.model.variables} == {"float32"}
    a, stats = call(encoder, images, training=True)
    b, _ = call(encoder, images, training=True)
    np.testing.assert_array_equal(a, b)
    x = encoder.model.get_layer("separable_conv2d_1")(images)
    mean = np.mean(x, axis=(0, 1, 2))
    np.testing.assert_allclose(stats[0], 0.3 * mean, rtol=1e-4, atol=1e-6)  # of the images as they came, momentum 0.7


def test_its_batch_normalisation_is_made_by_the_given_factory():
    made = []

    def factory(**kwargs):
        made.append(kwargs)
        return FusedBatchNormalization(**kwargs)

    encoder_of(noisy, batch_norm=factory)
    assert made == [{"name": "batch_normalization_1", "dtype": "float32", "momentum": 0.7, "epsilon": 1e-3}]


def test_a_model_that_pools_by_itself_is_taken_as_it_is(images):
    encoder = encoder_of(pooled)
    assert encoder.backbone.output_shape == (None, 5)
    assert call(encoder, images, training=True)[0].shape == (6, 4)


@pytest.mark.parametrize(
    ("name", "dim", "precision"),
    [
        ("MobileNetV3Small", 576, Precision.float32),
        ("MobileNetV3Small", 576, Precision.bfloat16),
        ("EfficientNetV2B0", 1280, Precision.float32),
    ],
)
def test_a_model_of_keras_applications_is_an_encoder_with_our_head(images, name, dim, precision):
    encoder = encoder_of(f"keras.applications.{name}", precision=precision)
    assert encoder.backbone.output_shape == (None, dim)
    assert [layer.name for layer in encoder.model.layers][-3:] == ["fc.0", "fc.1", "fc.2"]
    out, stats = call(encoder, images, training=True)
    assert (out.dtype, {s.dtype for s in stats}) == (tf.float32, {tf.float32})
    assert {v.dtype for v in encoder.model.variables} == {"float32"}
    assert np.all(np.isfinite(out))


def test_its_weights_are_written_and_read_by_its_own_names(tmp_path, images):
    one, other = encoder_of(noisy, 1), encoder_of(noisy, 2)
    path = str(tmp_path / "noisy.safetensors")
    write_tensors(path, torch_tensors((v.path, np.array(v)) for v in one.model.variables))
    load_initial_weights(other, path)
    np.testing.assert_array_equal(call(one, images, False)[0], call(other, images, False)[0])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            "keras.applications.EfficientNetV2B9",
            ["cannot be imported", "did you mean keras.applications.EfficientNetV2B"],
        ),
        ("keras.aplications.MobileNet", ["cannot be imported", "did you mean keras.applications.MobileNet?"]),
        ("nowhere.at.all", ["cannot be imported", "nowhere"]),
        ("keras.applications", ["is no function that takes input_shape"]),
        ("keras.applications.mobilenet", ["is no function", "did you mean keras.applications.MobileNet?"]),
        ("os.getcwd", ["is no function that takes input_shape"]),
        ("keras.applications.InceptionV3", ["cannot take augment.size=32", "75"]),
        (no_model, ["returns no functional keras.Model"]),
        (subclassed, ["returns no functional keras.Model"]),
        (sequence, ["its output is [N, 32, 96]"]),
        (flat_norm, ["normalises axis -1 of [N, 3072]"]),
        (cropping, ["random state"]),
    ],
)
def test_what_cannot_be_an_encoder_is_refused_in_one_line(function, words):
    with pytest.raises(UserError) as caught:
        build_encoder(EncoderConfig(name_of(function), head=Head.v1), SIZE, Precision.float32, 0)
    text = str(caught.value)
    assert text.startswith(f"encoder.name={name_of(function)}")
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text


def test_statistics_that_an_encoder_does_not_have_cannot_be_stored():
    config = TrainConfig(queue=64, global_batch=8, key_bn=KeyBnConfig(KeyBnMode.stored))
    encoder = EncoderConfig("keras.applications.VGG16", dim=8)
    with pytest.raises(UserError, match=r"mode=stored .* encoder.name=keras.applications.VGG16 has none; e.g. "):
        build(encoder, config, 32, (0.0,) * 3, (1.0,) * 3, lambda step: step, 0)
