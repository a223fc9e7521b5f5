"""How keys are encoded so that no key's batch normalisation sees its query's batch (arXiv 1911.05722, section 3.3)."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import tensorflow as tf

from trainer_module.config import KeyBnMode
from trainer_module.replica import Replica, gather, own_rows

Stats = list[tf.Tensor]
EncodeBatch = Callable[[tf.Tensor], tuple[tf.Tensor, Stats]]  # uint8[n, H, W, 3] -> normalised keys [n, C], BN stats


class Keys(NamedTuple):
    """The keys of one step.

    Attributes:
        own: float32[n, C], in the order of this replica's queries.
        everyone: float32[R * n, C], in the order of the global batch; what is enqueued.
        stats: the key encoder's new BN running statistics as this replica saw them.
    """

    own: tf.Tensor
    everyone: tf.Tensor
    stats: Stats


class KeyEncoding(Protocol):
    """One way to encode the keys of a step."""

    def __call__(self, encode: EncodeBatch, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor) -> Keys:
        """Encodes this replica's key views.

        Args:
            encode: f_k in training mode with normalised output.
            x_k: uint8[n, H, W, 3], the key views of this replica's queries.
            replica: this core.
            seed: int32[2], stateless, the same on all cores, another one at every step.
        """


def permutation(seed: tf.Tensor, size: int) -> tf.Tensor:
    """int32[size]: a uniform permutation, the same wherever the seed is the same, with no traffic.

    An argsort of stateless uniform numbers, since tf.random.shuffle has no TPU kernel.
    """
    return tf.argsort(tf.random.stateless_uniform([size], seed, alg="philox"), stable=True)


def cross_replica_sum(encode: EncodeBatch, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor) -> Keys:
    """Shuffled BN by one permutation of the global batch: replica r encodes rows perm[r * n:(r + 1) * n].

    The pixels travel as bfloat16, which holds 0 to 255 exactly, in half the bytes of float32.
    """
    n = x_k.shape[0]
    perm = permutation(seed, replica.count * n)
    places = own_rows(replica, tf.math.invert_permutation(perm))
    shuffled = own_rows(replica, gather(replica, tf.cast(x_k, tf.bfloat16), places))
    k, stats = encode(tf.cast(shuffled, tf.uint8))
    everyone = gather(replica, k, own_rows(replica, perm))
    return Keys(own_rows(replica, everyone), everyone, stats)


def no_shuffle(encode: EncodeBatch, x_k: tf.Tensor, replica: Replica, seed: tf.Tensor) -> Keys:
    """Encodes keys where their queries are. It leaks, and is here for the comparison."""
    del seed
    k, stats = encode(x_k)
    n = x_k.shape[0]
    return Keys(k, gather(replica, k, replica.index * n + tf.range(n)), stats)


def key_encoding(mode: KeyBnMode) -> KeyEncoding:
    """The key encoding of a mode."""
    return {KeyBnMode.cross_replica_sum: cross_replica_sum, KeyBnMode.none: no_shuffle}[mode]
