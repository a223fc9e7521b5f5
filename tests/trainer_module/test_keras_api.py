"""MoCo in a Keras 3 training loop: the model with fit, the queue and the layer by themselves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer_module.build import build
from trainer_module.config import EncoderConfig, Head, KeyBnConfig, KeyBnMode, Stem, TrainConfig
from trainer_module.keras_api import MoCoModel, ShuffledBatchNorm
from trainer_module.key_queue import KeyQueue
from trainer_module.moco import initial_state
from trainer_module.replica import SingleReplica

# A small rate: what rounds otherwise in a graph must not grow.
SIDE, BATCH, RATE, MEAN, STD = 8, 8, 1e-3, (128.0,) * 3, (64.0,) * 3
SMALL = EncoderConfig(name="resnet18", stem=Stem.cifar, width=2, head=Head.v1, dim=8)


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
        np.testing.assert_allclose(trained.numpy(), expected, atol=2e-4)
    np.testing.assert_allclose(model._state.queue.numpy(), start.queue, atol=2e-3)
    assert model.predict(next(iter(pairs))[0], verbose=0).shape == (BATCH, 8)


def test_a_mode_for_several_devices_is_refused_on_one():
    with pytest.raises(ValueError, match="needs several devices; on one use split, stored, ema, none"):
        MoCoModel(networks(KeyBnMode.none).encoder.model, mean=MEAN, std=STD, key_bn=KeyBnMode.all_to_all)


def test_weights_of_the_model_are_saved_and_loaded_with_queue_and_key_encoder(pairs, tmp_path):
    def made():
        model = MoCoModel(networks(KeyBnMode.ema).encoder.model, mean=MEAN, std=STD, queue=20, seed=3)
        model.compile()
        model.build((None, SIDE, SIDE, 3))
        return model

    trained = made()
    trained.fit(pairs, verbose=0)
    trained.save_weights(tmp_path / "moco.weights.h5")
    again = made()
    again.load_weights(tmp_path / "moco.weights.h5")
    for one, other in zip(tf.nest.flatten(trained._state), tf.nest.flatten(again._state), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_queue_takes_keys_and_statistics_round_the_end():
    queue = KeyQueue(5, 2, stats=[(3,)], ring=2, seed=1)
    np.testing.assert_allclose(np.linalg.norm(queue.keys, axis=1), 1, rtol=1e-6)
    assert queue.draw(0) is None
    for i in range(4):
        queue.enqueue(tf.fill([2, 2], float(i)), [tf.fill([3], float(i))])
    np.testing.assert_array_equal(queue.keys[:, 0], [2, 3, 3, 1, 2])
    seen = {float(queue.draw(step)[0][0]) for step in range(20)}
    assert seen == {2.0, 3.0}
    with pytest.raises(ValueError, match="6 keys do not fit into a queue of 5"):
        queue.enqueue(tf.zeros([6, 2]), [tf.zeros([3])])
    with pytest.raises(ValueError, match="0 statistics given, 1 are kept"):
        queue.enqueue(tf.zeros([1, 2]))


def test_queue_and_layer_make_a_training_loop_of_one_s_own():
    """A loop written out: keys normalised by the statistics of an earlier batch, the loss of a fixed batch falls."""
    convolve = keras.layers.Conv2D(4, 3, use_bias=False, kernel_initializer=keras.initializers.HeNormal(seed=1))
    norm = ShuffledBatchNorm()
    project = keras.layers.Dense(8, kernel_initializer=keras.initializers.HeNormal(seed=2))
    optimizer = keras.optimizers.SGD(0.5)
    queue = KeyQueue(16, 8, stats=[(4,), (4,)])
    x = tf.random.stateless_normal([4, SIDE, SIDE, 3], [1, 1])

    def embed(bn_stats):
        hidden = tf.nn.relu(norm(convolve(x), training=True, bn_stats=bn_stats))
        return tf.math.l2_normalize(project(tf.reduce_mean(hidden, [1, 2])), axis=1)

    losses = []
    for step in range(8):
        given = queue.draw(step)
        key = tf.stop_gradient(embed(given and tuple(given)))
        with tf.GradientTape() as tape:
            query = embed(given and tuple(given))
            positive = tf.reduce_sum(query * key, axis=1, keepdims=True)
            logits = tf.concat([positive, query @ tf.transpose(queue.keys)], 1) / 0.2
            loss = tf.reduce_mean(tf.reduce_logsumexp(logits, 1) - logits[:, 0])
        weights = [convolve.kernel, norm.gamma, norm.beta, project.kernel]
        optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)
        losses.append(float(loss))
        if step == 0:
            queue.enqueue(key, [tf.convert_to_tensor(norm.moving_mean), tf.convert_to_tensor(norm.moving_variance)])
    assert losses[-1] < losses[1]
