"""One MoCo step in float64 NumPy, forward and backward by hand: what the TensorFlow step has to agree with.

Written from the papers (arXiv 1911.05722, algorithm 1 and section 3.3; 2003.04297; 1502.03167 for batch normalisation),
not from trainer_module.moco: where that works replica by replica with sums between them, this holds the whole global
batch and the groups that batch normalisation sees.

B: global batch, R: replicas, C: size of an embedding, K: keys in the queue. Images are float64[B, H, W, 3], normalised.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]
Stats = dict[str, Array]
Backward = Callable[[Array], Array]

WEIGHTS = ("conv1", "bn1.gamma", "bn1.beta", "conv2", "bn2.gamma", "bn2.beta", "fc.kernel", "fc.bias")
STATS = ("bn1.mean", "bn1.variance", "bn2.mean", "bn2.variance")


class State(NamedTuple):
    """What a step changes; the names are the paper's.

    Attributes:
        query, key: weights of f_q and f_k, by WEIGHTS.
        query_stats, key_stats: BN running statistics, by STATS.
        slots: momentum buffers of SGD, by WEIGHTS.
        queue: [K, C].
        pointer: where the next keys go.
        step: steps done.
    """

    query: Weights
    key: Weights
    query_stats: Stats
    key_stats: Stats
    slots: Weights
    queue: Array
    pointer: int
    step: int


class Outcome(NamedTuple):
    """The state after a step, the loss, and its gradient with respect to f_q's weights before the step."""

    state: State
    loss: float
    gradients: Weights


# The small encoder, layer by layer: each returns its output and the way back from d loss / d output.


def convolve(x: Array, kernel: Array, stride: int) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """3x3 convolution, one pixel of zeros on every side: [N, H, W, C], [3, 3, C, F] -> [N, H', W', F].

    The way back gives (d x, d kernel).
    """
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = ((side - 1) // stride + 1 for side in x.shape[1:3])
    windows = {
        (i, j): (slice(None), slice(i, i + stride * height, stride), slice(j, j + stride * width, stride))
        for i in range(3)
        for j in range(3)
    }
    y = sum(padded[window][:, :height, :width] @ kernel[at] for at, window in windows.items())

    def back(dy: Array) -> tuple[Array, Array]:
        d_padded, d_kernel = np.zeros_like(padded), np.zeros_like(kernel)
        for at, window in windows.items():
            d_padded[window] += dy @ kernel[at].T
            d_kernel[at] = np.einsum("nhwc,nhwf->cf", padded[window], dy)
        return d_padded[:, 1:-1, 1:-1], d_kernel

    return y, back


def normalise(
    x: Array, gamma: Array, beta: Array, epsilon: float
) -> tuple[Array, Array, Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Batch normalisation of one group by its own statistics: [N, H, W, C] -> the same shape, mean[C], variance[C].

    The group is normalised by the biased variance; the unbiased one, for the running statistics, is returned. The way
    back gives (d x, d gamma, d beta).
    """
    axes, count = (0, 1, 2), x[..., 0].size
    mean, variance = x.mean(axes), x.var(axes)
    scale = 1 / np.sqrt(variance + epsilon)
    unit = (x - mean) * scale

    def back(dy: Array) -> tuple[Array, Array, Array]:
        d_gamma, d_beta = (dy * unit).sum(axes), dy.sum(axes)
        return gamma * scale * (dy - d_beta / count - unit * d_gamma / count), d_gamma, d_beta

    return gamma * unit + beta, mean, variance * count / (count - 1), back


def unit_length(x: Array) -> tuple[Array, Backward]:
    """x / |x| for each row of [N, C], and the way back."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    y = x / length
    return y, lambda dy: (dy - y * (dy * y).sum(1, keepdims=True)) / length


def info_nce(q: Array, k: Array, negatives: Array, temperature: float) -> tuple[float, Array]:
    """The loss of equation 1, averaged over the batch, and its gradient with respect to q.

    Args:
        q, k: [B, C], unit rows; row i of k is the positive of row i of q.
        negatives: [K, C].
        temperature: T.
    """
    candidates = np.concatenate([k[:, None], np.broadcast_to(negatives, (len(k), *negatives.shape))], axis=1)
    logits = np.einsum("bc,bkc->bk", q, candidates) / temperature  # Bx(1+K), the positive first
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    loss = -np.log(weights[:, 0]).mean()
    d_logits = weights / len(q)
    d_logits[:, 0] -= 1 / len(q)
    return float(loss), np.einsum("bk,bkc->bc", d_logits, candidates) / temperature


@dataclasses.dataclass(frozen=True)
class Reference:
    """MoCo with conv3x3 / stride -> BN -> ReLU -> residual (conv3x3 -> BN) -> ReLU -> average -> linear -> unit length.

    Attributes:
        replicas: R, groups that batch normalisation sees.
        m, temperature: the paper's.
        learning_rate, sgd_momentum, weight_decay: of SGD.
        stride: of the first convolution.
        epsilon: of BN.
        stats_momentum: share of the running statistics that stays at each step.
    """

    replicas: int
    m: float
    temperature: float
    learning_rate: float
    sgd_momentum: float
    weight_decay: float
    stride: int = 2
    epsilon: float = 1e-5
    stats_momentum: float = 0.9

    def step(self, state: State, x_q: Array, x_k: Array, perm: Array) -> Outcome:
        """One step on the views x_q and x_k of one global batch.

        Args:
            state: before the step.
            x_q, x_k: [B, H, W, 3].
            perm: [B], the order in which the key views are dealt to the replicas (section 3.3).
        """
        key = self.momentum_update(state.key, state.query)
        q, query_stats, back = self.encode(state.query, state.query_stats, x_q)
        k, key_stats = self.encode_keys(key, state, x_k, perm)
        queue, pointer = self.enqueue(state, k, perm)
        loss, d_q = info_nce(q, k, self.negatives(state.queue, queue), self.temperature)
        gradients = back(d_q)
        slots, query = self.sgd(state, gradients)
        return Outcome(
            State(query, key, query_stats, key_stats, slots, queue, pointer, state.step + 1), loss, gradients
        )

    def momentum_update(self, key: Weights, query: Weights) -> Weights:
        """Equation 2: the key encoder follows the query encoder."""
        return {name: self.m * key[name] + (1 - self.m) * query[name] for name in WEIGHTS}

    def encode(self, weights: Weights, stats: Stats, x: Array) -> tuple[Array, Stats, Callable[[Array], Weights]]:
        """f(x) where each replica normalises its own rows by their statistics.

        Returns:
            Unit embeddings [B, C]; the running statistics, averaged over the replicas; from d embeddings to d weights.
        """
        passes = [self._encode_group(weights, stats, group) for group in np.split(x, self.replicas)]
        embeddings, new_stats, backs = zip(*passes, strict=True)

        def back(d_embeddings: Array) -> Weights:
            shares = [b(d) for b, d in zip(backs, np.split(d_embeddings, self.replicas), strict=True)]
            return {name: sum(share[name] for share in shares) for name in WEIGHTS}

        averaged = {name: np.mean([s[name] for s in new_stats], axis=0) for name in STATS}
        return np.concatenate(embeddings), averaged, back

    def encode_keys(self, key: Weights, state: State, x_k: Array, perm: Array) -> tuple[Array, Stats]:
        """Shuffled BN: the keys [B, C] in the order of their queries, and f_k's running statistics."""
        shuffled, stats, _ = self.encode(key, state.key_stats, x_k[perm])
        k = np.empty_like(shuffled)
        k[perm] = shuffled
        return k, stats

    def negatives(self, before: Array, after: Array) -> Array:
        """The queue that the queries are told from: as it was before this batch was enqueued."""
        del after
        return before

    def enqueue(self, state: State, k: Array, perm: Array) -> tuple[Array, int]:
        """The newest keys replace the oldest, in the order of the batch; round the end if need be."""
        del perm
        queue, pointer = state.queue.copy(), state.pointer
        for row in k:
            queue[pointer] = row
            pointer = (pointer + 1) % len(queue)
        return queue, pointer

    def decay(self, name: str) -> float:
        """Weight decay of a parameter: the same for all."""
        del name
        return self.weight_decay

    def sgd(self, state: State, gradients: Weights) -> tuple[Weights, Weights]:
        """SGD as in PyTorch: v = mu v + (g + decay w); w = w - rate v. Returns v and w."""
        slots = {
            name: self.sgd_momentum * state.slots[name] + gradients[name] + self.decay(name) * state.query[name]
            for name in WEIGHTS
        }
        return slots, {name: state.query[name] - self.learning_rate * slots[name] for name in WEIGHTS}

    def batch_norm(
        self, name: str, weights: Weights, stats: Stats, x: Array
    ) -> tuple[Array, Stats, Callable[[Array], tuple[Array, Array, Array]]]:
        """One group through one layer in training mode: output, the layer's new running statistics, the way back."""
        y, mean, variance, back = normalise(x, weights[f"{name}.gamma"], weights[f"{name}.beta"], self.epsilon)
        seen, keep = {f"{name}.mean": mean, f"{name}.variance": variance}, self.stats_momentum
        return y, {part: keep * stats[part] + (1 - keep) * value for part, value in seen.items()}, back

    def _encode_group(
        self, weights: Weights, stats: Stats, x: Array
    ) -> tuple[Array, Stats, Callable[[Array], Weights]]:
        a1, conv1_back = convolve(x, weights["conv1"], self.stride)
        n1, stats1, bn1_back = self.batch_norm("bn1", weights, stats, a1)
        r1 = np.maximum(n1, 0)
        a2, conv2_back = convolve(r1, weights["conv2"], 1)
        n2, stats2, bn2_back = self.batch_norm("bn2", weights, stats, a2)
        r2 = np.maximum(r1 + n2, 0)
        pooled = r2.mean((1, 2))
        embedding, unit_back = unit_length(pooled @ weights["fc.kernel"] + weights["fc.bias"])

        def back(d_embedding: Array) -> Weights:
            d = {}
            d_head = unit_back(d_embedding)
            d["fc.kernel"], d["fc.bias"] = pooled.T @ d_head, d_head.sum(0)
            d_pooled = d_head @ weights["fc.kernel"].T
            d_r2 = d_pooled[:, None, None] / r2[0, ..., 0].size * (r2 > 0)
            d_a2, d["bn2.gamma"], d["bn2.beta"] = bn2_back(d_r2)
            d_r1, d["conv2"] = conv2_back(d_a2)
            d_a1, d["bn1.gamma"], d["bn1.beta"] = bn1_back((d_r2 + d_r1) * (r1 > 0))
            _, d["conv1"] = conv1_back(d_a1)
            return d

        return embedding, {**stats1, **stats2}, back


def pairs_of_views(steps: int, batch: int, side: int) -> Array:
    """uint8[steps, 2, batch, side, side, 3]: pairs of different brightness, so that BN groups matter."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (steps, 1, batch, side, side, 3)) * rng.uniform(0.2, 1, (steps, 1, batch, 1, 1, 3))
    return np.clip(images + rng.normal(0, 20, (steps, 2, batch, side, side, 3)), 0, 255).astype(np.uint8)
