"""The step's only seam to the other cores: how many there are, which one this is, and sums over them."""

import abc
import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops


class Replica(Protocol):
    """One of the cores that share a global batch."""

    @property
    def count(self) -> int:
        """Number of replicas, R."""

    @property
    def index(self) -> tf.Tensor:
        """int32[]: this replica's id, 0 to R - 1."""

    def sum(self, tree: Any) -> Any:
        """Sums every tensor of a nest over the replicas; all replicas get the same result."""

    def sum_pair(self, x: tf.Tensor, distance: int) -> tf.Tensor:
        """Sums over this replica and the one whose id differs in the bit `distance`; both get the same result.

        Args:
            x: a type that sums exactly (float32, bfloat16, int32).
            distance: a power of two below R, which must be one, too.
        """

    def all_to_all(self, blocks: tf.Tensor) -> tf.Tensor:
        """Sends block j of [R, ...] to replica j; block j of the result came from replica j.

        Args:
            blocks: a type that sums exactly (float32, bfloat16, int32).
        """


class SingleReplica:
    """One core alone."""

    count = 1

    @property
    def index(self) -> tf.Tensor:
        """int32[]: always 0."""
        return tf.zeros([], tf.int32)

    def sum(self, tree: Any) -> Any:
        """Returns the nest itself."""
        return tree

    def sum_pair(self, x: tf.Tensor, distance: int) -> tf.Tensor:
        """There is no partner.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"one replica has no partner at distance {distance} to sum {x} with")

    def all_to_all(self, blocks: tf.Tensor) -> tf.Tensor:
        """Returns the blocks themselves."""
        return blocks


class ContextReplica:
    """A replica of a tf.distribute strategy, inside strategy.run: logical CPU devices or GPUs."""

    def __init__(self) -> None:
        self._context = tf.distribute.get_replica_context()

    @property
    def count(self) -> int:
        """Number of replicas, R."""
        return int(self._context.num_replicas_in_sync)

    @property
    def index(self) -> tf.Tensor:
        """int32[]: this replica's id."""
        return tf.convert_to_tensor(self._context.replica_id_in_sync_group, tf.int32)

    def sum(self, tree: Any) -> Any:
        """Sums over the replicas by ReplicaContext.all_reduce, all tensors of a type at once.

        A reduction between logical devices costs a copy to and from each of them, whatever its size.
        """
        if self.count == 1:
            return tree
        return _packed(functools.partial(self._context.all_reduce, tf.distribute.ReduceOp.SUM), tree)

    def sum_pair(self, x: tf.Tensor, distance: int) -> tf.Tensor:
        """Sums within all pairs at once, by a sum over all replicas, since tf.distribute has no other."""
        return sum_pair_by_sum(self, x, distance)

    def all_to_all(self, blocks: tf.Tensor) -> tf.Tensor:
        """Exchanges blocks by a sum of buffers that are zero elsewhere, since tf.distribute has no exchange."""
        return exchange_by_sum(self, blocks)


class TpuCollectives(abc.ABC):
    """What a TPU core asks of the others, by name of the one group of all cores."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """Number of cores, R."""

    @property
    def _group(self) -> list[list[int]]:
        return [list(range(self.count))]

    def sum(self, tree: Any) -> Any:
        """Sums over the cores by tpu.cross_replica_sum."""
        if self.count == 1:
            return tree
        return tf.nest.map_structure(lambda x: tf.compat.v1.tpu.cross_replica_sum(x, self._group), tree)

    def sum_pair(self, x: tf.Tensor, distance: int) -> tf.Tensor:
        """Sums over the two cores by tpu.cross_replica_sum."""
        return tf.compat.v1.tpu.cross_replica_sum(x, pairs(self.count, distance))

    def all_to_all(self, blocks: tf.Tensor) -> tf.Tensor:
        """Exchanges blocks by the TPU's own all-to-all."""
        return tf.raw_ops.AllToAll(
            input=blocks, group_assignment=self._group, concat_dimension=0, split_dimension=0, split_count=self.count
        )


class TpuReplica(TpuCollectives):
    """A TPU core under TPUStrategy, inside strategy.run."""

    def __init__(self) -> None:
        self._context = ContextReplica()

    @property
    def count(self) -> int:
        """Number of cores, R."""
        return self._context.count

    @property
    def index(self) -> tf.Tensor:
        """int32[]: this core's id."""
        return self._context.index


_CURRENT: contextvars.ContextVar[Replica] = contextvars.ContextVar("replica")


@contextlib.contextmanager
def entered(replica: Replica) -> Iterator[None]:
    """Lets layers inside a model that is being traced find the replica, see `entered_replica`."""
    token = _CURRENT.set(replica)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def entered_replica() -> Replica:
    """The replica of the step that is being traced; a single one outside of any."""
    return _CURRENT.get(SingleReplica())


def on_tpu() -> bool:
    """Whether the step that is being traced is a TPU core's."""
    return isinstance(entered_replica(), TpuCollectives)


def one_after_the_other(done: tf.Tensor, begun: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Both tensors; on a TPU what uses the second is computed when the first is there.

    Left to itself the compiler computes two networks by turns, and then the activations of neither stay near the core.
    """
    if not on_tpu():
        return done, begun
    first, second = gen_xla_ops.xla_optimization_barrier(input=[done, begun])
    return first, second


def current_replica(strategy: tf.distribute.Strategy) -> Replica:
    """The replica that runs this code; to be called inside strategy.run."""
    return TpuReplica() if isinstance(strategy, tf.distribute.TPUStrategy) else ContextReplica()


def mean(replica: Replica, tree: Any) -> Any:
    """Averages every tensor of a nest over the replicas."""
    return tf.nest.map_structure(lambda x: x / tf.cast(replica.count, x.dtype), replica.sum(tree))


def _packed(add: Callable[[tf.Tensor], tf.Tensor], tree: Any) -> Any:
    """Applies an element-wise sum to the tensors of a nest, those of one type joined into one."""
    tensors = [tf.convert_to_tensor(x) for x in tf.nest.flatten(tree)]
    sums: dict[int, tf.Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        at = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        joined = add(tf.concat([tf.reshape(tensors[i], [-1]) for i in at], 0))
        parts = tf.split(joined, [tensors[i].shape.num_elements() for i in at])
        sums |= {i: tf.reshape(part, tensors[i].shape) for i, part in zip(at, parts, strict=True)}
    return tf.nest.pack_sequence_as(tree, [sums[i] for i in range(len(tensors))])


def gather(replica: Replica, rows: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """Puts every replica's rows at their places in one global batch that all replicas get.

    A sum of buffers that are zero elsewhere is exact, since x + 0 = x; so a permutation costs one
    cross-replica sum and no further traffic.

    Args:
        replica: this core.
        rows: [n, ...] of this replica, a type that sums exactly (float32, bfloat16, int32).
        positions: int32[n], places in the global batch; over all replicas a permutation of R * n.

    Returns:
        [R * n, ...], the same on every replica.
    """
    total = replica.count * rows.shape[0]
    return replica.sum(tf.scatter_nd(positions[:, tf.newaxis], rows, [total, *rows.shape[1:]]))


def pairs(count: int, distance: int) -> list[list[int]]:
    """The pairs of replicas whose ids differ in the bit `distance`."""
    return [[low, low | distance] for low in range(count) if not low & distance]


def sum_pair_by_sum(replica: Replica, x: tf.Tensor, distance: int) -> tf.Tensor:
    """sum_pair for replicas that can only sum over all: R / 2 times its traffic."""
    pair_of = [0] * replica.count
    for number, pair in enumerate(pairs(replica.count, distance)):
        for member in pair:
            pair_of[member] = number
    own = tf.gather(tf.constant(pair_of), replica.index)
    slots = tf.scatter_nd(tf.reshape(own, [1, 1]), x[tf.newaxis], [replica.count // 2, *x.shape])
    return tf.gather(replica.sum(slots), own)


def exchange_by_sum(replica: Replica, blocks: tf.Tensor) -> tf.Tensor:
    """all_to_all for replicas that can only sum: R times its traffic."""
    count = replica.count
    by_receiver = tf.scatter_nd(
        tf.stack([tf.range(count), tf.fill([count], replica.index)], axis=1), blocks, [count, count, *blocks.shape[1:]]
    )
    return tf.gather(replica.sum(by_receiver), replica.index)


def own_rows(replica: Replica, rows: tf.Tensor) -> tf.Tensor:
    """The rows of a global batch [R * n, ...] that belong to this replica: [n, ...]."""
    size = rows.shape[0] // replica.count
    start = tf.reshape(replica.index * size, [1])
    begin = tf.concat([start, tf.zeros([rows.shape.rank - 1], tf.int32)], 0)
    return tf.slice(rows, begin, [size, *rows.shape[1:]])
