"""The MoCo step: order of the updates, shuffled BN, queue, and what several replicas do together."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_module.config import EncoderConfig, KeyBnMode, Precision, Schedule, Stem, TrainConfig
from trainer_module.driver import Driver, learning_rate
from trainer_module.encoder import build_encoder
from trainer_module.moco import MoCo, _averaged, initial_state
from trainer_module.replica import ContextReplica, SingleReplica, gather, own_rows
from trainer_module.shuffle import key_encoding, permutation
from trainer_module.strategy import make_strategy

BATCH, SIDE, QUEUE, M, T, LR, DECAY, SEED = 8, 16, 20, 0.9, 0.2, 0.1, 1e-2, 7


@pytest.fixture(scope="module")
def model(tiny_encoder):
    return tiny_encoder


@pytest.fixture(scope="module")
def views():
    rng = np.random.default_rng(5)
    return [tf.constant(rng.integers(0, 256, (BATCH, SIDE, SIDE, 3)), tf.uint8) for _ in range(2)]


def make_moco(model, mode=KeyBnMode.cross_replica_sum):
    return MoCo(model, (128.0,) * 3, (64.0,) * 3, key_encoding(mode), lambda _: tf.constant(LR), M, T, 0.9, DECAY, SEED)


def test_key_weights_start_as_a_copy_of_the_query_s_head_included(model):
    state = initial_state(model, QUEUE, 0)
    assert len(state.key) == len(model.trainable_variables)
    for q, k in zip(state.query, state.key, strict=True):
        np.testing.assert_array_equal(q, k)
    np.testing.assert_allclose(tf.norm(state.queue, axis=1), 1, rtol=1e-6)


def test_step_is_the_papers_in_order_and_arithmetic(model, views):
    moco, state = make_moco(model, KeyBnMode.none), initial_state(model, QUEUE, 0)
    state = state._replace(key=[k + 0.01 for k in state.key])  # so that the m-update shows
    new, metrics = moco.step(state, *views, SingleReplica())

    key = [M * k + (1 - M) * q for q, k in zip(state.query, state.key, strict=True)]
    k, _ = moco.encode(key, state.key_stats, views[1])
    with tf.GradientTape() as tape:
        tape.watch(state.query)
        q, _ = moco.encode(state.query, state.query_stats, views[0])
        logits = tf.concat([tf.reduce_sum(q * k, 1, keepdims=True), q @ tf.transpose(state.queue)], 1) / T
        loss = tf.reduce_mean(tf.reduce_logsumexp(logits, 1) - logits[:, 0])
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    for w, g, updated in zip(state.query, tape.gradient(loss, state.query), new.query, strict=True):
        np.testing.assert_allclose(updated, w - LR * (g + DECAY * w), atol=1e-5)
    for expected, updated in zip(key, new.key, strict=True):
        np.testing.assert_array_equal(expected, updated)
    np.testing.assert_allclose(new.queue[:BATCH], k, atol=1e-5)
    np.testing.assert_array_equal(new.queue[BATCH:], state.queue[BATCH:])
    assert (int(new.pointer), int(new.step)) == (BATCH, 1)


@pytest.mark.parametrize(("weights", "found"), [("sound", 1.0), ("collapsed", 0.0), ("nan", 0.0)])
def test_neither_a_collapsed_network_nor_nan_finds_its_positives(model, views, weights, found):
    """All embeddings are one where only the last bias is left; the order of two sums must not decide then."""
    moco, state = make_moco(model), initial_state(model, QUEUE, 0)
    if weights != "sound":
        bias = tf.random.stateless_normal(state.query[-1].shape, [3, 4])
        lost = [tf.zeros_like(w) for w in state.query[:-1]] + [bias if weights == "collapsed" else bias * np.nan]
        direction = tf.math.l2_normalize(bias)[tf.newaxis]
        state = state._replace(query=lost, key=lost, queue=tf.repeat(direction, QUEUE, axis=0))
    same = moco.evaluate(state, views[0], views[0])
    _, trained = moco.step(state, views[0], views[0], SingleReplica())
    for metrics in (same, trained):
        assert (float(metrics.pretext_top1), float(metrics.pretext_top5)) == (found, found)


def test_momentum_of_sgd_is_pytorchs(model, views):
    moco, state = make_moco(model), initial_state(model, QUEUE, 0)
    first, _ = moco.step(state, *views, SingleReplica())
    second, _ = moco.step(first, *views, SingleReplica())
    for w, v, updated in zip(first.query, second.slots, second.query, strict=True):
        np.testing.assert_allclose(updated, w - LR * v, atol=1e-6)


def test_enqueue_wraps_round_so_that_the_queue_need_not_be_a_multiple_of_the_batch(model, views):
    moco, state = make_moco(model), initial_state(model, QUEUE, 0)
    for _ in range(3):
        before, (state, _) = state, moco.step(state, *views, SingleReplica())
    assert int(state.pointer) == 3 * BATCH % QUEUE == 4
    np.testing.assert_array_equal(state.queue[4:16], before.queue[4:16])
    assert np.all(np.any(np.asarray(state.queue[:4] != before.queue[:4]), axis=1))
    assert np.all(np.any(np.asarray(state.queue[16:] != before.queue[16:]), axis=1))


@given(st.integers(0, 2**31 - 1), st.integers(1, 64))
@settings(max_examples=25, deadline=None)
def test_permutation_is_one_and_the_same_for_the_same_seed(seed, size):
    first, again = (permutation(tf.constant([seed, 9]), size) for _ in range(2))
    assert sorted(first.numpy()) == list(range(size))
    np.testing.assert_array_equal(first, again)


def in_each_replica(replicas, function):
    strategy = make_strategy(replicas)
    return strategy.experimental_local_results(tf.function(lambda: strategy.run(lambda: function(ContextReplica())))())


@pytest.mark.parametrize("replicas", [2, 4])
def test_gather_with_a_permutation_then_own_rows_shuffles_and_unshuffles_to_the_bit(replicas):
    n = 6
    rows = tf.constant(np.random.default_rng(0).normal(size=(replicas * n, 3)).astype("float32"))
    perm = permutation(tf.constant([1, 2]), replicas * n)

    def round_trip(replica):
        mine = own_rows(replica, rows)
        shuffled = own_rows(replica, gather(replica, mine, own_rows(replica, tf.math.invert_permutation(perm))))
        return shuffled, own_rows(replica, gather(replica, shuffled, own_rows(replica, perm)))

    results = in_each_replica(replicas, round_trip)
    np.testing.assert_array_equal(np.concatenate([r[0] for r in results]), tf.gather(rows, perm))
    np.testing.assert_array_equal(np.concatenate([r[1] for r in results]), rows)


def run_steps(model, views, replicas, mode, steps=2):
    strategy = make_strategy(replicas)
    config = TrainConfig(replicas=replicas, global_batch=BATCH, epochs=steps, queue=QUEUE)
    driver = Driver(make_moco(model, mode), config, strategy)
    data = tf.data.Dataset.from_tensors(tuple(views)).repeat()
    batches = iter(strategy.experimental_distribute_dataset(data.unbatch().batch(BATCH, drop_remainder=True)))
    step = driver.compiled_step()
    for _ in range(steps):
        metrics = step(batches)
    return driver.state(), metrics


def test_two_replicas_normalise_keys_with_other_images_than_their_queries(model, views):
    shuffled, _ = run_steps(model, views, 2, KeyBnMode.cross_replica_sum, 1)
    unshuffled, _ = run_steps(model, views, 2, KeyBnMode.none, 1)
    state = initial_state(model, QUEUE, 0)
    moco = make_moco(model)
    perm = permutation(tf.constant([SEED, 0]), BATCH)
    key = [M * k + (1 - M) * q for q, k in zip(state.query, state.key, strict=True)]
    x = tf.gather(views[1], perm)
    k = tf.concat([moco.encode(key, state.key_stats, half)[0] for half in (x[:4], x[4:])], 0)
    expected = tf.gather(k, tf.math.invert_permutation(perm))
    np.testing.assert_allclose(shuffled.queue[:BATCH], expected, atol=2e-5)
    assert np.abs(unshuffled.queue[:BATCH] - expected).max() > 1e-2


def test_two_replicas_take_the_gradient_of_the_global_batch(model, views):
    both, metrics = run_steps(model, views, 2, KeyBnMode.none, 1)
    moco, state = make_moco(model, KeyBnMode.none), initial_state(model, QUEUE, SEED)
    halves = [moco.step(state, views[0][s], views[1][s], SingleReplica()) for s in (slice(0, 4), slice(4, 8))]
    for i, w in enumerate(both.query):
        np.testing.assert_allclose(w, (halves[0][0].query[i] + halves[1][0].query[i]) / 2, atol=1e-5)
    np.testing.assert_allclose(metrics.loss, (halves[0][1].loss + halves[1][1].loss) / 2, rtol=1e-5)


@pytest.mark.parametrize("precision", list(Precision), ids=lambda p: p.name)
def test_gradients_of_kernels_travel_in_the_type_of_the_activations_and_are_averaged(precision):
    class Recording(ContextReplica):
        def sum(self, tree):
            if tf.get_current_name_scope().startswith("gradients"):
                travelled.append({(g.dtype.name, g.shape.rank > 1) for g in tree})
            return tf.nest.map_structure(lambda x: 2 * x, tree)

        count, index = 2, 0

        def __init__(self):
            pass

    travelled = []
    model = build_encoder(EncoderConfig("resnet18", Stem.cifar, width=4, dim=8), SIDE, precision, 0).model
    gradients = [tf.random.stateless_normal(v.shape, [i, 0]) for i, v in enumerate(model.trainable_variables)]
    with tf.name_scope("gradients"):
        averaged = _averaged(gradients, model, Recording())
    # The last layer, whose output is float32, has a float32 kernel in any precision.
    assert travelled == [{(precision.name, True), ("float32", True), ("float32", False)}]
    for before, after in zip(gradients, averaged, strict=True):
        assert after.dtype == before.dtype
        np.testing.assert_allclose(before, after, rtol=2**-8 if precision is Precision.bfloat16 else 0)


def test_cosine_schedule_goes_by_epochs_without_warm_up():
    rate = learning_rate(TrainConfig(epochs=10, learning_rate=1.0), steps_per_epoch=5)
    assert float(rate(tf.constant(0))) == float(rate(tf.constant(4))) == 1.0
    np.testing.assert_allclose(rate(tf.constant(25)), 0.5, atol=1e-6)


def test_step_schedule_falls_by_ten_at_each_milestone():
    config = TrainConfig(epochs=200, learning_rate=1.0, schedule=Schedule.step, milestones=(120, 160))
    rate = learning_rate(config, steps_per_epoch=2)
    np.testing.assert_allclose([float(rate(tf.constant(2 * e))) for e in (119, 120, 160)], [1, 0.1, 0.01], rtol=1e-5)
