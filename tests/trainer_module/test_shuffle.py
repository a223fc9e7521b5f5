"""Key-BN modes: shuffles that lose nothing, agree everywhere and mix as a uniform one; and what the others promise."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_module import shuffle
from trainer_module.batch_norm import FusedBatchNormalization, ShuffledBatchNorm, SplitBatchNormalization, batch_norms
from trainer_module.build import build, first_state
from trainer_module.config import (
    EncoderConfig,
    Head,
    KeyBnConfig,
    KeyBnMode,
    TrainConfig,
    recommended,
    shuffles_replicas,
)
from trainer_module.replica import SingleReplica, gather, own_rows
from trainer_module.shuffle import Memory, key_encoding, permutation

pytestmark = pytest.mark.long

MOVING = (KeyBnMode.cross_replica_sum, KeyBnMode.all_to_all, KeyBnMode.butterfly, KeyBnMode.auto, KeyBnMode.host)
BALANCED = (KeyBnMode.all_to_all, KeyBnMode.butterfly, KeyBnMode.auto)
NOTHING = Memory([], [], [])
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 4))  # replicas, rows a replica over replicas
SEEDS = st.integers(0, 2**31 - 1)


def keys_of_steps(in_lockstep, mode, count, n, seed, steps):
    """Keys that tell their row and the replica that encoded them: for each step, (own, everyone) of each replica."""
    rows = tf.range(count * n)
    views = [tf.cast(rows, tf.uint8)[:, tf.newaxis]] * 2
    arriving = [views[1] for _ in steps]
    if mode is KeyBnMode.host:
        batches = tf.data.Dataset.from_tensors(tuple(views)).repeat(len(steps))
        arriving = [key for _, key in shuffle.shuffle_keys(batches, seed, steps[0])]

    def of_step(x, step):
        def one(replica):
            def f_k(x, stats, training=True):
                where = tf.fill(tf.shape(x), tf.cast(replica.index, tf.float32))
                return tf.concat([tf.cast(x, tf.float32), where], 1), stats

            keys = key_encoding(mode)(f_k, own_rows(replica, x), replica, tf.stack([seed, step]), NOTHING)
            return keys.own, keys.everyone

        return in_lockstep(count, one)

    # What is run once is not worth a graph.
    run = tf.function(of_step, autograph=False) if len(steps) > 1 else of_step
    each = [run(x, tf.constant(step)) for x, step in zip(arriving, steps, strict=True)]
    return tf.nest.map_structure(lambda keys: keys.numpy(), each)


def groups_of_steps(in_lockstep, mode, count, n, seed, steps):
    """For each step, the replica that encodes each row."""
    return [results[0][1][:, 1].astype(int) for results in keys_of_steps(in_lockstep, mode, count, n, seed, steps)]


@pytest.mark.parametrize("mode", MOVING)
@given(sizes=SIZES, seed=SEEDS, step=st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_every_key_comes_back_to_its_query_to_the_bit_and_all_replicas_agree(in_lockstep, mode, sizes, seed, step):
    count, share = sizes
    if mode is KeyBnMode.butterfly:
        count = 2 ** (count // 2)
    n = count * share * (1 + share * count % 2)
    (results,) = keys_of_steps(in_lockstep, mode, count, n, seed, [step])
    everyone = results[0][1]
    np.testing.assert_array_equal(everyone[:, 0], np.arange(count * n))
    for index, (own, theirs) in enumerate(results):
        np.testing.assert_array_equal(theirs, everyone)
        np.testing.assert_array_equal(own, everyone[index * n : (index + 1) * n])
    # Equal shares: every replica normalises n keys.
    np.testing.assert_array_equal(np.bincount(everyone[:, 1].astype(int)), [n] * count)


@pytest.mark.parametrize("mode", [KeyBnMode.cross_replica_sum, KeyBnMode.all_to_all, KeyBnMode.butterfly])
@given(stages=st.integers(0, 3), share=st.integers(1, 2), side=st.integers(1, 5), seed=SEEDS)
@settings(max_examples=12, deadline=None)
def test_unshuffling_what_was_shuffled_gives_every_pixel_back(in_lockstep, mode, stages, share, side, seed):
    count, n = 2**stages, 2**stages * share * 2
    pixels = tf.constant(np.random.default_rng(seed).integers(0, 256, (count * n, side, 3, 3)), tf.uint8)
    seen = in_lockstep(
        count,
        lambda replica: (
            key_encoding(mode)(
                lambda x, stats: (tf.reshape(tf.cast(x, tf.float32), [n, -1]), stats),
                own_rows(replica, pixels),
                replica,
                tf.constant([seed, 3]),
                NOTHING,
            ).own
        ),
    )
    np.testing.assert_array_equal(np.concatenate(seen), tf.reshape(tf.cast(pixels, tf.float32), [count * n, -1]))


def tables_of(groups_of_step, count, n):
    """For each step, of each replica's keys how many each replica encodes: [R, R]."""
    home = np.repeat(np.arange(count), n)
    return np.array([np.bincount(count * home + g, minlength=count**2).reshape(count, count) for g in groups_of_step])


def uniform_tables(count, n, seed, draws):
    """As tables_of, of uniform permutations."""
    home, rng = np.repeat(np.arange(count), n), np.random.default_rng(seed)
    return tables_of([rng.permutation(home) for _ in range(draws)], count, n)


def shared_partners(tables):
    """Mean share of a key's BN group that is its query's own group, over the keys of all steps."""
    return np.mean(np.sum(tables**2 / np.maximum(tables.sum(1, keepdims=True), 1), axis=(1, 2))) / tables[0].sum()


@pytest.mark.parametrize("mode", MOVING)
def test_a_key_s_group_is_drawn_as_by_a_uniform_shuffle(in_lockstep, mode):
    count, n, steps = 4, 8, 40
    groups = groups_of_steps(in_lockstep, mode, count, n, 11, range(steps))
    tables = tables_of(groups, count, n)
    stays = np.mean([np.trace(table) for table in tables]) / (count * n)
    # A key stays with its query's replica in 1 of R draws; sqrt of the variance over 1,280 keys is 0.012.
    assert stays == pytest.approx(1 / count, abs=0.05)
    expected, shared = shared_partners(uniform_tables(count, n, 0, 400)), shared_partners(tables)
    if mode in BALANCED:  # as many of each replica's rows everywhere: no group has more of one than it must
        assert shared <= expected + 0.02
    else:
        assert shared == pytest.approx(expected, abs=0.02)
    # Another step, another draw.
    assert len({tuple(g) for g in groups}) == steps


@pytest.mark.parametrize("count", [8, 16])
def test_a_butterfly_spreads_each_core_s_keys_evenly_over_all(in_lockstep, count):
    """Of each core's n keys every core gets n / R on average; the spread of that number is at most a uniform draw's."""
    n, steps = 8, 12
    tables = tables_of(groups_of_steps(in_lockstep, KeyBnMode.butterfly, count, n, 5, range(steps)), count, n)
    assert np.mean(tables, axis=(0, 1)) == pytest.approx(n / count, rel=0.6)
    assert np.var(tables) <= 1.1 * np.var(uniform_tables(count, n, 1, 200))
    # As likely to stay as to go to any other core.
    assert np.mean([np.trace(t) for t in tables]) == pytest.approx(n, abs=4 * np.sqrt(n / steps))


def test_four_pixels_travel_in_an_integer_and_come_back_to_the_bit():
    for shape in ((2, 3, 5, 3), (1, 1, 1, 3), (3, 4, 4, 3)):
        pixels = np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)
        pixels.flat[0] = 255
        packed = shuffle.pack_pixels(tf.constant(pixels))
        assert packed.dtype == tf.int32
        assert packed.shape == (shape[0], -(-shape[1] // 4) * np.prod(shape[2:]))
        np.testing.assert_array_equal(shuffle.unpack_pixels(packed, tf.TensorShape(shape)), pixels)


def test_auto_is_the_mode_with_the_least_traffic_that_the_replicas_allow():
    modes = {(r, n): recommended(r, n) for r, n in ((8, 32), (8, 12), (256, 32), (6, 10), (8, 3), (1, 5))}
    assert modes == {
        (8, 32): KeyBnMode.all_to_all,
        (8, 12): KeyBnMode.butterfly,
        (256, 32): KeyBnMode.butterfly,
        (6, 10): KeyBnMode.cross_replica_sum,
        (8, 3): KeyBnMode.cross_replica_sum,
        (1, 5): KeyBnMode.all_to_all,
    }


def test_moving_whole_shards_round_the_cores_leaks_and_is_no_mode(in_lockstep):
    """The key's group stays its query's set of images, so its batch normalisation is that of no shuffle, to the bit."""
    count, n = 4, 8
    x = tf.constant(np.random.default_rng(0).integers(0, 256, (count * n, 2, 2, 3)), tf.uint8)
    norm = FusedBatchNormalization()
    norm.build((n, 2, 2, 3))

    def f_k(images, stats, training=True):
        normal, _ = norm.normalize_by_itself(tf.cast(images, tf.float32))
        return tf.reshape(normal, [n, -1]), stats

    def rotate(f_k, x_k, replica, seed, memory):
        home = replica.index * n + tf.range(n)
        places = (home + n) % (count * n)
        own = own_rows(replica, gather(replica, tf.cast(x_k, tf.int32), places))
        k, stats = f_k(tf.cast(own, tf.uint8), memory.key)
        everyone = gather(replica, k, (home - n) % (count * n))
        return shuffle.Keys(own_rows(replica, everyone), everyone, stats, memory.ring)

    def keys_of(encode):
        args = tf.constant([3, 1]), NOTHING
        return in_lockstep(count, lambda r: encode(f_k, own_rows(r, x), r, *args).everyone.numpy())[0]

    leaking = keys_of(key_encoding(KeyBnMode.none))
    np.testing.assert_array_equal(keys_of(rotate), leaking)
    # Whatever shuffles on the cores parts from it; `host` has its views shuffled before.
    for mode in (mode for mode in KeyBnMode if shuffles_replicas(mode) and mode is not KeyBnMode.host):
        assert np.abs(keys_of(key_encoding(mode)) - leaking).max(1).min() > 1e-3, mode


# Whole steps with a real network.

SIDE, BATCH, QUEUE = 8, 12, 30
SMALL = EncoderConfig(name="pipeline.tpu.small_encoder.two_convolutions", head=Head.v1, dim=8)


def networks(mode, seed=0, **values):
    key_bn = KeyBnConfig(mode, groups=values.pop("groups", 3), ring=values.pop("ring", 4))
    train = TrainConfig(replicas=1, global_batch=BATCH, epochs=1, queue=QUEUE, momentum=0.9, key_bn=key_bn, **values)
    built = build(SMALL, train, SIDE, (128.0,) * 3, (64.0,) * 3, lambda _: tf.constant(0.05), seed)
    return built.moco, first_state(built.moco, train)


@pytest.fixture(scope="module")
def views():
    rng = np.random.default_rng(5)
    return [tf.constant(rng.integers(0, 256, (BATCH, SIDE, SIDE, 3)), tf.uint8) for _ in range(2)]


def step_of(in_lockstep, mode, views, count=1, steps=1, **values):
    moco, start = networks(mode, **values)

    def one(replica):
        state = start
        for _ in range(steps):
            state, metrics = moco.step(state, own_rows(replica, views[0]), own_rows(replica, views[1]), replica)
        return state, metrics

    return in_lockstep(count, one)


@pytest.mark.parametrize("mode", [mode for mode in KeyBnMode if mode is not KeyBnMode.host])
def test_every_mode_trains_and_leaves_all_replicas_with_one_state(in_lockstep, mode, views):
    (first, metrics), (second, _) = step_of(in_lockstep, mode, views, count=2, steps=2, groups=2)
    for one, other in zip(tf.nest.flatten(first), tf.nest.flatten(second), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isfinite(metrics.loss)
    assert int(first.step) == 2


def test_split_on_one_device_is_that_many_replicas(in_lockstep, views):
    """The same permutation, groups in place of replicas: the same keys and weights."""
    (alone, _), *_ = step_of(in_lockstep, KeyBnMode.split, views, groups=3)
    (together, _), *_ = step_of(in_lockstep, KeyBnMode.cross_replica_sum, views, count=3)
    for one, other in zip(tf.nest.flatten(alone), tf.nest.flatten(together), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_sync_over_replicas_is_plain_normalisation_of_the_global_batch(in_lockstep, views):
    (together, _), *_ = step_of(in_lockstep, KeyBnMode.sync, views, count=3)
    (alone, _), *_ = step_of(in_lockstep, KeyBnMode.none, views)
    for one, other in zip(tf.nest.flatten(together), tf.nest.flatten(alone), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_ema_keys_follow_the_query_s_running_statistics_and_not_the_batch(views):
    moco, start = networks(KeyBnMode.ema)
    start = start._replace(query_stats=[s + 0.5 for s in start.query_stats])
    new, _ = moco.step(start, *views, SingleReplica())
    for key, query, now in zip(start.key_stats, start.query_stats, new.key_stats, strict=True):
        np.testing.assert_allclose(now, 0.9 * key + 0.1 * query, rtol=1e-6)
    other = tf.concat([views[1][:1], 255 - views[1][1:]], 0)
    alone, _ = moco.step(start, views[0], other, SingleReplica())
    np.testing.assert_allclose(alone.queue[0], new.queue[0], atol=1e-5)  # whatever is beside it in the batch


def test_stored_keys_are_normalised_by_an_earlier_batch_and_their_own_statistics_are_kept(views):
    moco, start = networks(KeyBnMode.stored, ring=4)
    one, _ = moco.step(start, *views, SingleReplica())
    assert all(ring.shape[0] == 4 for ring in one.ring)
    changed = [np.flatnonzero(np.any(np.asarray(a != b), axis=1)) for a, b in zip(start.ring, one.ring, strict=True)]
    assert all(list(rows) == [0] for rows in changed)
    other = tf.concat([views[1][:1], 255 - views[1][1:]], 0)
    first, _ = moco.step(one, *views, SingleReplica())
    second, _ = moco.step(one, views[0], other, SingleReplica())
    at = BATCH  # the first key of the second batch in the queue
    np.testing.assert_allclose(first.queue[at], second.queue[at], atol=1e-5)
    assert np.abs(np.asarray(first.queue[at + 1] - second.queue[at + 1])).max() > 1e-3
    for kept, seen in zip(first.ring, first.key_stats, strict=True):
        np.testing.assert_array_equal(kept[1], seen)


def test_statistics_in_the_ring_stay_as_large_as_they_are_however_deep_the_network():
    """Observed below layers that normalise with another batch's, they would grow from step to step."""
    image = x = keras.Input((8, 8, 3))
    for n in range(16):
        convolution = keras.layers.Conv2D(8, 3, padding="same", kernel_initializer=keras.initializers.HeNormal(seed=n))
        x = keras.layers.ReLU()(ShuffledBatchNorm()(convolution(x)))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(x))
    parameters = [v.value for v in model.trainable_variables]
    stats = [tf.convert_to_tensor(v) for v in model.non_trainable_variables]
    rng = np.random.default_rng(3)

    @tf.function(autograph=False)
    def encode(x_k, ring, seed):
        def f_k(x, stats, training=True):
            return model.stateless_call(parameters, stats, x, training=training)

        return shuffle.stored(f_k, x_k, SingleReplica(), seed, Memory(stats, [], ring)).ring

    ring = [tf.repeat(s[tf.newaxis], 4, axis=0) for s in stats]
    last = []
    for step in range(24):
        views = tf.constant(rng.normal(size=(16, 8, 8, 3)) * rng.uniform(0.7, 1.4), tf.float32)
        ring = encode(views, ring, tf.constant([5, step]))
        last.append(float(tf.reduce_mean(ring[-1][step % 4])))
    assert max(last) < 4 * min(last)


def test_a_ring_of_statistics_wraps_round(in_lockstep, views):
    (state, _), *_ = step_of(in_lockstep, KeyBnMode.stored, views, steps=5, ring=2)
    (longer, _), *_ = step_of(in_lockstep, KeyBnMode.stored, views, steps=6, ring=2)
    for before, after in zip(state.ring, longer.ring, strict=True):
        np.testing.assert_array_equal(before[0], after[0])
        assert np.any(np.asarray(before[1] != after[1]))


def test_a_bfloat16_queue_holds_the_rounded_keys(in_lockstep, views):
    from trainer_module.config import Precision

    (half, _), *_ = step_of(in_lockstep, KeyBnMode.none, views, queue_precision=Precision.bfloat16)
    (full, _), *_ = step_of(in_lockstep, KeyBnMode.none, views)
    assert half.queue.dtype == tf.bfloat16
    np.testing.assert_array_equal(half.queue[:BATCH], tf.cast(full.queue[:BATCH], tf.bfloat16))


# The layers by themselves.


def test_split_layer_normalises_each_group_by_itself():
    x = tf.random.stateless_normal([12, 4, 4, 3], [1, 2])
    layer, plain = SplitBatchNormalization(3), FusedBatchNormalization()
    expected = tf.concat([plain(part, training=True) for part in tf.split(x, 3)], 0)
    np.testing.assert_allclose(layer(x, training=True), expected, atol=1e-6)


def test_shuffled_layer_normalises_with_what_it_is_given_and_leaves_what_it_saw():
    x = 3 + 2 * tf.random.stateless_normal([64, 4, 4, 3], [1, 2])
    layer = ShuffledBatchNorm()
    given = (tf.constant([1.0, 2.0, 3.0]), tf.constant([4.0, 9.0, 16.0]))
    y = layer(x, bn_stats=given)
    np.testing.assert_allclose(y, (x - given[0]) / tf.sqrt(given[1] + 1e-5), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer(x, training=True), FusedBatchNormalization()(x, training=True), atol=1e-6)
    np.testing.assert_allclose(layer.moving_mean.numpy(), np.mean(x, axis=(0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(layer.moving_variance.numpy(), np.var(x, axis=(0, 1, 2), ddof=1), rtol=1e-4)
    before = layer.moving_mean.numpy()
    layer(2 * x, bn_stats=given)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16", "float32"])
def test_shuffled_layer_keeps_given_statistics_in_float32(policy):
    layer = ShuffledBatchNorm(dtype=policy)
    given = (tf.constant([1.001, 2.0, 3.0]), tf.constant([4.0, 9.0, 16.0]))
    y = layer(tf.ones([4, 2, 2, 3]), bn_stats=given)
    assert y.dtype == layer.compute_dtype
    np.testing.assert_allclose(tf.cast(y, tf.float32)[0, 0, 0, 1:], [-1 / 3, -0.5], rtol=1e-2)
    assert layer.moving_mean.dtype == "float32"


def test_layers_of_every_mode_have_the_same_variables():
    shapes = set()
    for mode, part in itertools.product(KeyBnMode, ("query", "key")):
        layer = getattr(batch_norms(KeyBnConfig(mode)), part)(name="bn", dtype="float32")
        layer.build((None, 4, 4, 3))
        shapes.add(tuple((v.name, tuple(v.shape), v.trainable) for v in layer.weights))
    assert len(shapes) == 1


def test_layers_come_back_from_their_configuration():
    for layer in (SplitBatchNormalization(4, epsilon=1e-3), ShuffledBatchNorm(momentum=0.5)):
        again = type(layer).from_config(layer.get_config())
        assert again.get_config() == layer.get_config()


def test_permutations_of_a_seed_are_one_everywhere(in_lockstep):
    everywhere = in_lockstep(3, lambda _: permutation(tf.constant([5, 6]), 17).numpy())
    for one in everywhere:
        np.testing.assert_array_equal(one, everywhere[0])


def test_replicas_that_disagree_on_the_permutation_lose_keys(in_lockstep):
    """What the comparison of all replicas guards against: rows then fall on each other."""

    def one(replica):
        perm = permutation(tf.constant([replica.index.numpy(), 0]), 12)
        return gather(replica, tf.ones([4, 1]), own_rows(replica, perm)).numpy()

    assert np.any(in_lockstep(3, one)[0] != 1)
