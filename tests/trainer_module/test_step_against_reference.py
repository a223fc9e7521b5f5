"""The TensorFlow step against a float64 NumPy reading of the papers, tensor by tensor, for 1, 2, 4 and 8 replicas.

Errors are relative to the largest entry of each tensor. In float64 the two agree to 1e-14; the tolerance is 1e-11. The
same step as it trains, in float32 through the driver, is off by up to 5e-6 after five steps; its tolerance is 1e-4. The
smallest of the slips below moves a tensor by 1e-2.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference import STATS, WEIGHTS, Outcome, Reference, State, info_nce, pairs_of_views

from pipeline.bench import _float64
from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.config import KeyBnMode, TrainConfig
from trainer_module.driver import Driver
from trainer_module.moco import MoCo
from trainer_module.shuffle import key_encoding, permutation
from trainer_module.strategy import make_strategy

STEPS, BATCH, SIDE, QUEUE, DIM = 5, 16, 8, 40, 12  # the third batch wraps round the queue's end
MEAN, STD = 128.0, 64.0  # a power of two, so that normalised pixels are exact in float32
SETTINGS = {"m": 0.9, "temperature": 0.2, "sgd_momentum": 0.9, "weight_decay": 1e-2}
RATE, SEED = 0.1, 7
TOLERANCE_FLOAT64, TOLERANCE_FLOAT32 = 1e-11, 1e-4


# The TensorFlow side.


def encoder():
    """The reference's architecture, with weights that are far from their defaults."""
    image = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(6, 3, strides=2, use_bias=False)(keras.layers.ZeroPadding2D(1)(image))
    x = keras.layers.ReLU()(FusedBatchNormalization()(x))
    y = FusedBatchNormalization()(keras.layers.Conv2D(6, 3, padding="same", use_bias=False)(x))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(keras.layers.Add()([x, y])))
    model = keras.Model(image, keras.layers.Dense(DIM)(x))
    rng = np.random.default_rng(11)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(1.0 if "gamma" in variable.path else 0.0, 0.3, variable.shape))
    return model


def moco(model, dtype):
    return MoCo(
        model=model,
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        encode_keys=key_encoding(KeyBnMode.cross_replica_sum),
        learning_rate=lambda _: tf.constant(RATE, dtype),
        seed=SEED,
        **SETTINGS,
    )


@pytest.fixture(scope="module")
def views():
    return pairs_of_views(STEPS, BATCH, SIDE)


def run_float64(replicas, views):
    """The pure step in float64, with the state passed in and out."""
    model = _float64.in_float64(encoder())
    start = _float64.start(model, QUEUE, SEED)
    steps = list(_float64.run(moco(model, tf.float64), start, views, make_strategy(replicas)))
    states = [start, *(state for state, _ in steps)]
    return [numpy_state(state) for state in states], [float(metrics.loss) for _, metrics in steps]


def run_float32(replicas, views):
    """The step as it trains: float32, fused BN, the driver's variables under a strategy."""
    strategy, model = make_strategy(replicas), encoder()
    config = TrainConfig(replicas=replicas, global_batch=BATCH, queue=QUEUE)
    driver = Driver(moco(model, tf.float32), config, strategy)
    data = tf.data.Dataset.from_tensor_slices((views[:, 0], views[:, 1]))
    batches = iter(strategy.experimental_distribute_dataset(data))
    step, states, losses = driver.compiled_step(), [driver.state()], []
    for _ in views:
        losses.append(float(step(batches).loss))
        states.append(driver.state())
    return [numpy_state(state) for state in states], losses


@pytest.fixture(scope="module")
def trained(views):
    """`run_float32` of so many replicas, run once."""
    return functools.cache(lambda replicas: run_float32(replicas, views))


def numpy_state(state):
    """A state of trainer_module.moco as one of the reference, which names its tensors."""

    def named(names, values):
        return {name: np.asarray(value, np.float64) for name, value in zip(names, values, strict=True)}

    return State(
        query=named(WEIGHTS, state.query),
        key=named(WEIGHTS, state.key),
        query_stats=named(STATS, state.query_stats),
        key_stats=named(STATS, state.key_stats),
        slots=named(WEIGHTS, state.slots),
        queue=np.asarray(state.queue, np.float64),
        pointer=int(state.pointer),
        step=int(state.step),
    )


# The comparison.


def run_reference(reference, start, views):
    """The reference's steps from a state."""
    outcomes, state = [], start
    for x_q, x_k in (views.astype(np.float64) - MEAN) / STD:
        perm = permutation(tf.constant([SEED, state.step]), BATCH).numpy()
        outcomes.append(reference.step(state, x_q, x_k, perm))
        state = outcomes[-1].state
    return outcomes


def gradients_of(before, after):
    """The gradient that SGD took, from its slots: v' = mu v + g + decay w."""
    return {
        name: after.slots[name]
        - SETTINGS["sgd_momentum"] * before.slots[name]
        - SETTINGS["weight_decay"] * before.query[name]
        for name in WEIGHTS
    }


def tensors_of(outcome: Outcome):
    """Every tensor of an outcome with its name."""
    for part, value in {**outcome.state._asdict(), "gradients": outcome.gradients, "loss": outcome.loss}.items():
        for name, tensor in value.items() if isinstance(value, dict) else (("", value),):
            yield f"{part} {name}", np.asarray(tensor)


def assert_equal(states, losses, outcomes, tolerance):
    """Compares every tensor of every step; errors are relative to the largest entry of the expected tensor."""
    for i, expected in enumerate(outcomes):
        got = Outcome(states[i + 1], losses[i], gradients_of(states[i], states[i + 1]))
        for (name, want), (_, have) in zip(tensors_of(expected), tensors_of(got), strict=True):
            error = np.abs(have - want).max() / max(np.abs(want).max(), 1e-3)
            assert error <= tolerance, f"step {i + 1}: {name} is off by {error:.1e}"


def reference_of(replicas, kind=Reference):
    return kind(replicas=replicas, learning_rate=RATE, **SETTINGS)


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_the_step_in_float64_is_the_reference_s_tensor_by_tensor(replicas, views):
    states, losses = run_float64(replicas, views)
    assert_equal(states, losses, run_reference(reference_of(replicas), states[0], views), TOLERANCE_FLOAT64)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_step_as_it_trains_is_the_reference_s_tensor_by_tensor(replicas, views, trained):
    states, losses = trained(replicas)
    assert_equal(states, losses, run_reference(reference_of(replicas), states[0], views), TOLERANCE_FLOAT32)


# What the comparison can see: slips that ports of MoCo have made, as variations of the reference.


class MomentumAfterOptimizer(Reference):
    """The keys are made first; then f_k follows the query weights that the optimizer has written."""

    def step(self, state, x_q, x_k, perm):
        outcome = _LaggingKey(**vars(self)).step(state, x_q, x_k, perm)
        key = self.momentum_update(state.key, outcome.state.query)
        return outcome._replace(state=outcome.state._replace(key=key))


class _LaggingKey(Reference):
    def momentum_update(self, key, query):
        del query
        return key


class NegativesAfterEnqueue(Reference):
    """The keys of this batch are among its negatives."""

    def negatives(self, before, after):
        del before
        return after


class DecayWithoutTheHalf(Reference):
    """Keras's l2(w), whose gradient is 2 w."""

    def decay(self, name):
        return 2 * super().decay(name)


class NoDecayOnBatchNorm(Reference):
    """Decay on kernels only."""

    def decay(self, name):
        return 0.0 if name.startswith("bn") or name.endswith("bias") else self.weight_decay


class DecoupledDecay(Reference):
    """Decay beside the momentum buffer instead of inside it."""

    def sgd(self, state, gradients):
        slots, query = Reference(**{**vars(self), "weight_decay": 0.0}).sgd(state, gradients)
        return slots, {n: w - self.learning_rate * self.weight_decay * state.query[n] for n, w in query.items()}


class KeyBatchNormInInference(Reference):
    """What `trainable = False` does to a Keras layer: the keys are normalised by the running statistics."""

    def encode_keys(self, key, state, x_k, perm):
        return _Inference(**vars(self)).encode_keys(key, state, x_k, perm)


class _Inference(Reference):
    def batch_norm(self, name, weights, stats, x):
        scale = weights[f"{name}.gamma"] / np.sqrt(stats[f"{name}.variance"] + self.epsilon)
        kept = {part: stats[part] for part in (f"{name}.mean", f"{name}.variance")}
        return (x - stats[f"{name}.mean"]) * scale + weights[f"{name}.beta"], kept, None


class StatisticsFollowTheQuery(Reference):
    """f_k's running statistics are a moving average of f_q's."""

    def step(self, state, x_q, x_k, perm):
        outcome = super().step(state, x_q, x_k, perm)
        of_query = outcome.state.query_stats
        stats = {name: self.m * state.key_stats[name] + (1 - self.m) * of_query[name] for name in STATS}
        return outcome._replace(state=outcome.state._replace(key_stats=stats))


class NoShuffling(Reference):
    """Keys are normalised in the group of their queries."""

    def encode_keys(self, key, state, x_k, perm):
        return super().encode_keys(key, state, x_k, np.arange(len(perm)))


class KeysStayShuffled(Reference):
    """The keys are enqueued in the order in which they were encoded."""

    def enqueue(self, state, k, perm):
        return super().enqueue(state, k[perm], perm)


SLIPS = (
    MomentumAfterOptimizer,
    NegativesAfterEnqueue,
    DecayWithoutTheHalf,
    NoDecayOnBatchNorm,
    DecoupledDecay,
    KeyBatchNormInInference,
    StatisticsFollowTheQuery,
    NoShuffling,
    KeysStayShuffled,
)


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.__name__)
def test_the_comparison_sees_the_slips_that_ports_have_made(slip, views, trained):
    states, losses = trained(2)
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(states, losses, run_reference(reference_of(2, slip), states[0], views), TOLERANCE_FLOAT32)


def test_the_reference_s_gradient_is_that_of_finite_differences(views):
    reference, rng = reference_of(4), np.random.default_rng(3)
    x_q, x_k = (views[0].astype(np.float64) - MEAN) / STD
    weights = {
        name: rng.normal(1.0 if name.endswith("gamma") else 0.0, 0.3, shape)
        for name, shape in zip(WEIGHTS, [(3, 3, 3, 6), 6, 6, (3, 3, 6, 6), 6, 6, (6, DIM), DIM], strict=True)
    }
    stats = {name: np.full(6, float(name.endswith("variance"))) for name in STATS}
    queue = rng.normal(size=(QUEUE, DIM))
    state = State(weights, weights, stats, stats, {n: 0 * w for n, w in weights.items()}, queue, 0, 0)
    key = reference.momentum_update(state.key, state.query)
    perm = rng.permutation(BATCH)
    keys, _ = reference.encode_keys(key, state, x_k, perm)

    def loss_at(query):
        q, _, _ = reference.encode(query, stats, x_q)
        return info_nce(q, keys, queue, SETTINGS["temperature"])[0]

    gradients = reference.step(state, x_q, x_k, perm).gradients
    for name in WEIGHTS:
        direction, h = rng.normal(size=weights[name].shape), 1e-6
        ends = [loss_at({**weights, name: weights[name] + sign * h * direction}) for sign in (1, -1)]
        np.testing.assert_allclose((gradients[name] * direction).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-6)
