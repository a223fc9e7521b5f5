"""How keys are encoded so that no key's batch normalisation sees its query's batch (arXiv 1911.05722, section 3.3).

n: images of this replica, R: replicas, C: size of an embedding, S: channels of a batch normalisation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import tensorflow as tf

from trainer_module.config import KeyBnConfig, KeyBnMode, recommended
from trainer_module.key_queue import draw, record
from trainer_module.replica import Replica, gather, mean, on_tpu, own_rows

Stats = list[tf.Tensor]


class KeyEncoder(Protocol):
    """f_k with its parameters of this step."""

    def __call__(self, x: tf.Tensor, stats: Stats, training: bool = True) -> tuple[tf.Tensor, Stats]:
        """uint8[n, H, W, 3] and BN statistics -> unit keys float32[n, C] and new BN statistics."""


class Memory(NamedTuple):
    """What is known of batch normalisation before a step, the same on all replicas.

    Attributes:
        key, query: BN running statistics of f_k and f_q, float32[S] each.
        ring: statistics of the last key batches, float32[N, S] each; empty for modes that keep none.
    """

    key: Stats
    query: Stats
    ring: Stats


class Keys(NamedTuple):
    """The keys of one step.

    Attributes:
        own: float32[n, C], in the order of this replica's queries.
        everyone: float32[R * n, C], in the order of the global batch; what is enqueued.
        stats: f_k's new BN running statistics, the same on all replicas.
        ring: the new ring, the same on all replicas.
    """

    own: tf.Tensor
    everyone: tf.Tensor
    stats: Stats
    ring: Stats


class KeyEncoding(Protocol):
    """One way to encode the keys of a step."""

    def __call__(self, f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
        """Encodes this replica's key views.

        Args:
            f_k: the key encoder.
            x_k: uint8[n, H, W, 3], the key views of this replica's queries; for `host`, shuffled already.
            replica: this core.
            seed: int32[2], (seed of the run, step): the same on all cores, another one at every step.
            memory: see Memory.
        """


def permutation(seed: tf.Tensor, size: int) -> tf.Tensor:
    """int32[size]: a uniform permutation, the same wherever the seed is the same, with no traffic."""
    return _permutations(seed, [size])


def cross_replica_sum(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
    """Shuffled BN by one permutation of the global batch: replica r encodes rows perm[r * n:(r + 1) * n]."""
    with tf.name_scope("key_shuffle"):
        perm = permutation(seed, replica.count * x_k.shape[0])
        places = own_rows(replica, tf.math.invert_permutation(perm))
        shuffled = own_rows(replica, gather(replica, pack_pixels(x_k), places))
    return _encode_in_place(f_k, unpack_pixels(shuffled, x_k.shape), own_rows(replica, perm), replica, memory)


def all_to_all(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
    """Balanced shuffle: random local order, n / R rows to every replica, random local order.

    A query and its key share a BN group as often as under a uniform shuffle, and every pixel travels once at most.
    """
    n, count = x_k.shape[0], replica.count
    with tf.name_scope("key_shuffle"):
        orders = _permutations(seed, [2, count, n])
        leaving, arriving = orders[0], tf.gather(orders[1], replica.index)  # Rxn of all replicas, n of this one
        sent = tf.gather(pack_pixels(x_k), tf.gather(leaving, replica.index))
        blocks = tf.reshape(sent, [count, n // count, sent.shape[1]])
        received = tf.gather(tf.reshape(replica.all_to_all(blocks), sent.shape), arriving)
        # Block j of what arrives is the block of replica j's order that was meant for this replica.
        places = leaving + n * tf.range(count)[:, tf.newaxis]
        places = tf.reshape(tf.gather(tf.reshape(places, [count, count, n // count]), replica.index, axis=1), [n])
        places = tf.gather(places, arriving)
    return _encode_in_place(f_k, unpack_pixels(received, x_k.shape), places, replica, memory)


def butterfly(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
    """Balanced shuffle by log2(R) stages of sums over pairs: R is a power of two, n is even.

    In each stage a replica puts its rows into a random order and gives half of them for its partner's half; after all
    stages a row is on each replica with the same chance. A core gives and takes n / 2 rows a stage: what it sees is
    the sum of both halves, from which it subtracts its own.
    """
    n, count = x_k.shape[0], replica.count
    stages = count.bit_length() - 1
    with tf.name_scope("key_shuffle"):
        orders = _permutations(seed, [max(stages, 1), count, n])
        rows = pack_pixels(x_k)
        places = tf.reshape(tf.range(count * n), [count, n])  # of the rows on all replicas
        for stage in range(stages):
            rows = tf.gather(rows, tf.gather(orders[stage], replica.index))
            staying, leaving = tf.split(rows, 2)
            rows = tf.concat([staying, replica.sum_pair(leaving, 1 << stage) - leaving], 0)
            staying, leaving = tf.split(tf.gather(places, orders[stage], batch_dims=1), 2, axis=1)
            places = tf.concat([staying, tf.gather(leaving, [r ^ 1 << stage for r in range(count)])], 1)
        places = tf.gather(places, replica.index)
    return _encode_in_place(f_k, unpack_pixels(rows, x_k.shape), places, replica, memory)


def automatic(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
    """The recommended mode for the replicas that there are."""
    return key_encoding(recommended(replica.count, x_k.shape[0]))(f_k, x_k, replica, seed, memory)


def host(hosts: int = 1) -> KeyEncoding:
    """The key views arrive shuffled among the replicas of their host, see `shuffle_keys`; only keys travel.

    Args:
        hosts: that feed the replicas, each an equal number.
    """

    def encode(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
        size = replica.count * x_k.shape[0] // hosts
        perms = [size * i + permutation(_host_seed(seed, i), size) for i in range(hosts)]
        return _encode_in_place(f_k, x_k, own_rows(replica, tf.concat(perms, 0)), replica, memory)

    return encode


def shuffle_keys(batches: tf.data.Dataset, seed: int, start_step: int, index: int = 0) -> tf.data.Dataset:
    """Shuffles the key views of each batch as the mode `host` expects them.

    Args:
        batches: (query, key) of one host, uint8[B, H, W, 3] each, one element a step.
        seed: of the run.
        start_step: step of the first batch.
        index: of this host.
    """

    @tf.autograph.experimental.do_not_convert
    def shuffle(step: tf.Tensor, views: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        query, key = views
        at = tf.stack([tf.constant(seed, tf.int32), tf.cast(step, tf.int32)])
        return query, tf.gather(key, permutation(_host_seed(at, index), key.shape[0]))

    return batches.enumerate(start_step).map(shuffle, num_parallel_calls=1)


def split(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
    """Shuffles within the replica; the layers normalise groups of its batch by themselves (the authors' Colab)."""
    n = x_k.shape[0]
    with tf.name_scope("key_shuffle"):
        perm = permutation(seed, n)
        # A TPU pads an image's three channels to 128 wherever rows are gathered.
        shuffled = unpack_pixels(tf.gather(pack_pixels(x_k), perm), x_k.shape) if on_tpu() else tf.gather(x_k, perm)
    return _encode_in_place(f_k, shuffled, replica.index * n + perm, replica, memory)


def in_order(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
    """Encodes keys where their queries are: `none`, which leaks, and `sync`, whose layers share their statistics."""
    del seed
    n = x_k.shape[0]
    return _encode_in_place(f_k, x_k, replica.index * n + tf.range(n), replica, memory)


def ema(m: float) -> KeyEncoding:
    """EMAN (arXiv 2101.08482): f_k normalises with the momentum average of f_q's running statistics.

    Args:
        m: momentum of the key encoder.
    """

    def encode(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
        stats = [m * k + (1 - m) * q for k, q in zip(memory.key, memory.query, strict=True)]
        eval_mode = functools.partial(f_k, training=False)
        keys = in_order(eval_mode, x_k, replica, seed, memory._replace(key=stats))
        return keys._replace(stats=stats)

    return encode


def stored(f_k: KeyEncoder, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor, memory: Memory) -> Keys:
    """f_k normalises with the statistics of an earlier key batch, drawn from the ring, and never with its own.

    What the ring takes in is observed in a second pass, in which every layer normalises the batch by itself: the layers
    must be ShuffledBatchNorm, which says why. Until the ring holds a batch, the given statistics are the initial ones.
    """
    step = seed[1]  # one batch is recorded at every step
    given = memory._replace(key=draw(memory.ring, step, seed))
    keys = in_order(functools.partial(f_k, training=False), x_k, replica, seed, given)
    with tf.name_scope("statistics"):
        _, observed = f_k(x_k, memory.key)
        observed = mean(replica, observed)
    return keys._replace(stats=observed, ring=record(memory.ring, step, observed))


def key_encoding(mode: KeyBnMode, *, m: float = 0.999, hosts: int = 1) -> KeyEncoding:
    """The key encoding of a mode.

    Args:
        mode: see KeyBnMode.
        m: momentum of the key encoder, for `ema`.
        hosts: that feed the replicas, for `host`.
    """
    makers: dict[KeyBnMode, Callable[[], KeyEncoding]] = {
        KeyBnMode.cross_replica_sum: lambda: cross_replica_sum,
        KeyBnMode.all_to_all: lambda: all_to_all,
        KeyBnMode.butterfly: lambda: butterfly,
        KeyBnMode.auto: lambda: automatic,
        KeyBnMode.host: lambda: host(hosts),
        KeyBnMode.stored: lambda: stored,
        KeyBnMode.ema: lambda: ema(m),
        KeyBnMode.split: lambda: split,
        KeyBnMode.sync: lambda: in_order,
        KeyBnMode.none: lambda: in_order,
    }
    return makers[mode]()


def ring_size(config: KeyBnConfig) -> int:
    """Key batches whose statistics are kept."""
    return config.ring if config.mode is KeyBnMode.stored else 0


def pack_pixels(x: tf.Tensor) -> tf.Tensor:
    """uint8[n, H, ...] -> int32[n, P]: four pixels in each, P a quarter of an image's with H rounded up; exact.

    TPU cores sum no uint8. Rows of zeros stay zeros, so sums with them keep every pixel; and sums that wrap round can
    be undone. The four come from four bands of an image, and are packed before it is flattened: neighbours would make
    an innermost axis of four, which a TPU pads to 128, and flat pixels would be four times the bytes while they are.
    """
    bands = tf.split(tf.pad(x, [[0, 0], [0, -x.shape[1] % 4], *[[0, 0]] * (x.shape.rank - 2)]), 4, axis=1)
    packed = [tf.bitwise.left_shift(tf.cast(band, tf.int32), 8 * i) for i, band in enumerate(bands)]
    return tf.reshape(functools.reduce(tf.bitwise.bitwise_or, packed), [x.shape[0], -1])


def unpack_pixels(packed: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """The inverse of pack_pixels.

    Args:
        packed: int32[n, P].
        shape: of the pixels, uint8[n, H, ...].
    """
    height = shape[1]
    packed = tf.reshape(packed, [shape[0], -(-height // 4), *shape[2:]])
    bands = [tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, 8 * i), 255) for i in range(4)]
    return tf.concat([tf.cast(band, tf.uint8) for band in bands], 1)[:, :height]


def _permutations(seed: tf.Tensor, shape: list[int]) -> tf.Tensor:
    """int32[shape]: a uniform permutation along the last axis, by argsort, as tf.random.shuffle has no TPU kernel.

    Of random bits, not of uniform floats: XLA makes other floats of the same bits than TensorFlow's CPU kernels do, and
    in the mode `host` the one shuffles and the other undoes it.
    """
    bits = tf.random.stateless_uniform(shape, seed, None, None, tf.int32, alg="philox")
    return tf.argsort(bits, stable=True)


def _encode_in_place(f_k: KeyEncoder, x: tf.Tensor, places: tf.Tensor, replica: Replica, memory: Memory) -> Keys:
    """Encodes rows that belong to the given places of the global batch, and brings all keys to all replicas."""
    with tf.name_scope("key_encoder"):
        k, stats = f_k(x, memory.key)
    with tf.name_scope("key_return"):
        everyone = gather(replica, k, places)
        own = own_rows(replica, everyone)
    with tf.name_scope("statistics"):
        stats = mean(replica, stats)
    return Keys(own, everyone, stats, memory.ring)


def _host_seed(seed: tf.Tensor, index: int) -> tf.Tensor:
    return tf.random.experimental.stateless_fold_in(seed, index, alg="philox")
