"""The queue of keys (arXiv 1911.05722, section 3.2), and the ring of statistics that the mode `stored` keeps."""

from typing import Any

import keras
import tensorflow as tf

Stats = list[tf.Tensor]


def enqueue(queue: tf.Tensor, pointer: tf.Tensor, keys: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Overwrites the oldest keys; wraps round, so K need not be a multiple of the number of keys.

    Args:
        queue: [K, C].
        pointer: int32[], where the oldest key is.
        keys: [n, C], n at most K.

    Returns:
        The new queue and pointer.
    """
    size, capacity = keys.shape[0], queue.shape[0]
    rows = (pointer + tf.range(size)) % capacity
    queue = tf.tensor_scatter_nd_update(queue, rows[:, tf.newaxis], tf.cast(keys, queue.dtype))
    return queue, (pointer + size) % capacity


def draw(ring: Stats, recorded: tf.Tensor, seed: tf.Tensor) -> Stats:
    """The statistics of one of the batches in the ring, each as likely; the initial ones while it holds none.

    Args:
        ring: [N, S] each.
        recorded: int32[], batches recorded so far.
        seed: int32[2], stateless.
    """
    filled = tf.clip_by_value(recorded, 1, ring[0].shape[0])
    row = tf.random.stateless_uniform([], seed, 0, filled, tf.int32, alg="philox")
    return [tf.gather(kept, row) for kept in ring]


def record(ring: Stats, recorded: tf.Tensor, stats: Stats) -> Stats:
    """Overwrites the oldest batch of the ring.

    Args:
        ring: [N, S] each.
        recorded: int32[], batches recorded so far.
        stats: [S] each.
    """
    row = tf.reshape(recorded % ring[0].shape[0], [1, 1])
    return [tf.tensor_scatter_nd_update(kept, row, s[tf.newaxis]) for kept, s in zip(ring, stats, strict=True)]


class KeyQueue(keras.layers.Layer):
    """A queue of keys with, if wanted, a ring of the BN statistics of the batches that gave them; for Keras loops.

    Example:
        queue = KeyQueue(4096, 128, stats=[v.shape for v in key_encoder.non_trainable_variables])
        given = queue.draw(step)                      # normalise the next key batch with these
        negatives = queue.keys                        # float32[4096, 128], before this batch is enqueued
        queue.enqueue(keys, observed)

    Args:
        size: K.
        dim: size of a key, C.
        stats: shapes of the statistics; none are kept by default.
        ring: key batches whose statistics are kept.
        seed: of the first keys and of the draws.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        stats: list[tuple[int, ...]] | None = None,
        ring: int = 8,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainable=False, **kwargs)
        self.size, self.dim, self.seed = size, dim, seed
        noise = tf.math.l2_normalize(tf.random.stateless_normal([size, dim], [seed, 0], alg="philox"), axis=1)

        def weight(name: str, value: tf.Tensor, dtype: str) -> keras.Variable:
            made = self.add_weight(name=name, shape=tuple(value.shape), dtype=dtype, trainable=False, autocast=False)
            made.assign(value)
            return made

        self._keys = weight("keys", noise, "float32")
        self._pointer = weight("pointer", tf.zeros([], tf.int32), "int32")
        self._recorded = weight("recorded", tf.zeros([], tf.int32), "int32")
        self._ring = [weight(f"stats{i}", tf.zeros([ring, *shape]), "float32") for i, shape in enumerate(stats or [])]
        self.built = True

    @property
    def keys(self) -> tf.Tensor:
        """float32[K, C]: unit keys."""
        return tf.convert_to_tensor(self._keys)

    def enqueue(self, keys: tf.Tensor, stats: Stats | None = None) -> None:
        """Takes in the keys of one batch, float32[n, C], and the statistics that were observed in it.

        Raises:
            ValueError: more keys than the queue holds, or statistics where none are kept, or none where they are.
        """
        if keys.shape[0] > self.size:
            raise ValueError(f"{keys.shape[0]} keys do not fit into a queue of {self.size}")
        if len(stats or []) != len(self._ring):
            raise ValueError(f"{len(stats or [])} statistics given, {len(self._ring)} are kept")
        queue, pointer = enqueue(self.keys, tf.convert_to_tensor(self._pointer), keys)
        self._keys.assign(queue)
        self._pointer.assign(pointer)
        if stats:
            recorded = tf.convert_to_tensor(self._recorded)
            kept = [tf.convert_to_tensor(variable) for variable in self._ring]
            for variable, value in zip(self._ring, record(kept, recorded, stats), strict=True):
                variable.assign(value)
            self._recorded.assign(recorded + 1)

    def draw(self, step: int | tf.Tensor) -> Stats | None:
        """The statistics of an earlier batch, another draw at every step; None while there is no batch yet."""
        if not self._ring:
            raise ValueError("this queue keeps no statistics; give it their shapes as `stats`")
        recorded = tf.convert_to_tensor(self._recorded)
        if tf.executing_eagerly() and not int(recorded):
            return None
        seed = tf.stack([tf.constant(self.seed, tf.int32), tf.cast(step, tf.int32)])
        return draw([tf.convert_to_tensor(variable) for variable in self._ring], recorded, seed)
