"""Columns of pixels side by side in the channels, as a TPU has them: the same network to rounding, for TPUs only."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_module.batch_norm import FusedBatchNormalization, SplitBatchNormalization, SyncBatchNormalization
from trainer_module.column_pairs import (
    Convolution,
    StemConvolution,
    StemPooling,
    convolved_pairs,
    convolved_side_by_side,
    pooled_to_pairs,
)
from trainer_module.config import EncoderConfig, Precision, Stem
from trainer_module.encoder import build_encoder
from trainer_module.lowering import LoweredReplica
from trainer_module.replica import SingleReplica, entered


class OneTpuCore(LoweredReplica):
    """What asks for a TPU is told that there is one; sums over one core need no operation of its own."""

    def __init__(self):
        super().__init__(1, tf.constant(0))


def drawn(shape, seed=0, dtype=tf.float64):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), dtype)


def side_by_side(x, order):
    """[n, H, W, C] -> [n, H, W / S, S C] for S columns in some order."""
    return tf.concat([x[:, :, column :: len(order)] for column in order], 3)


def paired(x):
    return side_by_side(x, (0, 1))


def relative(got, wanted):
    return float(tf.reduce_max(tf.abs(got - wanted)) / (tf.reduce_max(tf.abs(wanted)) + 1e-9))


convolutions = st.fixed_dictionaries(
    {
        "side": st.sampled_from([1, 3, 5, 7]),
        "height": st.integers(8, 11),
        "pairs": st.integers(4, 7),
        "channels": st.integers(1, 5),
        "filters": st.integers(1, 5),
        "stride": st.sampled_from([1, 2]),
    }
)


@given(convolutions)
@settings(max_examples=40, deadline=None)
def test_pairs_are_convolved_as_columns_are(case):
    x = drawn((2, case["height"], 2 * case["pairs"], case["channels"]))
    kernel = drawn((case["side"], case["side"], case["channels"], case["filters"]), 1)
    half = case["side"] // 2
    if case["stride"] == 1:
        got, wanted = convolved_pairs(paired(x), kernel, 1), paired(tf.nn.conv2d(x, kernel, 1, "SAME"))
    else:
        rows, columns, pairs = [half, half], [half, half], [(half + 1) // 2, half // 2]
        wanted = tf.nn.conv2d(x, kernel, 2, [[0, 0], rows, columns, [0, 0]])
        padded = tf.pad(paired(x), [[0, 0], rows, pairs, [0, 0]])
        got = convolved_pairs(padded, kernel, 2)[:, :, : wanted.shape[2]]
    assert got.shape == wanted.shape
    assert relative(got, wanted) < 1e-13


@given(convolutions)
@settings(max_examples=40, deadline=None)
def test_columns_are_convolved_side_by_side_as_one_by_one(case):
    stride, half = case["stride"], case["side"] // 2
    order = (0, 1) if case["filters"] % 2 else (0, 2, 1, 3)
    x = drawn((2, case["height"], len(order) * case["pairs"] * stride, case["channels"]))
    kernel = drawn((case["side"], case["side"], case["channels"], case["filters"]), 1)
    beside = [half, max(half - stride + 1, 0)]
    if stride == 1:
        wanted = tf.nn.conv2d(x, kernel, 1, "SAME")
    else:
        x = tf.pad(x, [[0, 0], beside, beside, [0, 0]])
        wanted = tf.nn.conv2d(x, kernel, 2, "VALID")
    assert relative(convolved_side_by_side(x, kernel, stride, order), side_by_side(wanted, order)) < 1e-13


def test_pooling_fours_to_pairs_and_its_gradient_are_those_of_columns():
    x, weight = tf.nn.relu(drawn((2, 6, 16, 3))), drawn((2, 3, 4, 6), 1)

    @tf.function(jit_compile=True, autograph=False)
    def pooled(x, weight, of_fours):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if of_fours:
                y = pooled_to_pairs(side_by_side(x, (0, 2, 1, 3)))
            else:
                y = paired(tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 0], [1, 0], [0, 0]]), 3, 2, "VALID"))
            loss = tf.reduce_sum(y**2 * weight)
        return y, tape.gradient(loss, x)

    for got, wanted in zip(pooled(x, weight, True), pooled(x, weight, False), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-13)


def results(model, x, replica):
    """The embeddings, the statistics and the gradients of a loss that is not linear in them, compiled by XLA."""
    weights, stats = ([v.value for v in part] for part in (model.trainable_variables, model.non_trainable_variables))
    rng = np.random.default_rng(3)
    weights = [w if len(w.shape) > 1 else w + tf.constant(rng.normal(0, 0.2, w.shape), w.dtype) for w in weights]

    @tf.function(jit_compile=True, autograph=False)
    def computed(training):
        with tf.GradientTape() as tape, entered(replica):
            tape.watch(weights)
            y, new = model.stateless_call(weights, stats, x, training=training)
            loss = tf.reduce_sum(tf.sin(y))
        return [y, *new, *tape.gradient(loss, weights)]

    return computed(True), computed(False), computed.get_concrete_function(True).graph


def convolved_shapes(graph):
    return [tuple(op.outputs[0].shape[1:]) for op in graph.get_operations() if op.type == "Conv2D"]


@pytest.mark.parametrize(
    ("stem", "size", "first"),
    [
        (Stem.imagenet, 40, [(20, 5, 16), (10, 5, 8)]),
        (Stem.imagenet, 36, [(18, 18, 4), (9, 9, 4)]),
        (Stem.cifar, 16, [(16, 8, 8), (16, 8, 8)]),
        (Stem.cifar, 15, [(15, 15, 4), (15, 15, 4)]),
    ],
)
def test_on_a_tpu_a_resnet_is_the_same_network_with_columns_side_by_side_where_they_go_up_evenly(stem, size, first):
    model = build_encoder(EncoderConfig(name="resnet18", width=4, stem=stem, dim=8), size, Precision.float32, 3).model
    x = drawn((8, size, size, 3), dtype=tf.float32)
    *wanted, plain = results(model, x, SingleReplica())
    *got, graph = results(model, x, OneTpuCore())
    assert convolved_shapes(graph)[:2] == first
    assert convolved_shapes(plain)[:2] == [(side, columns * channels // 4, 4) for side, columns, channels in first]
    for tensors, others in zip(got, wanted, strict=True):
        for index, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
            assert relative(tensor, other) < 2e-3, index


@pytest.mark.parametrize(
    "normalization",
    [FusedBatchNormalization, SyncBatchNormalization, lambda **given: SplitBatchNormalization(2, **given)],
    ids=["fused", "sync", "split"],
)
def test_pairs_are_normalised_by_the_statistics_of_their_channel(normalization):
    x = drawn((4, 6, 8, 3), dtype=tf.float32) * [1.0, 2.0, 3.0] + [0.5, 0.0, -1.0]

    def normalised(x, back):
        layer = normalization()
        layer.build((4, 6, 8, 3))
        layer.gamma.assign([0.5, 1.0, 2.0])
        layer.beta.assign([0.1, 0.2, 0.3])
        trained = layer(x, training=True)
        given = layer(x, training=False)
        return back(trained), back(given), layer.moving_mean.value, layer.moving_variance.value

    wanted = normalised(x, lambda y: y)
    for got, other in zip(normalised(paired(x), lambda y: tf.reshape(y, x.shape)), wanted, strict=True):
        assert relative(got, other) < 1e-5


@pytest.mark.parametrize(
    ("images", "filters", "shape"),
    [(1, 64, (1, 4, 2, 128)), (1, 65, (1, 4, 4, 65)), (128, 64, (128, 4, 4, 64)), (96, 64, (96, 4, 2, 128))],
    ids=["half of the lanes", "more channels", "images fill the lanes", "images do not"],
)
def test_columns_lie_side_by_side_only_where_lanes_are_left(images, filters, shape):
    layer = StemConvolution(filters, 3, padding="same", use_bias=False)
    with entered(OneTpuCore()):
        assert layer(tf.zeros([images, 4, 4, 3])).shape == shape


@pytest.mark.parametrize("layer", [Convolution(2, 3), StemConvolution(2, 3), StemPooling(1, 0)], ids=lambda x: x.name)
def test_a_layer_is_made_again_from_its_config(layer):
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
