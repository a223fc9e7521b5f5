"""The program that is lowered for TPUs, run on XLA's CPU with one device for each core, is the trainer's step.

After several steps from one state it is compared tensor by tensor with the trainer's own driver under MirroredStrategy,
and with the float64 NumPy reference. Errors are relative to the largest entry of each tensor. TOLERANCE is an order of
magnitude above what float32 was seen to give, and the faults that are planted move a tensor by far more.
"""

import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from reference import STATS, WEIGHTS, Outcome, Reference, State, pairs_of_views

from pipeline.tpu.analysis import Request
from trainer_module import config_json
from trainer_module.build import build, first_state
from trainer_module.config import EncoderConfig, Head, KeyBnConfig, KeyBnMode, Precision, TrainConfig, recommended
from trainer_module.driver import Driver, learning_rate, named
from trainer_module.lowering import MEAN, STD, STEPS_PER_EPOCH
from trainer_module.moco import Metrics
from trainer_module.shuffle import permutation, shuffle_keys
from trainer_module.strategy import make_strategy

pytestmark = pytest.mark.long

STEPS, BATCH, SIDE, QUEUE, DIM = 3, 64, 8, 160, 12  # the third batch wraps round the queue's end
GROUPS, RING, SEED = 2, 2, 7
TOLERANCE = 1e-4
ENCODER = EncoderConfig(name="pipeline.tpu.small_encoder.two_convolutions", head=Head.v1, dim=DIM)
BOTTLENECK, STEM = (
    dataclasses.replace(ENCODER, name=f"pipeline.tpu.small_encoder.{name}") for name in ("bottleneck", "stem")
)


def train_config(mode, replicas):
    return TrainConfig(
        replicas=replicas,
        global_batch=BATCH,
        queue=QUEUE,
        momentum=0.9,
        learning_rate=0.1,
        weight_decay=1e-2,
        key_bn=KeyBnConfig(mode=mode, groups=GROUPS, ring=RING),
    )


@functools.cache
def built(mode, encoder=ENCODER):
    train = train_config(mode, 1)
    return build(encoder, train, SIDE, MEAN, STD, learning_rate(train, STEPS_PER_EPOCH), SEED).moco


def start(mode, encoder=ENCODER):
    """A state with every tensor far from its default: {"query/0": …}."""
    rng = np.random.default_rng(11)
    begin = first_state(built(mode, encoder), train_config(mode, 1))

    def drawn(field, value):
        if field.endswith("stats") or field == "ring":
            return rng.uniform(0.5, 1.5, value.shape)
        if field == "slots":
            return rng.normal(0, 0.1, value.shape)
        return np.asarray(value) + rng.normal(0, 0.2, value.shape) * (field in ("query", "key"))

    leaves = {name: drawn(name.partition("/")[0], value) for name, value in named(begin).items()}
    return {name: leaves[name].astype(value.dtype.as_numpy_dtype) for name, value in named(begin).items()}


def state_of(mode, leaves, encoder=ENCODER):
    """The leaves as a State of trainer_module.moco."""
    return tf.nest.pack_sequence_as(first_state(built(mode, encoder), train_config(mode, 1)), list(leaves.values()))


@pytest.fixture(scope="module")
def views():
    return pairs_of_views(STEPS, BATCH, SIDE)


def fed(mode, views):
    """The views as the input feeds them: for `host` the key views are shuffled."""
    data = tf.data.Dataset.from_tensor_slices((views[:, 0], views[:, 1]))
    return shuffle_keys(data, SEED, 0) if mode is KeyBnMode.host else data


# The three sides: each gives {"query/0": …, "metrics/loss": …} after each step.


@pytest.fixture(scope="module")
def lowered_steps(lowering_worker, executing_worker, views, tmp_path_factory):
    """(mode, replicas, fault, encoder) -> the results of each step, and the names of what differs between the cores.

    As a future: the other sides compute in this process meanwhile.
    """
    folder = tmp_path_factory.mktemp("lowered")

    def run(mode, replicas, fault, encoder):
        request = Request(encoder, train_config(mode, replicas), SIDE, replicas, 1, SEED)
        files = {name: str(folder / file) for name, file in (("hlo", "step.hlo"), ("state", "state.npz"))}
        question = {"request": config_json.dumps(request), "to": files["hlo"], "fault": fault}
        manifest = lowering_worker.ask(json.dumps(question))
        x_q, x_k = (np.stack(side) for side in zip(*fed(mode, views).as_numpy_iterator(), strict=True))
        np.savez(files["state"], **start(mode, encoder))
        np.savez(folder / "views.npz", x_q=x_q, x_k=x_k)
        question = {**files, "manifest": manifest, "views": str(folder / "views.npz"), "to": str(folder / "out.npz")}
        differ = executing_worker.ask(json.dumps(question))["differ"]
        with np.load(question["to"]) as out:
            results = [
                {name.partition("/")[2]: out[name] for name in out.files if name.startswith(f"{step}/")}
                for step in range(1, STEPS + 1)
            ]
        return results, differ

    with ThreadPoolExecutor(1) as pool:

        @functools.cache
        def submitted(mode, replicas, fault=None, encoder=ENCODER):
            return pool.submit(run, mode, replicas, fault, encoder)

        yield submitted


def driver_steps(mode, replicas, views, encoder=ENCODER):
    """The trainer's own driver, under MirroredStrategy."""
    strategy = make_strategy(replicas)
    begin = state_of(mode, start(mode, encoder), encoder)
    driver = Driver(built(mode, encoder), train_config(mode, replicas), strategy, begin)
    batches, step = iter(strategy.experimental_distribute_dataset(fed(mode, views))), driver.compiled_step()
    results = []
    for _ in views:
        metrics = step(batches)
        results.append({**named(driver.state()), **{f"metrics/{n}": getattr(metrics, n) for n in Metrics._fields}})
    return results


def reference_steps(mode, replicas, views):
    """The NumPy reference, with what a mode changes in it."""
    train, leaves = train_config(mode, replicas), start(mode)
    state, rings = numpy_state(leaves), [leaves[n].astype(np.float64) for n in leaves if n.startswith("ring/")]
    results = []
    for step, (x_q, x_k) in enumerate((views.astype(np.float64) - MEAN) / STD):
        reference = reference_of(mode, replicas, train, rings, step)
        outcome = reference.step(state, x_q, x_k, dealt(mode, replicas, step))
        state = outcome.state
        for ring, name in zip(rings, STATS, strict=bool(rings)):
            ring[step % RING] = state.key_stats[name]
        results.append(tensors_of(outcome, rings))
    return results


def numpy_state(leaves):
    def part(field, names):
        return {name: leaves[f"{field}/{i}"].astype(np.float64) for i, name in enumerate(names)}

    return State(
        query=part("query", WEIGHTS),
        key=part("key", WEIGHTS),
        query_stats=part("query_stats", STATS),
        key_stats=part("key_stats", STATS),
        slots=part("slots", WEIGHTS),
        queue=leaves["queue"].astype(np.float64),
        pointer=int(leaves["pointer"]),
        step=int(leaves["step"]),
    )


def tensors_of(outcome: Outcome, rings):
    state = outcome.state
    fields = {"query": WEIGHTS, "key": WEIGHTS, "slots": WEIGHTS, "query_stats": STATS, "key_stats": STATS}
    leaves = {f"{f}/{i}": getattr(state, f)[name] for f, names in fields.items() for i, name in enumerate(names)}
    scalars = {"step": state.step, "pointer": state.pointer, "queue": state.queue, "metrics/loss": outcome.loss}
    return {**leaves, **scalars, **{f"ring/{i}": ring.copy() for i, ring in enumerate(rings)}}


# What a mode is to the reference: who is dealt to which group, and whose statistics normalise.


def dealt(mode, replicas, step):
    """int[BATCH]: the order in which the key views are dealt to the groups."""
    seed, n = tf.constant([SEED, step]), BATCH // replicas
    if mode is KeyBnMode.cross_replica_sum:
        return permutation(seed, BATCH).numpy()
    if mode is KeyBnMode.host:
        images = tf.data.Dataset.from_tensors((tf.range(BATCH), tf.range(BATCH)))
        return next(iter(shuffle_keys(images, SEED, step)))[1].numpy()
    if mode is KeyBnMode.split:
        return np.concatenate([r * n + permutation(seed, n).numpy() for r in range(replicas)])
    if mode is KeyBnMode.auto:
        return dealt(recommended(replicas, n), replicas, step)
    if mode is KeyBnMode.butterfly:
        return dealt_by_butterfly(seed, replicas, n)
    if mode is KeyBnMode.all_to_all:
        draws = tf.random.stateless_uniform([2, replicas, n], seed, None, None, tf.int32, alg="philox").numpy()
        leaving, arriving = np.argsort(draws, axis=-1, kind="stable")
        # Core r sends block j of its rows, in its order, to core j, which puts what arrives in an order of its own.
        blocks = np.stack([r * n + np.array(np.split(order, replicas)) for r, order in enumerate(leaving)])
        return np.concatenate([blocks[:, j].reshape(-1)[arriving[j]] for j in range(replicas)])
    return np.arange(BATCH)


def dealt_by_butterfly(seed, replicas, n):
    """Stage by stage, as it is told: everyone's second half goes to the partner."""
    stages = replicas.bit_length() - 1
    draws = tf.random.stateless_uniform([stages, replicas, n], seed, None, None, tf.int32, alg="philox").numpy()
    hands = np.arange(BATCH).reshape(replicas, n)
    for stage, orders in enumerate(np.argsort(draws, axis=-1, kind="stable")):
        hands = np.stack([hand[order] for hand, order in zip(hands, orders, strict=True)])
        kept, given = hands[:, : n // 2], hands[:, n // 2 :]
        hands = np.stack([np.concatenate([kept[r], given[r ^ 2**stage]]) for r in range(replicas)])
    return hands.reshape(-1)


class GivenStatistics(Reference):
    """A group is normalised by statistics of which it knows nothing; its own are observed."""

    def batch_norm(self, name, weights, stats, x):
        _, observed, _ = dataclasses.replace(self, stats_momentum=0.0).observe(name, weights, stats, x)
        unit = (x - stats[f"{name}.mean"]) / np.sqrt(stats[f"{name}.variance"] + self.epsilon)
        return unit * weights[f"{name}.gamma"] + weights[f"{name}.beta"], observed, None

    def observe(self, name, weights, stats, x):
        return super().batch_norm(name, weights, stats, x)


@dataclasses.dataclass(frozen=True)
class Stored(Reference):
    """The statistics of an earlier batch normalise the keys; those of this one become f_k's."""

    drawn: dict | None = None

    def encode_keys(self, key, state, x_k, perm):
        del state, perm
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(Reference)}
        k, _, _ = GivenStatistics(**settings).encode(key, self.drawn, x_k)
        _, observed, _ = Reference(**settings | {"stats_momentum": 0.0}).encode(key, self.drawn, x_k)
        return k, observed


class Ema(Reference):
    """EMAN: f_k's statistics are a momentum average of f_q's, and normalise the keys."""

    def encode_keys(self, key, state, x_k, perm):
        del perm
        stats = {n: self.m * state.key_stats[n] + (1 - self.m) * state.query_stats[n] for n in STATS}
        k, _, _ = GivenStatistics(**vars(self)).encode(key, stats, x_k)
        return k, stats


def reference_of(mode, replicas, train, rings, step):
    groups = {KeyBnMode.split: replicas * GROUPS, KeyBnMode.sync: 1}.get(mode, replicas)
    settings = {
        "replicas": groups,
        "m": train.momentum,
        "temperature": train.temperature,
        "learning_rate": train.learning_rate,
        "sgd_momentum": train.sgd_momentum,
        "weight_decay": train.weight_decay,
    }
    if mode is KeyBnMode.ema:
        return Ema(**settings)
    if mode is KeyBnMode.stored:
        filled = min(max(step, 1), RING)
        row = int(tf.random.stateless_uniform([], [SEED, step], 0, filled, tf.int32, alg="philox"))
        return Stored(**settings, drawn={name: ring[row] for name, ring in zip(STATS, rings, strict=True)})
    return Reference(**settings)


# The comparison.


def assert_equal(got, expected):
    """Compares every tensor that is expected, step by step."""
    for step, (have, want) in enumerate(zip(got, expected, strict=True), 1):
        missing = want.keys() - have.keys()
        assert not missing, f"step {step}: no {missing}"
        for name, value in want.items():
            value = np.asarray(value, np.float64)
            error = np.abs(have[name] - value).max() / max(np.abs(value).max(), 1e-3)
            assert error <= TOLERANCE, f"step {step}: {name} is off by {error:.1e}"


MODES = list(KeyBnMode)


# `auto` is another mode's program; once is enough to see that it is one.
SIZES = [(mode, r) for mode in MODES for r in (2, 4, 8) if mode is not KeyBnMode.auto or r == 2]


@pytest.mark.parametrize(("mode", "replicas"), SIZES, ids=lambda value: getattr(value, "name", value))
def test_the_lowered_step_is_the_trainer_s_tensor_by_tensor(mode, replicas, views, lowered_steps):
    pending = lowered_steps(mode, replicas)
    trained = driver_steps(mode, replicas, views)
    results, _ = pending.result()
    assert results[0].keys() == trained[0].keys()
    assert_equal(results, trained)


# A TPU computes these in another form: normalisations folded into convolutions, pairs of columns.
ANOTHER_FORM = [
    *((BOTTLENECK, mode) for mode in (KeyBnMode.all_to_all, KeyBnMode.stored)),
    *((STEM, mode) for mode in (KeyBnMode.all_to_all, KeyBnMode.stored, KeyBnMode.sync, KeyBnMode.split)),
]


@pytest.mark.parametrize(("encoder", "mode"), ANOTHER_FORM, ids=lambda value: value.name.rpartition(".")[2])
def test_where_a_tpu_computes_in_another_form_it_is_the_trainer_s_too(encoder, mode, views, lowered_steps):
    pending = lowered_steps(mode, 2, encoder=encoder)
    trained = driver_steps(mode, 2, views, encoder)
    results, differ = pending.result()
    assert_equal(results, trained)
    assert not differ, "the cores' states part"


@pytest.mark.parametrize(("mode", "replicas"), SIZES, ids=lambda value: getattr(value, "name", value))
def test_the_lowered_step_is_the_reference_s_tensor_by_tensor(mode, replicas, views, lowered_steps):
    pending = lowered_steps(mode, replicas)
    expected = reference_steps(mode, replicas, views)
    results, differ = pending.result()
    assert_equal(results, expected)
    assert not differ, "the cores' states part"


@pytest.mark.parametrize("precision", list(Precision), ids=lambda precision: precision.name)
def test_what_is_float32_is_multiplied_as_float32_on_a_tpu_too(precision, lowering_worker, executing_worker, tmp_path):
    """XLA's default there is to round the factors to bfloat16."""
    train = dataclasses.replace(train_config(KeyBnMode.cross_replica_sum, 2), precision=precision)
    question = {"request": config_json.dumps(Request(ENCODER, train, SIDE, 2, 1, SEED)), "to": str(tmp_path / "hlo")}
    lowering_worker.ask(json.dumps(question))
    products = executing_worker.ask(json.dumps({"hlo": question["to"], "products": True}))
    full = [kind for dtype, kind in products if dtype == "f32"]
    assert len(full) >= (3 if precision is Precision.bfloat16 else 10)  # the head and the logits, there and back
    assert set(full) == {"highest,highest"}


# What the comparison can see.


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        ("inverse permutation forgotten", "metrics/loss|queue|query|slots"),
        ("gradients summed, not averaged", "slots|query"),
        ("enqueued before the logits", "metrics/loss|slots|query"),
        ("wrong group", "."),
    ],
)
def test_a_fault_that_is_planted_in_the_lowered_step_is_seen(fault, seen_in, views, lowered_steps):
    mode, replicas = KeyBnMode.cross_replica_sum, 4
    pending, sound = lowered_steps(mode, replicas, fault), lowered_steps(mode, replicas)
    expected = reference_steps(mode, replicas, views)
    assert_equal(sound.result()[0], expected)
    results, _ = pending.result()
    with pytest.raises(AssertionError, match=rf"step \d: ({seen_in}).* is off by"):
        assert_equal(results, expected)
