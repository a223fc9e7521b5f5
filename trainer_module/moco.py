"""Momentum Contrast: one training step as a pure function (arXiv 1911.05722, algorithm 1; 2003.04297).

N: images of this replica, R: replicas, C: size of an embedding, K: keys in the queue. The names of the scopes reach the
compiled program, so that what it costs can be told part by part (`./moco tpu-report`).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from trainer_module.key_queue import enqueue
from trainer_module.replica import Replica, SingleReplica, entered, mean, one_after_the_other
from trainer_module.shuffle import KeyEncoding, Memory

Tensors = list[tf.Tensor]
_TIE = 1e-6  # cosines nearer than that are one: the order of a float32 sum decides between them


class State(NamedTuple):
    """Everything that a step changes.

    Attributes:
        step: int32[], steps done.
        query, key: parameters of f_q and f_k.
        query_stats, key_stats: BN running statistics of f_q and f_k.
        slots: momentum of SGD, one for each query parameter.
        ring: statistics of the last key batches; empty but for the key-BN mode `stored`.
        queue: float32 or bfloat16[K, C], normalised keys.
        pointer: int32[], where the next keys go.
    """

    step: tf.Tensor
    query: Tensors
    query_stats: Tensors
    key: Tensors
    key_stats: Tensors
    slots: Tensors
    ring: Tensors
    queue: tf.Tensor
    pointer: tf.Tensor


class Metrics(NamedTuple):
    """Averages over the global batch, float32[] each.

    Attributes:
        loss: InfoNCE.
        pretext_top1, pretext_top5: share of queries whose positive has one of the largest logits; a tie is none.
        positive_similarity, negative_similarity: mean cosine of queries with their positives and with the queue.
        alignment: mean squared distance of query and positive key (Wang and Isola, 2020).
        embedding_std: of each dimension of the queries, averaged; 1 / sqrt(C) where they spread evenly, 0 collapsed.
        learning_rate: of this step.
    """

    loss: tf.Tensor
    pretext_top1: tf.Tensor
    pretext_top5: tf.Tensor
    positive_similarity: tf.Tensor
    negative_similarity: tf.Tensor
    alignment: tf.Tensor
    embedding_std: tf.Tensor
    learning_rate: tf.Tensor


@dataclasses.dataclass(frozen=True)
class MoCo:
    """What a step needs and does not change.

    Attributes:
        model: the architecture of f_q, and of f_k unless key_model is given.
        mean, std: per channel, in the units of the pixels (0 to 255).
        encode_keys: shuffled BN, see trainer_module.shuffle.
        learning_rate: step -> float32[].
        m, temperature, sgd_momentum, weight_decay: as in the paper.
        seed: of the permutations.
        key_model: the architecture of f_k where its batch normalisation differs; the same variables in the same order.
    """

    model: keras.Model
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encode_keys: KeyEncoding
    learning_rate: Callable[[tf.Tensor], tf.Tensor]
    m: float
    temperature: float
    sgd_momentum: float
    weight_decay: float
    seed: int
    key_model: keras.Model | None = None

    def encode(
        self, parameters: Tensors, stats: Tensors, x: tf.Tensor, training: bool = True, model: keras.Model | None = None
    ) -> tuple[tf.Tensor, Tensors]:
        """uint8[N, H, W, 3] -> unit embeddings float32[N, C] and new BN statistics."""
        x = (tf.cast(x, tf.float32) - self.mean) / self.std
        embedding, stats = (model or self.model).stateless_call(parameters, stats, x, training=training)
        if embedding.dtype.size < tf.float32.size:  # a float64 reference keeps its own
            embedding = tf.cast(embedding, tf.float32)
        return tf.math.l2_normalize(embedding, axis=1), stats

    def evaluate(self, state: State, x_q: tf.Tensor, x_k: tf.Tensor) -> Metrics:
        """What the step would report of these views, in inference mode and with nothing changed; on one device.

        Args:
            state: whose queue holds the negatives.
            x_q, x_k: uint8[N, H, W, 3] each, any N.
        """
        q, _ = self.encode(state.query, state.query_stats, x_q, training=False)
        k, _ = self.encode(state.key, state.key_stats, x_k, training=False, model=self.key_model)
        loss, l_pos, l_neg = _info_nce(q, k, state.queue, self.temperature)
        return _measure(loss, q, l_pos, l_neg, self.learning_rate(state.step), SingleReplica())

    def step(self, state: State, x_q: tf.Tensor, x_k: tf.Tensor, replica: Replica) -> tuple[State, Metrics]:
        """One step on this replica's views, uint8[N, H, W, 3] each; pure.

        The running statistics, which the authors' code leaves to replica 0, are averaged over the replicas.
        """
        with entered(replica):
            return self._step(state, x_q, x_k, replica)

    def _step(self, state: State, x_q: tf.Tensor, x_k: tf.Tensor, replica: Replica) -> tuple[State, Metrics]:
        # f_k follows the query weights from before this step's update
        with tf.name_scope("momentum_update"):
            key = [self.m * k + (1 - self.m) * q for k, q in zip(state.key, state.query, strict=True)]

        def f_k(x: tf.Tensor, stats: Tensors, training: bool = True) -> tuple[tf.Tensor, Tensors]:
            return self.encode(key, stats, x, training, self.key_model)

        seed = tf.stack([tf.constant(self.seed, tf.int32), state.step])
        memory = Memory(state.key_stats, state.query_stats, state.ring)
        keys = self.encode_keys(f_k, x_k, replica, seed, memory)
        k = tf.stop_gradient(keys.own)  # NxC
        k, x_q = one_after_the_other(k, x_q)

        with tf.GradientTape() as tape:
            tape.watch(state.query)
            with tf.name_scope("query_encoder"):
                q, query_stats = self.encode(state.query, state.query_stats, x_q)
            with tf.name_scope("loss"):
                # The negatives are those from before this step
                loss, l_pos, l_neg = _info_nce(q, k, state.queue, self.temperature)
        with tf.name_scope("gradients"):
            gradients = _averaged(tape.gradient(loss, state.query), self.model, replica)

        # SGD as in PyTorch: the decay is part of the gradient and covers every parameter
        with tf.name_scope("sgd"):
            rate = self.learning_rate(state.step)
            slots = [
                self.sgd_momentum * v + g + self.weight_decay * w
                for v, g, w in zip(state.slots, gradients, state.query, strict=True)
            ]
            query = [w - rate * v for w, v in zip(state.query, slots, strict=True)]

        with tf.name_scope("enqueue"):
            queue, pointer = enqueue(state.queue, state.pointer, keys.everyone)
        with tf.name_scope("statistics"):
            query_stats = mean(replica, query_stats)
        new = State(
            step=state.step + 1,
            query=query,
            query_stats=query_stats,
            key=key,
            key_stats=keys.stats,
            slots=slots,
            ring=keys.ring,
            queue=queue,
            pointer=pointer,
        )
        with tf.name_scope("metrics"):
            return new, _measure(loss, q, l_pos, l_neg, rate, replica)


def _averaged(gradients: Tensors, model: keras.Model, replica: Replica) -> Tensors:
    """Averages gradients over the replicas, those of kernels in the type of their layer's arithmetic.

    A kernel's gradient is a sum of products of activations, and no more precise than they are; vectors weigh nothing.
    """
    if replica.count == 1:
        return gradients
    dtypes = {id(v): layer.compute_dtype for layer in layers_of(model) for v in layer.trainable_variables}
    travelling = [
        tf.cast(g, dtypes[id(v)]) if len(v.shape) > 1 else g
        for g, v in zip(gradients, model.trainable_variables, strict=True)
    ]
    return [tf.cast(total, g.dtype) for total, g in zip(mean(replica, travelling), gradients, strict=True)]


def _info_nce(
    q: tf.Tensor, k: tf.Tensor, queue: tf.Tensor, temperature: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Loss and cosines with the positives and with the queue."""
    l_pos = tf.reduce_sum(q * k, axis=1, keepdims=True)  # Nx1
    l_neg = tf.matmul(q, tf.cast(queue, q.dtype), transpose_b=True)  # NxK
    logits = tf.concat([l_pos, l_neg], axis=1) / temperature  # Nx(1+K)
    labels = tf.zeros_like(logits[:, 0], tf.int32)  # the positive is the first
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)), l_pos, l_neg


def _measure(
    loss: tf.Tensor, q: tf.Tensor, l_pos: tf.Tensor, l_neg: tf.Tensor, rate: tf.Tensor, replica: Replica
) -> Metrics:
    behind = l_neg < l_pos - _TIE  # so that neither a collapsed network nor NaN finds the positive
    ahead = tf.reduce_sum(tf.cast(tf.logical_not(behind), tf.int32), axis=1)  # N
    top1, top5 = (tf.reduce_mean(tf.cast(ahead < k, tf.float32)) for k in (1, 5))
    local = (
        loss,
        top1,
        top5,
        tf.reduce_mean(l_pos),
        tf.reduce_mean(l_neg),
        tf.reduce_mean(q, 0),
        tf.reduce_mean(q**2, 0),
    )
    loss, top1, top5, positive, negative, first, second = mean(replica, local)
    std = tf.reduce_mean(tf.sqrt(tf.maximum(second - first**2, 0.0)))
    return Metrics(loss, top1, top5, positive, negative, 2 - 2 * positive, std, rate)


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """All layers, those inside of others too."""
    return list(model._flatten_layers(include_self=False, recursive=True))


def initial_state(
    model: keras.Model, queue_size: int, seed: int, *, ring: int = 0, queue_dtype: str = "float32"
) -> State:
    """The state before the first step: f_k a copy of f_q, head included; a queue of random unit keys.

    Args:
        model: holds the initial weights.
        queue_size: K.
        seed: of the queue.
        ring: key batches whose statistics are kept.
        queue_dtype: of the queue.
    """
    parameters = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
    stats = [tf.convert_to_tensor(v.value) for v in model.non_trainable_variables]
    noise = tf.random.stateless_normal([queue_size, model.output_shape[-1]], [seed, 0], alg="philox")
    return State(
        step=tf.zeros([], tf.int32),
        query=parameters,
        query_stats=stats,
        key=parameters,
        key_stats=stats,
        slots=[tf.zeros_like(p) for p in parameters],
        ring=[tf.repeat(s[tf.newaxis], ring, axis=0) for s in stats] if ring else [],
        queue=tf.cast(tf.math.l2_normalize(noise, axis=1), queue_dtype),
        pointer=tf.zeros([], tf.int32),
    )
