"""MoCo as a Keras 3 model, for training loops of one's own; the pipeline itself uses trainer_module.driver.

Example:
    encoder = build_encoder(EncoderConfig(name="resnet18", stem=Stem.cifar), 32, Precision.float32, seed=0)
    model = MoCoModel(encoder.model, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4), queue=4096)
    model.compile(learning_rate=0.03)
    model.fit(pairs, epochs=10)            # batches of (query, key) views, uint8[B, H, W, 3] each
    features = encoder.backbone.predict(images)

The parts can be used by themselves, too: `ShuffledBatchNorm` (trainer_module.batch_norm), a layer that is given its
statistics, and `KeyQueue` (trainer_module.key_queue).
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer_module.batch_norm import ShuffledBatchNorm
from trainer_module.config import KeyBnMode
from trainer_module.key_queue import KeyQueue
from trainer_module.moco import MoCo, State, initial_state
from trainer_module.replica import SingleReplica
from trainer_module.shuffle import key_encoding

__all__ = ["KeyQueue", "MoCoModel", "ShuffledBatchNorm"]

_ONE_DEVICE = (KeyBnMode.split, KeyBnMode.stored, KeyBnMode.ema, KeyBnMode.none)


class MoCoModel(keras.Model):
    """MoCo with `fit`, on one device: the encoder's own weights are f_q and are trained in place.

    Args:
        encoder: image float32[B, H, W, 3], normalised -> embeddings float32[B, C].
        mean, std: per channel, in the units of the pixels (0 to 255).
        queue: K.
        momentum: of the key encoder (m).
        temperature: of the softmax (T).
        key_bn: one of split (the encoder's layers then are SplitBatchNormalization), stored (key_encoder's layers are
            ShuffledBatchNorm), ema, none.
        key_encoder: the architecture of f_k where its layers differ; the same variables in the same order.
        ring: key batches whose statistics are kept, for stored.
        seed: of the queue and of the draws.

    Raises:
        ValueError: a mode that needs several devices.
    """

    def __init__(
        self,
        encoder: keras.Model,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        key_bn: KeyBnMode = KeyBnMode.ema,
        key_encoder: keras.Model | None = None,
        ring: int = 8,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if key_bn not in _ONE_DEVICE:
            names = ", ".join(mode.name for mode in _ONE_DEVICE)
            raise ValueError(f"key_bn={key_bn.name} needs several devices; on one use {names}")
        self.encoder = encoder
        self._make_step: Callable[[Callable[[tf.Tensor], tf.Tensor], float, float], MoCo] = (
            lambda rate, sgd_momentum, decay: MoCo(
                encoder,
                mean,
                std,
                key_encoding(key_bn, m=momentum),
                rate,
                momentum,
                temperature,
                sgd_momentum,
                decay,
                seed,
                key_encoder,
            )
        )
        start = initial_state(encoder, queue, seed, ring=ring if key_bn is KeyBnMode.stored else 0)
        self._state = State(
            step=self._weight("step", start.step),
            query=list(encoder.trainable_variables),
            query_stats=list(encoder.non_trainable_variables),
            key=self._weights("key", start.key),
            key_stats=self._weights("key_stats", start.key_stats),
            slots=self._weights("slots", start.slots),
            ring=self._weights("ring", start.ring),
            queue=self._weight("queue", start.queue),
            pointer=self._weight("pointer", start.pointer),
        )

    def compile(
        self,
        learning_rate: float | Callable[[tf.Tensor], tf.Tensor] = 0.03,
        sgd_momentum: float = 0.9,
        weight_decay: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        """Chooses the optimizer's settings; SGD as in the paper is part of the step.

        Args:
            learning_rate: a number, or a function of the step, int32[], to float32[].
            sgd_momentum, weight_decay: of SGD.
            **kwargs: for keras.Model.compile, such as run_eagerly.
        """
        super().compile(**{"jit_compile": False, **kwargs})
        rate = learning_rate if callable(learning_rate) else lambda _: tf.constant(learning_rate, tf.float32)
        self._moco = self._make_step(rate, sgd_momentum, weight_decay)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """uint8[B, H, W, 3] -> unit embeddings of f_q, float32[B, C]."""
        state = tf.nest.map_structure(tf.convert_to_tensor, self._state)
        return self._moco.encode(state.query, state.query_stats, x, training)[0]

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """One MoCo step on (query, key) views, uint8[B, H, W, 3] each."""
        state = tf.nest.map_structure(tf.convert_to_tensor, self._state)
        new, metrics = self._moco.step(state, *data, SingleReplica())
        tf.nest.map_structure(lambda variable, value: variable.assign(value), self._state, new)
        return metrics._asdict()

    def _weights(self, name: str, values: list[tf.Tensor]) -> list[keras.Variable]:
        return [self._weight(f"{name}{i}", value) for i, value in enumerate(values)]

    def _weight(self, name: str, value: tf.Tensor) -> keras.Variable:
        made = self.add_weight(
            name=name, shape=tuple(value.shape), dtype=value.dtype.name, trainable=False, autocast=False
        )
        made.assign(value)
        return made
