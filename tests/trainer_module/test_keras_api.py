"""MoCo in a Keras 3 training loop: the model with fit, the queue and the layer by themselves."""

import inspect
import re
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer_module.batch_norm import FusedBatchNormalization, SplitBatchNormalization
from trainer_module.build import build
from trainer_module.config import EncoderConfig, Head, KeyBnConfig, KeyBnMode, TrainConfig
from trainer_module.errors import UserError
from trainer_module.keras_api import MoCoModel, ShuffledBatchNorm
from trainer_module.key_queue import KeyQueue
from trainer_module.moco import initial_state
from trainer_module.replica import SingleReplica

pytestmark = pytest.mark.long

SIDE, BATCH, RATE, MEAN, STD = 8, 8, 0.1, (128.0,) * 3, (64.0,) * 3
SMALL = EncoderConfig(name="pipeline.tpu.small_encoder.two_convolutions", head=Head.v1, dim=8)


def networks(mode):
    """Fresh encoders and the step that the trainer would run."""
    train = TrainConfig(replicas=1, global_batch=BATCH, queue=20, momentum=0.9, key_bn=KeyBnConfig(mode, groups=4))
    return build(SMALL, train, SIDE, MEAN, STD, lambda _: tf.constant(RATE), 3)


@pytest.fixture(scope="module")
def pairs():
    """Batches of two views of noise images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (2 * BATCH, SIDE, SIDE, 3))
    views = [(images + rng.integers(0, 50, images.shape)).astype(np.uint8) for _ in range(2)]
    return tf.data.Dataset.from_tensor_slices(tuple(views)).batch(BATCH, drop_remainder=True)


@pytest.mark.parametrize("mode", [KeyBnMode.split, KeyBnMode.stored, KeyBnMode.ema, KeyBnMode.none])
def test_fit_does_the_trainer_s_steps(mode, pairs):
    encoder, moco = networks(mode)
    start = initial_state(moco.model, 20, 3, ring=8 if mode is KeyBnMode.stored else 0)
    for query, key in pairs:
        start, _ = moco.step(start, query, key, SingleReplica())

    encoder, moco = networks(mode)
    settings = {"mean": MEAN, "std": STD, "queue": 20, "momentum": 0.9, "key_bn": mode, "key_encoder": moco.key_model}
    model = MoCoModel(encoder.model, **settings, seed=3)
    model.compile(learning_rate=RATE)
    history = model.fit(pairs, epochs=1, verbose=0, shuffle=False)
    assert np.isfinite(history.history["loss"][0])
    for trained, expected in zip(encoder.model.trainable_variables, start.query, strict=True):
        np.testing.assert_allclose(trained.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(model.state.queue.numpy(), start.queue, atol=1e-4)
    assert model.predict(next(iter(pairs))[0], verbose=0).shape == (BATCH, 8)


def test_a_mode_for_several_devices_is_refused_on_one():
    with pytest.raises(UserError, match="needs several devices; on one use split, stored, ema, none"):
        MoCoModel(networks(KeyBnMode.none).encoder.model, mean=MEAN, std=STD, key_bn=KeyBnMode.all_to_all)


def test_weights_of_the_model_are_saved_and_loaded_with_queue_and_key_encoder(pairs, tmp_path):
    def made():
        model = MoCoModel(networks(KeyBnMode.ema).encoder.model, mean=MEAN, std=STD, queue=20, seed=3)
        model.compile()
        return model

    trained = made()
    trained.fit(pairs, verbose=0)
    trained.save_weights(tmp_path / "moco.weights.h5")
    again = made()
    again.load_weights(tmp_path / "moco.weights.h5")
    for one, other in zip(tf.nest.flatten(trained.state), tf.nest.flatten(again.state), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_queue_takes_keys_and_statistics_round_the_end():
    queue = KeyQueue(5, 2, stats=[(3,), (3,)], ring=2, seed=1)
    np.testing.assert_allclose(np.linalg.norm(queue.keys, axis=1), 1, rtol=1e-6)
    for i in range(4):
        queue.enqueue(tf.fill([2, 2], float(i)), [tf.fill([3], float(i))] * 2)
    np.testing.assert_array_equal(queue.keys[:, 0], [2, 3, 3, 1, 2])
    seen = {float(queue.draw(step)[0][0]) for step in range(20)}
    assert seen == {2.0, 3.0}
    with pytest.raises(UserError, match="6 keys do not fit into a KeyQueue of size=5"):
        queue.enqueue(tf.zeros([6, 2]), [tf.zeros([3])] * 2)
    with pytest.raises(UserError, match="0 statistics given to a KeyQueue that keeps 2"):
        queue.enqueue(tf.zeros([1, 2]))
    for wrong in (tf.zeros([4]), tf.zeros([])):  # which the ring would have broadcast or torn
        with pytest.raises(UserError, match=r"statistics of shape \(4?,?\) given to a KeyQueue that keeps \(3,\)"):
            queue.enqueue(tf.zeros([1, 2]), [tf.zeros([3]), wrong])
    with pytest.raises(UserError, match="a batch of no keys"):
        queue.enqueue(tf.zeros([0, 2]), [tf.zeros([3])] * 2)


@pytest.mark.parametrize("graph", [False, True])
def test_before_the_first_batch_a_draw_is_mean_0_and_variance_1(graph):
    queue = KeyQueue(5, 2, stats=[(3,), (3,)])
    mean, variance = (tf.function(queue.draw) if graph else queue.draw)(tf.constant(7))
    np.testing.assert_array_equal([mean, variance], [[0, 0, 0], [1, 1, 1]])


def test_a_queue_takes_a_batch_whose_size_is_known_only_in_the_graph():
    queue = KeyQueue(5, 2)
    enqueue = tf.function(queue.enqueue, input_signature=[tf.TensorSpec([None, 2])])
    for n in (3, 1, 4):
        enqueue(tf.fill([n, 2], float(n)))
    np.testing.assert_array_equal(queue.keys[:, 0], [4, 4, 4, 1, 4])
    with pytest.raises(tf.errors.InvalidArgumentError, match="more keys than a KeyQueue of size=5 holds"):
        enqueue(tf.zeros([6, 2]))


def test_a_queue_comes_back_from_its_configuration():
    queue = KeyQueue(5, 2, stats=[(3,), (3,)], ring=2, seed=4, name="keys")
    again = keras.layers.deserialize(keras.layers.serialize(queue))
    assert again.get_config() == queue.get_config()
    assert [v.shape for v in again.weights] == [v.shape for v in queue.weights]


@pytest.mark.parametrize(
    ("stats", "message"), [([], "has no batch normalisation"), ([(3,)], "mean and variance in turn")]
)
def test_statistics_that_are_no_means_and_variances_are_refused(stats, message):
    refused(lambda: KeyQueue(5, 2, stats=stats), message)


class Loop(keras.Model):
    """The parts in a train_step of one's own: every key batch is normalised by the statistics of an earlier one."""

    def __init__(self):
        super().__init__()
        self.convolve = keras.layers.Conv2D(
            4, 3, use_bias=False, kernel_initializer=keras.initializers.HeNormal(seed=1)
        )
        self.norm = ShuffledBatchNorm()
        self.project = keras.layers.Dense(8, kernel_initializer=keras.initializers.HeNormal(seed=2))
        self.queue = KeyQueue(16, 8, stats=[(4,), (4,)])

    def call(self, x, training=False, bn_stats=None):
        x = tf.nn.relu(self.norm(self.convolve(tf.cast(x, tf.float32) / 64 - 2), training=training, bn_stats=bn_stats))
        return tf.math.l2_normalize(self.project(tf.reduce_mean(x, [1, 2])), axis=1)

    def train_step(self, data):
        given = self.queue.draw()
        key = tf.stop_gradient(self(data[1], bn_stats=given))
        self(data[1], training=True)
        observed = [self.norm.moving_mean.value, self.norm.moving_variance.value]
        with tf.GradientTape() as tape:
            query = self(data[0], training=True, bn_stats=given)
            positive = tf.reduce_sum(query * key, axis=1, keepdims=True)
            logits = tf.concat([positive, query @ tf.transpose(self.queue.keys)], 1) / 0.2
            loss = tf.reduce_mean(tf.reduce_logsumexp(logits, 1) - logits[:, 0])
        self.optimizer.apply(tape.gradient(loss, [v.value for v in self.trainable_variables]), self.trainable_variables)
        self.queue.enqueue(key, observed)
        return {"info_nce": loss}


@pytest.mark.parametrize("eager", [False, True])
def test_queue_and_layer_train_in_a_loop_of_one_s_own(eager, pairs):
    model = Loop()
    model(next(iter(pairs))[0])
    model.compile(optimizer=keras.optimizers.SGD(0.1), run_eagerly=eager)
    losses = model.fit(pairs, epochs=4, verbose=0, shuffle=False).history["info_nce"]
    assert np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(v.numpy())) for v in model.variables)
    mean, variance = model.queue.draw()
    assert np.any(mean != 0)
    assert np.any(variance != 1)
    assert 0 < losses[-1] < np.log(17) + 1  # 16 negatives


def refused(act, message):
    """One line, whoever passed it on."""
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def small(norm=FusedBatchNormalization, noise=False):
    """An encoder that traces in no time."""
    image = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(4, 3, kernel_initializer=keras.initializers.HeNormal(seed=1))(image)
    x = norm()(x) if norm else x
    x = keras.layers.Dropout(0.5)(x) if noise else x
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    return keras.Model(image, keras.layers.Dense(8, kernel_initializer=keras.initializers.HeNormal(seed=2))(x))


def moco_of(encoder=None, **settings):
    values = {"mean": MEAN, "std": STD, "queue": 20, "momentum": 0.9, "seed": 3, **settings}
    return MoCoModel(encoder or small(), **values)


def compiled(**settings):
    model = moco_of(**settings)
    model.compile(learning_rate=0.1)
    return model


def same(one, other):
    for a, b in zip(tf.nest.flatten(one.state), tf.nest.flatten(other.state), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("mode", ["ema", "stored", "split"])
def test_a_saved_model_goes_on_as_if_it_had_not_been_saved(mode, pairs, tmp_path):
    norm = {"split": lambda: SplitBatchNormalization(2)}.get(mode, FusedBatchNormalization)
    key_encoder = small(ShuffledBatchNorm) if mode == "stored" else None
    model = compiled(encoder=small(norm), key_bn=mode, key_encoder=key_encoder)
    model.fit(pairs, verbose=0, shuffle=False)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    same(model, again)
    for one in (model, again):
        one.fit(pairs, verbose=0, shuffle=False)
    same(model, again)
    assert int(again.state.step.numpy()) == 4


def test_a_saved_backbone_loads_by_itself(tmp_path):
    backbone = networks(KeyBnMode.ema).encoder.backbone
    backbone.save(tmp_path / "b.keras")
    x = np.ones((2, SIDE, SIDE, 3), np.float32)
    again = keras.saving.load_model(tmp_path / "b.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), backbone.predict(x, verbose=0))


def test_checkpoint_callbacks_save_the_model_and_its_weights(pairs, tmp_path):
    model = compiled()
    model.save_weights(tmp_path / "first.weights.h5")
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "m.keras", monitor="loss", save_best_only=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "m.weights.h5", save_weights_only=True),
    ]
    model.fit(pairs, verbose=0, callbacks=callbacks)
    same(model, keras.saving.load_model(tmp_path / "m.keras"))
    fresh = compiled()
    fresh.load_weights(tmp_path / "m.weights.h5")
    same(model, fresh)


def test_validation_reports_the_metrics_and_changes_nothing(pairs):
    model = compiled()
    before = [v.numpy() for v in tf.nest.flatten(model.state)]
    views = pairs.unbatch().batch(6)  # the last one is smaller
    result = model.evaluate(views, verbose=0, return_dict=True)
    for old, now in zip(before, tf.nest.flatten(model.state), strict=True):
        np.testing.assert_array_equal(old, now.numpy())
    query, key = next(iter(pairs.unbatch().batch(2 * BATCH)))
    q = model.predict(query, verbose=0)
    k = model.predict(key, verbose=0)  # f_k is a copy as yet
    logits = np.concatenate([np.sum(q * k, 1, keepdims=True), q @ model.state.queue.numpy().T], 1) / 0.2
    expected = np.mean(np.log(np.sum(np.exp(logits), 1)) - logits[:, 0])
    assert result["loss"] == pytest.approx(expected, rel=1e-4)
    history = model.fit(pairs, validation_data=views, verbose=0).history
    assert {"loss", "pretext_top1", "val_loss", "val_pretext_top1", "learning_rate"} <= set(history)


def test_history_averages_the_batches_of_an_epoch(pairs):
    whole = compiled().fit(pairs, verbose=0, shuffle=False).history["loss"][0]
    apart, parts = compiled(), []
    for batch in pairs:
        apart.reset_metrics()
        parts.append(float(apart.train_on_batch(*batch, return_dict=True)["loss"]))
    assert parts[0] != pytest.approx(parts[1], rel=1e-4)
    assert whole == pytest.approx(np.mean(parts), rel=1e-4)


def rates(pairs, rate, epochs=2, **fit):
    model = moco_of()
    model.compile(learning_rate=rate)
    before = [v.numpy() for v in model.state.query]
    history = model.fit(pairs, epochs=epochs, verbose=0, **fit).history["learning_rate"]
    moved = any(np.any(old != now.numpy()) for old, now in zip(before, model.state.query, strict=True))
    return history, moved


def test_learning_rate_callbacks_set_the_rate_of_the_step(pairs):
    schedule = keras.callbacks.LearningRateScheduler(lambda _, rate: 0 * rate)
    history, moved = rates(pairs, 0.1, callbacks=[schedule])
    assert history == [0.0, 0.0]
    assert not moved


def test_schedules_and_functions_of_the_step_are_followed(pairs):
    keras_s = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
    for rate in (keras_s, lambda step: tf.where(step > 1, 0.25, 0.5)):
        history, moved = rates(pairs, rate)
        assert history == [0.5, 0.25]
        assert moved


def test_a_learning_rate_set_by_a_callback_and_a_keras_schedule_are_saved(pairs, tmp_path):
    model = compiled()
    model.optimizer.learning_rate = 0.25
    model.save(tmp_path / "m.keras")
    assert float(keras.saving.load_model(tmp_path / "m.keras").optimizer.learning_rate) == 0.25
    model.compile(learning_rate=keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.125]))
    model.fit(pairs, verbose=0)
    model.save(tmp_path / "s.keras")
    again = keras.saving.load_model(tmp_path / "s.keras")
    assert again.fit(pairs, verbose=0).history["learning_rate"] == [0.125]
    model.compile(learning_rate=lambda _: tf.constant(0.5))
    model.save(tmp_path / "f.keras")
    assert not keras.saving.load_model(tmp_path / "f.keras").compiled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, r"compile\(optimizer=…\): MoCoModel has its own loss and SGD"),
        ({"loss": "mse"}, r"compile\(loss=…\)"),
        ({"learning_rate": "adam"}, "neither a number nor a function"),
        ({"sgd_momentum": 1.0}, r"sgd_momentum=1\.0: must be at least 0 and below 1"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001: must be at least 0"),
    ],
)
def test_an_optimizer_or_loss_that_would_be_ignored_and_numbers_out_of_range_are_refused(settings, message):
    refused(lambda: moco_of().compile(**settings), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moco_of(key_bn="stored"), "key_bn=stored needs a key_encoder"),
        (
            lambda: moco_of(key_bn="stored", key_encoder=small()),
            "is FusedBatchNormalization, which would let keys leak",
        ),
        (lambda: moco_of(key_bn="split"), "use trainer_module.batch_norm.SplitBatchNormalization"),
        (lambda: moco_of(small(None), key_bn="split"), "has no batch normalisation; use key_bn=none"),
        (lambda: moco_of(small(None), key_bn="stored", key_encoder=small(None)), "has no batch normalisation"),
        (lambda: moco_of(key_bn="emma"), "key_bn='emma' is no mode; use one of split, stored, ema, none"),
        (lambda: moco_of(small(noise=True)), "a random state, as of Dropout"),
        (lambda: moco_of(key_encoder=small(None)), "have not the shapes of the encoder's"),
        (lambda: moco_of(keras.Sequential([keras.layers.Dense(2)])), "has no weights to train; build it"),
        (lambda: moco_of(queue=0), "queue=0: must be an integer, at least 1"),
        (lambda: moco_of(queue=2.5), r"queue=2\.5: must be an integer"),
        (lambda: moco_of(momentum=1.5), r"momentum=1\.5: must be at least 0 and below 1"),
        (lambda: moco_of(temperature=0.0), r"temperature=0\.0: must be a number above 0"),
        (lambda: moco_of(temperature=float("nan")), "temperature=nan: must be a number above 0"),
        (lambda: moco_of(mean=(1.0, 2.0)), r"mean=\(1\.0, 2\.0\) must be 3 finite numbers"),
        (lambda: moco_of(std=(0.0, 1.0, 1.0)), r"std=\(0\.0, 1\.0, 1\.0\) must be above 0"),
        (lambda: moco_of(small(lambda: SplitBatchNormalization(1)), key_bn="split"), "has groups=1, which is no shuff"),
    ],
)
def test_what_would_silently_leak_or_fail_later_is_refused_at_once(make, message):
    refused(make, message)


def without_numbers(query, key):
    return np.nan * tf.cast(query, tf.float32), tf.cast(key, tf.float32)


@pytest.mark.parametrize("given", ["none", "list", "positional", "CallbackList"])
def test_fit_stops_in_one_line_at_a_loss_that_is_not_finite_before_another_callback_saves_it(given, pairs, tmp_path):
    model, saved = compiled(), tmp_path / "m.weights.h5"
    save = keras.callbacks.ModelCheckpoint(saved, save_weights_only=True, save_freq=1)
    nan = pairs.map(without_numbers)
    args, kwargs = {
        "none": ((), {}),
        "list": ((), {"callbacks": [save]}),
        "positional": ((None, None, 1, 0, [save]), {}),
        "CallbackList": ((), {"callbacks": keras.callbacks.CallbackList([save], model=model, epochs=1, steps=2)}),
    }[given]
    refused(lambda: model.fit(nan, *args, **({} if args else {"verbose": 0}), **kwargs), "after step 1 the loss is nan")
    assert not saved.exists()


@pytest.mark.parametrize("return_dict", [False, True])
def test_a_batch_by_itself_whose_loss_is_not_finite_is_refused_in_one_line_too(return_dict, pairs):
    model = compiled()
    batch = next(iter(pairs))
    logs = model.train_on_batch(*batch, return_dict=return_dict)
    assert np.isfinite(logs["loss"] if return_dict else logs).all()
    refused(
        lambda: model.train_on_batch(*without_numbers(*batch), return_dict=return_dict), "after step 2 the loss is nan"
    )


def test_float32_is_multiplied_as_float32_as_in_the_trainer():
    tf.config.experimental.enable_tensor_float_32_execution(True)
    compiled()
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_batches_that_do_not_fit_are_refused_in_one_line(pairs):
    refused(lambda: compiled().fit(pairs.unbatch().batch(6), verbose=0), r"batch\(n, drop_remainder=True\)")
    refused(lambda: compiled(queue=7).fit(pairs, verbose=0), "queue=7 is smaller than the batch of 8")
    refused(lambda: compiled().fit(pairs.map(lambda query, _: query), verbose=0), "batches of \\(query, key\\) views")
    split = compiled(encoder=small(lambda: SplitBatchNormalization(3)), key_bn="split")
    refused(lambda: split.fit(pairs, verbose=0), "cannot be split into groups=3")


def test_a_network_in_bfloat16_keeps_loss_and_embeddings_in_float32(pairs):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = compiled()
        history = model.fit(pairs, verbose=0).history
        assert model.train_step(next(iter(pairs)))["loss"].dtype == tf.float32
        assert model.predict(next(iter(pairs))[0], verbose=0).dtype == np.float32
    finally:
        keras.config.set_dtype_policy(policy)
    assert np.isfinite(history["loss"][0])


def example(docstring):
    """The indented block under `Example:`."""
    block = re.search(r"Example:\n((?:        .*\n|\n)+)", inspect.cleandoc(docstring).replace("\n    ", "\n        "))
    return textwrap.dedent(block.group(1))


@pytest.mark.parametrize("documented", [MoCoModel, KeyQueue, ShuffledBatchNorm])
def test_examples_of_the_docstrings_run(documented):
    exec(example(documented.__doc__), {})
