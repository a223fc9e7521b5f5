"""The queue of keys (arXiv 1911.05722, section 3.2), and the ring of statistics that the mode `stored` keeps."""

from typing import Any

import keras
import tensorflow as tf

from trainer_module.errors import UserError

Stats = list[tf.Tensor]


def enqueue(queue: tf.Tensor, pointer: tf.Tensor, keys: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Overwrites the oldest keys; wraps round, so K need not be a multiple of the number of keys.

    Args:
        queue: [K, C].
        pointer: int32[], where the oldest key is.
        keys: [n, C], n at most K; n may be known only when the graph runs, though not on a TPU.

    Returns:
        The new queue and pointer.
    """
    size, capacity = _rows(keys), queue.shape[0]
    rows = (pointer + tf.range(size)) % capacity
    queue = tf.tensor_scatter_nd_update(queue, rows[:, tf.newaxis], tf.cast(keys, queue.dtype))
    return queue, (pointer + size) % capacity


def _rows(x: tf.Tensor) -> int | tf.Tensor:
    return tf.shape(x)[0] if x.shape[0] is None else x.shape[0]


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


@keras.saving.register_keras_serializable("moco")
class KeyQueue(keras.layers.Layer):
    """A queue of keys with, if wanted, a ring of the BN statistics of the batches that gave them; for Keras loops.

    All methods work eagerly and in graphs. Before the first batch, `draw` gives mean 0 and variance 1.

    Example:
        import tensorflow as tf
        from trainer_module.keras_api import KeyQueue, ShuffledBatchNorm

        norm = ShuffledBatchNorm()                     # the only one of a small key encoder
        queue = KeyQueue(64, 3, stats=[(3,), (3,)])    # its mean and its variance
        for step in range(4):
            x = tf.random.normal([8, 4, 4, 3])
            keys = tf.reduce_mean(norm(x, bn_stats=queue.draw(step)), [1, 2])
            negatives = queue.keys                     # float32[64, 3], from before this batch
            norm(x, training=True)                     # observes the statistics of x
            queue.enqueue(tf.math.l2_normalize(keys, axis=1), [norm.moving_mean.value, norm.moving_variance.value])

    Args:
        size: K.
        dim: size of a key, C.
        stats: shapes of the statistics, (S,) each: mean and variance of every layer in turn, the order of the key
            encoder's non_trainable_variables. None are kept by default.
        ring: key batches whose statistics are kept.
        seed: of the first keys and of the draws.

    Raises:
        UserError: statistics that are no pairs of mean and variance; size, dim or ring below 1.
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
        super().__init__(**{**kwargs, "trainable": False})
        for name, value in (("size", size), ("dim", dim), ("ring", ring)):
            if value < 1:
                raise UserError(f"KeyQueue({name}={value}): must be at least 1")
        shapes = _pairs(stats)
        self.size, self.dim, self.ring, self.seed = size, dim, ring, seed
        noise = tf.math.l2_normalize(tf.random.stateless_normal([size, dim], [seed, 0], alg="philox"), axis=1)

        def weight(name: str, value: tf.Tensor, dtype: str) -> keras.Variable:
            made = self.add_weight(name=name, shape=tuple(value.shape), dtype=dtype, trainable=False, autocast=False)
            made.assign(value)
            return made

        self._keys = weight("keys", noise, "float32")
        self._pointer = weight("pointer", tf.zeros([], tf.int32), "int32")
        self._recorded = weight("recorded", tf.zeros([], tf.int32), "int32")
        # Means start at 0, variances at 1.
        self._ring = [
            weight(f"stats{i}", tf.fill([ring, *shape], float(i % 2)), "float32") for i, shape in enumerate(shapes)
        ]
        self.built = True

    @property
    def keys(self) -> tf.Tensor:
        """float32[K, C]: unit keys."""
        return tf.convert_to_tensor(self._keys)

    def enqueue(self, keys: tf.Tensor, stats: Stats | None = None) -> None:
        """Takes in the keys of one batch and the statistics that were observed in it.

        Args:
            keys: float[n, C], n at most K; n may be known only when the graph runs, though not on a TPU.
            stats: float[S] each, in the order of the constructor's; where statistics are kept.

        Raises:
            UserError: no keys or more than the queue holds, keys of another size, statistics where none are kept, or
                none where they are, or of another shape.
            tf.errors.InvalidArgumentError: more keys than the queue holds, found only when the graph runs.
        """
        keys, stats = tf.convert_to_tensor(keys), [tf.convert_to_tensor(value) for value in stats or []]
        self._check(keys, stats)
        queue, pointer = enqueue(self.keys, tf.convert_to_tensor(self._pointer), keys)
        self._keys.assign(queue)
        self._pointer.assign(pointer)
        if stats:
            recorded = tf.convert_to_tensor(self._recorded)
            kept = [tf.convert_to_tensor(variable) for variable in self._ring]
            seen = [tf.cast(value, tf.float32) for value in stats]
            for variable, value in zip(self._ring, record(kept, recorded, seen), strict=True):
                variable.assign(value)
            self._recorded.assign(recorded + 1)

    def draw(self, step: int | tf.Tensor | None = None) -> Stats:
        """The statistics of an earlier batch, another draw at every step; mean 0 and variance 1 before the first.

        Args:
            step: int[]; by default the number of batches recorded so far.

        Returns:
            float32[S] each, in the order of the constructor's.

        Raises:
            UserError: no statistics are kept.
        """
        if not self._ring:
            raise UserError("this KeyQueue keeps no statistics; give it their shapes, as in stats=[(64,), (64,)]")
        recorded = tf.convert_to_tensor(self._recorded)
        seed = tf.stack([tf.constant(self.seed, tf.int32), tf.cast(recorded if step is None else step, tf.int32)])
        return draw([tf.convert_to_tensor(variable) for variable in self._ring], recorded, seed)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        mine = {"size": self.size, "dim": self.dim, "ring": self.ring, "seed": self.seed}
        return {**super().get_config(), **mine, "stats": [list(v.shape[1:]) for v in self._ring] or None}

    def _check(self, keys: tf.Tensor, stats: Stats) -> None:
        if len(keys.shape) != 2 or keys.shape[1] != self.dim:
            raise UserError(f"keys of shape {tuple(keys.shape)} in a KeyQueue of dim={self.dim}; give [n, {self.dim}]")
        if len(stats) != len(self._ring):
            raise UserError(
                f"{len(stats)} statistics given to a KeyQueue that keeps {len(self._ring)}; give as many as its `stats`"
            )
        for value, kept in zip(stats, self._ring, strict=True):
            if not value.shape.is_compatible_with(kept.shape[1:]):
                raise UserError(
                    f"statistics of shape {tuple(value.shape)} given to a KeyQueue that keeps {tuple(kept.shape[1:])}; "
                    "give them in the order of its `stats`"
                )
        if keys.shape[0] is None:
            message = f"more keys than a KeyQueue of size={self.size} holds"
            tf.debugging.assert_less_equal(tf.shape(keys)[0], self.size, message)
        elif keys.shape[0] == 0:
            raise UserError("a batch of no keys given to a KeyQueue; give one at least")
        elif keys.shape[0] > self.size:
            raise UserError(f"{keys.shape[0]} keys do not fit into a KeyQueue of size={self.size}; make it larger")


def _pairs(stats: list[tuple[int, ...]] | None) -> list[tuple[int, ...]]:
    if stats is None:
        return []
    shapes = [tuple(shape) for shape in stats]
    if not shapes:
        raise UserError("KeyQueue(stats=[]): the key encoder has no batch normalisation; leave `stats` out")
    if shapes[::2] != shapes[1::2]:
        raise UserError(f"KeyQueue(stats={shapes}): give the shapes of mean and variance in turn, as [(64,), (64,)]")
    return shapes
