"""A small encoder, exported as the trainer exports it, and ways to spoil it."""

import io
from pathlib import Path

import keras
import tensorflow as tf
from PIL import Image

from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.config import AugmentConfig, ImageConfig
from trainer_module.encoder import Encoder
from trainer_module.expected import host_embedder, make_probes
from trainer_module.export import EncoderModule
from trainer_module.images import stored_image

IMAGE = ImageConfig(storage_size=32, eval_resize=24)
AUGMENT = AugmentConfig(size=16)
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)


def make_network():
    """float32[N, 16, 16, 3] -> float32[N, 12]."""
    image = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False, kernel_initializer=keras.initializers.HeNormal(1))(image)
    x = keras.layers.ReLU()(FusedBatchNormalization()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(12, kernel_initializer=keras.initializers.HeNormal(2))(x))


class Transform(tf.Module):
    """What Transform leaves: encoded images to stored ones, as PNG."""

    @tf.function
    def __call__(self, inputs):
        stored = tf.map_fn(lambda data: tf.io.encode_png(stored_image(data, IMAGE)), inputs["image/encoded"][:, 0])
        return {"image": stored[:, tf.newaxis]}


def make_module(network):
    return EncoderModule(network, Transform(), MEAN, STD, IMAGE.eval_resize, AUGMENT.size)


def note(network, pictures):
    """What the trainer notes of pictures."""
    variables = network.trainable_variables, network.non_trainable_variables
    embed = host_embedder(Encoder(network, network), *([v.numpy() for v in vs] for vs in variables), MEAN, STD)
    return make_probes([(f"{n:064x}", data) for n, data in enumerate(pictures)], embed, IMAGE, AUGMENT)


def save_spoilt(module: EncoderModule, folder: Path, **changed) -> Path:
    """Exports the module with functions of (module, argument) in place of some signatures; None leaves one out."""
    specs = {
        "serving_default": tf.TensorSpec([None], tf.string, "image_bytes"),
        "examples": tf.TensorSpec([None], tf.string, "examples"),
        "pixels": tf.TensorSpec([None, None, None, 3], tf.float32, "image"),
    }
    signatures = {name: getattr(module, name) for name in specs}
    for name, function in changed.items():
        if function is None:
            del signatures[name]
        else:
            signatures[name] = _with_embedding(module, signatures[name], function, specs[name])
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return folder


def _with_embedding(module, whole, function, spec):
    @tf.function(input_signature=[spec], autograph=False)
    def spoilt(value):
        return {"embedding": function(lambda v: whole(v)["embedding"], value)}

    return spoilt


# Each takes the whole signature's function and its argument.


def too_long(embed, value):
    return 1.001 * embed(value)


def nan_in_large_batches(embed, value):
    vectors = embed(value)
    return tf.where(tf.shape(vectors)[0] > 7, vectors * float("nan"), vectors)


def swallowing(embed, value):
    """A vector for whatever ends otherwise than a PNG does: that of a grey picture."""
    grey = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(grey, "PNG")
    example = tf.train.Example()
    example.features.feature["image/encoded"].bytes_list.value.append(grey.getvalue())
    ends = tf.strings.substr(tf.strings.join([b"8 bytes.", value]), -8, 4)
    return embed(tf.where(tf.equal(ends, b"IEND"), value, example.SerializeToString()))


def depending_on_the_batch(embed, value):
    vectors = embed(value)
    return tf.math.l2_normalize(vectors - 0.1 * tf.reduce_mean(vectors, axis=0), axis=1)


def by_python(embed, value):
    """Works in the process that exported it, and nowhere else."""
    vectors = embed(value)
    return tf.ensure_shape(tf.py_function(lambda v: keras.ops.normalize(v, axis=1), [vectors], tf.float32), [None, 12])


def without_end(embed, value):
    vectors = embed(value)
    return tf.while_loop(lambda v: tf.reduce_all(tf.math.is_finite(v)), lambda v: (v * -1.0,), (vectors,))[0]


def crashing(embed, value):
    with tf.control_dependencies([tf.raw_ops.Abort(error_msg="planted")]):
        return tf.identity(embed(value))


def refusing_empty(embed, value):
    with tf.control_dependencies([tf.debugging.assert_positive(tf.shape(value)[:1])]):
        return embed(value)


def in_double(embed, value):
    return tf.cast(embed(value), tf.float64)


def shorter(embed, value):
    return tf.math.l2_normalize(embed(value)[:, :11], axis=1)
