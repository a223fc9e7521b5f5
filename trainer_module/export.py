"""What is published: the query encoder's backbone with its preprocessing, as a SavedModel in plain TensorFlow.

Signatures, all returning {"embedding": float32[N, D]} of unit length (BN in inference mode):
    serving_default(image_bytes: string[N])   encoded images
    examples(examples: string[N])             serialised tf.Example with image/encoded
    pixels(image: float32[N, H, W, 3])        values in [0, 255]
"""

import json
import posixpath
from typing import Any

import keras
import tensorflow as tf

from trainer_module.config import AugmentConfig
from trainer_module.images import centre_view, centre_views
from trainer_module.views import view_pair

ENCODED = "image/encoded"
FACTS_FILE = "assets.extra/encoder.json"  # beside the graph, where servers ignore it
_IDENTITY = "image/sha256"
_SPLIT = "image/split"
PIXEL_SIDE = 32  # of the raw-pixel features that the evaluation compares with


class EncoderModule(tf.Module):
    """Images in, unit embeddings out; holds the weights and the Transform graph."""

    def __init__(
        self,
        backbone: keras.Model,
        transform: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        resize: int,
        size: int,
    ) -> None:
        """Wraps a backbone.

        Args:
            backbone: float32[N, size, size, 3], normalised -> float32[N, D]. Its weights are copied.
            transform: trackable; maps {"image/encoded": string[N, 1]} to {"image": string[N, 1]}.
            mean, std: per channel, in the units of the pixels.
            resize: shorter side before the centre crop.
            size: side of the centre crop.
        """
        super().__init__()
        self._transform = transform
        self._parameters = [tf.Variable(v.value, name=v.path, trainable=True) for v in backbone.trainable_variables]
        self._stats = [tf.Variable(v.value, name=v.path, trainable=False) for v in backbone.non_trainable_variables]
        self._backbone = backbone
        self._mean, self._std = mean, std
        self.resize, self.size = resize, size
        # Traced once for all signatures: tracing a ResNet takes seconds.
        self.embed_views = tf.function(
            self._embed_views,
            input_signature=[tf.TensorSpec([None, size, size, 3], tf.float32, name="views")],
            autograph=False,  # it would read and rewrite the sources of Keras and TFT for seconds
        )

    # Keras layers must not be saved: whoever loads the model has TensorFlow only.
    _TF_MODULE_IGNORED_PROPERTIES = frozenset(("_backbone", *tf.Module._TF_MODULE_IGNORED_PROPERTIES))

    def _embed_views(self, views: tf.Tensor) -> tf.Tensor:
        """float32[N, size, size, 3] in [0, 255] -> unit float32[N, D]."""
        # oneDNN's convolutions refuse an empty batch, so one grey image stands in for it.
        missing = tf.cast(tf.equal(tf.shape(views)[0], 0), tf.int32)
        filled = tf.concat([views, tf.fill([missing, self.size, self.size, 3], 128.0)], axis=0)
        x = (filled - self._mean) / self._std
        stats = [tf.convert_to_tensor(v) for v in self._stats]
        features, _ = self._backbone.stateless_call(list(self._parameters), stats, x, training=False)
        return tf.math.l2_normalize(tf.cast(features, tf.float32), axis=1)[: tf.shape(views)[0]]

    def stored(self, image_bytes: tf.Tensor) -> tf.Tensor:
        """string[N] -> string[N], the stored images as PNG, through the Transform graph."""
        return tf.reshape(self._transform({ENCODED: image_bytes[:, tf.newaxis]})["image"], [-1])

    def views(self, stored: tf.Tensor) -> tf.Tensor:
        """string[N], stored images -> float32[N, size, size, 3] in [0, 255]."""
        return tf.map_fn(
            lambda png: centre_view(tf.io.decode_png(png, channels=3), self.resize, self.size),
            stored,
            fn_output_signature=tf.TensorSpec([self.size, self.size, 3]),
        )

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")], autograph=False)
    def serving_default(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Encoded images."""
        return {"embedding": self.embed_views(self.views(self.stored(image_bytes)))}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")], autograph=False)
    def examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        """Serialised tf.Examples."""
        return {"embedding": self.embed_views(self.views(self.stored(_encoded(examples))))}

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32, name="image")], autograph=False)
    def pixels(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Decoded images of one size."""
        return {"embedding": self.embed_views(centre_views(image, self.resize, self.size))}


class EvaluationModule(tf.Module):
    """The trained encoder beside the same network untrained and the raw pixels, for the Evaluator."""

    def __init__(self, trained: EncoderModule, untrained: EncoderModule, augment: AugmentConfig, leak: str) -> None:
        """Wraps two encoders that share their preprocessing.

        Args:
            trained: the encoder that is judged.
            untrained: the same network before training.
            augment: recipe of the two views of each image of the eval split; its size is the encoders'.
            leak: what the alarm of a leak through batch normalisation says at the end of training, empty if silent.
        """
        super().__init__()
        self._trained, self._untrained = trained, untrained
        self._augment, self._leak = augment, leak

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")], autograph=False)
    def evaluate(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        """Serialised tf.Examples of both splits.

        Returns:
            embedding: float32[N, D], untrained_embedding: float32[N, D], pixels: float32[N, 32 * 32 * 3].
            embedding_views, untrained_embedding_views, pixels_views: float32[N, 2, .], of two augmented views of each
                image of the eval split, drawn from the image's hash alone; zeros for other images, which saves the
                work where nothing reads it.
            leak: string[N], the same for every image.
        """
        parsed = tf.io.parse_example(
            examples, {name: tf.io.FixedLenFeature([], tf.string) for name in (ENCODED, _IDENTITY, _SPLIT)}
        )
        stored = self._trained.stored(parsed[ENCODED])
        held_out = tf.where(tf.equal(parsed[_SPLIT], "eval"))
        pairs = self._view_pairs(tf.gather_nd(stored, held_out), tf.gather_nd(parsed[_IDENTITY], held_out))
        pairs = tf.reshape(pairs, [-1, *pairs.shape[2:]])
        outputs = {}
        for name, vectors, of_pairs in zip(
            ("embedding", "untrained_embedding", "pixels"),
            self._represent(self._trained.views(stored)),
            self._represent(pairs),
            strict=True,
        ):
            count, width = tf.shape(examples, tf.int64)[0], tf.shape(vectors, tf.int64)[1]
            outputs[name] = vectors
            outputs[f"{name}_views"] = tf.scatter_nd(
                held_out, tf.reshape(of_pairs, [-1, 2, vectors.shape[1]]), tf.stack([count, 2, width])
            )
        return outputs | {"leak": tf.fill(tf.shape(examples), self._leak)}

    def _view_pairs(self, stored: tf.Tensor, identities: tf.Tensor) -> tf.Tensor:
        """string[M] each -> float32[M, 2, size, size, 3] in [0, 255]."""
        size = self._augment.size
        pairs = tf.map_fn(
            lambda one: view_pair(
                tf.io.decode_png(one[0], channels=3), one[1], tf.constant(0, tf.int64), 0, self._augment
            ),
            (stored, identities),
            fn_output_signature=tf.TensorSpec([2, size, size, 3], tf.uint8),
        )
        return tf.cast(pairs, tf.float32)

    def _represent(self, views: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """float32[N, size, size, 3] in [0, 255] -> trained and untrained embeddings, and small pixels in [0, 1]."""
        small = tf.image.resize(views, [PIXEL_SIDE, PIXEL_SIDE], antialias=True)
        pixels = tf.reshape(small / 255.0, [-1, PIXEL_SIDE * PIXEL_SIDE * 3])
        return self._trained.embed_views(views), self._untrained.embed_views(views), pixels


def _encoded(examples: tf.Tensor) -> tf.Tensor:
    return tf.io.parse_example(examples, {ENCODED: tf.io.FixedLenFeature([], tf.string)})[ENCODED]


def save_encoder(module: EncoderModule, facts: dict[str, Any], directory: str) -> None:
    """Writes the SavedModel with its three signatures.

    Args:
        module: to be published.
        facts: of the encoder, such as the size and the layer of the embedding; written to FACTS_FILE, which the
            model's card quotes.
        directory: to write to.
    """
    signatures = {
        "serving_default": module.serving_default,
        "examples": module.examples,
        "pixels": module.pixels,
    }
    tf.saved_model.save(module, directory, signatures=signatures)
    path = posixpath.join(directory, FACTS_FILE)
    tf.io.gfile.makedirs(posixpath.dirname(path))
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(json.dumps(facts | {"input_size": module.size, "resize": module.resize}, indent=2))


def save_evaluation(module: EvaluationModule, directory: str) -> None:
    """Writes the SavedModel that the Evaluator runs."""
    tf.saved_model.save(module, directory, signatures={"evaluate": module.evaluate})
