"""A tiny model with the signature of a published encoder."""

import numpy as np
import tensorflow as tf

D = 5


class Colours(tf.Module):
    """Embeds an image as D fixed mixtures of its mean colour, of unit length; refuses an image of 9 pixels width."""

    def __init__(self, seed: int = 0):
        mixture = np.random.default_rng(seed).normal(size=(3, D)).astype(np.float32)
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
