"""Batch normalisation folded into the convolution before it: the same to rounding, and for TPUs only."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer_module import lines
from trainer_module.batch_norm import FusedBatchNormalization, SplitBatchNormalization
from trainer_module.column_pairs import kernel_of_pairs
from trainer_module.folded_norm import convolved_and_normalized
from trainer_module.lowering import LoweredReplica
from trainer_module.replica import SingleReplica, entered

EPSILON, NARROW, WIDE = 1e-5, 6, 24
NAMES = ("y", "mean", "variance", "d_x", "d_kernel", "d_gamma", "d_beta")


def arguments(dtype, offset=0.5, seed=0):
    """What comes out of a ReLU, weights, gamma, beta; and what y is multiplied with to make a loss."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(offset, 1, (4, 7, 5, NARROW)), 0)
    kernel, gamma, beta = rng.normal(size=(1, 1, NARROW, WIDE)), rng.uniform(0.5, 1.5, WIDE), rng.normal(size=WIDE)
    weight = rng.normal(0.3, 1, (4, 7, 5, WIDE))
    given = [tf.constant(v, dtype) for v in (x, kernel)] + [tf.constant(v, tf.float32) for v in (gamma, beta)]
    return given, tf.constant(weight, tf.float32)


def folded(x, kernel, gamma, beta):
    y, moments = convolved_and_normalized(x, kernel, gamma, beta, EPSILON)
    return y, *moments


def fused(x, kernel, gamma, beta):
    y = tf.nn.conv2d(x, kernel, 1, "VALID")
    return tf.raw_ops.FusedBatchNormV3(x=y, scale=gamma, offset=beta, mean=[], variance=[], epsilon=EPSILON)[:3]


def exact(x, kernel, gamma, beta):
    """In float64, by the definition."""
    x, kernel, gamma, beta = (tf.cast(v, tf.float64) for v in (x, kernel, gamma, beta))
    y = tf.einsum("nhwk,kc->nhwc", x, kernel[0, 0])
    mean, variance = tf.nn.moments(y, [0, 1, 2])
    rows = float(np.prod(y.shape[:3]))
    return (y - mean) / tf.sqrt(variance + EPSILON) * gamma + beta, mean, variance * rows / (rows - 1)


def results(form, given, weight):
    """By NAMES, in float64; the loss is not linear in y."""
    values = _results(form, given, weight)
    return {name: tf.cast(value, tf.float64).numpy() for name, value in zip(NAMES, values, strict=True)}


@tf.function(jit_compile=True, autograph=False)
def _results(form, given, weight):
    with tf.GradientTape() as tape:
        tape.watch(given)
        y, mean, variance = form(*given)
        loss = tf.reduce_sum(tf.cast(y, tf.float64) ** 2 * tf.cast(weight, tf.float64))
    return (y, mean, variance, *tape.gradient(loss, given))


def errors(got, wanted):
    """Of each tensor, relative to its largest entry."""
    return {name: np.abs(got[name] - wanted[name]).max() / np.abs(wanted[name]).max() for name in NAMES}


@pytest.mark.parametrize(("offset", "limit"), [(0.5, 2e-6), (5.0, 5e-5)], ids=["centred", "far from zero"])
def test_float32_is_exact_to_rounding_as_the_fused_form_is(offset, limit):
    """Both take the variance from a sum of squares, so that they lose digits where the mean is large."""
    given, weight = arguments(tf.float32, offset)
    wanted = results(exact, given, weight)
    for form in (folded, fused):
        off = errors(results(form, given, weight), wanted)
        assert max(off.values()) < limit, (form, off)


def test_pairs_of_columns_are_normalised_as_columns_are():
    """[n, H, W, K] as [n, H, W / 2, 2 K], with a kernel of pairs; results come back as columns."""
    given, weight = arguments(tf.float32)
    x, *rest = given
    x, weight = x[:, :, :4], weight[:, :, :4]

    def paired(x, kernel, gamma, beta):
        pairs = tf.reshape(x, [4, 7, 2, 2 * NARROW])
        y, moments = convolved_and_normalized(pairs, kernel_of_pairs(kernel), gamma, beta, EPSILON)
        return tf.reshape(y, [4, 7, 4, WIDE]), *moments

    wanted = results(exact, [x, *rest], weight)
    off = errors(results(paired, [x, *rest], weight), wanted)
    assert max(off.values()) < 2e-6, off


# Far from zero gradients are what is left of larger terms, each of which the XLA of TensorFlow 2.21 may round.
@pytest.mark.parametrize(
    ("offset", "limit"),
    [(0.5, 2.0**-7), (5.0, 2.0**-6 if lines.NEWER else 2.0**-7)],
    ids=["centred", "far from zero"],
)
def test_bfloat16_rounds_what_goes_in_and_out_and_not_the_statistics(offset, limit):
    given, weight = arguments(tf.bfloat16, offset)
    off = errors(results(folded, given, weight), results(exact, given, weight))
    assert max(off["mean"], off["variance"]) < 1e-5, off
    assert max(off.values()) < limit, off


def test_a_channel_that_is_constant_becomes_beta():
    (x, kernel, gamma, beta), _ = arguments(tf.float32)
    y, _, variance = folded(x, tf.zeros_like(kernel), gamma, beta)
    np.testing.assert_array_equal(y, np.broadcast_to(beta, y.shape))
    np.testing.assert_array_equal(variance, 0)


# Where it is used.


def operations(replica, layers, filters=WIDE, norm=FusedBatchNormalization):
    """Kinds of operations of a training call that pass the convolution by, and the call's result."""
    image = keras.Input((7, 5, NARROW))
    conv = keras.layers.Conv2D(filters, use_bias=False, **layers)
    model = keras.Model(image, norm()(conv(image)))
    (x, *_), _ = arguments(tf.float32)

    @tf.function(autograph=False)
    def call(x):
        variables = [[v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)]
        with entered(replica):
            return model.stateless_call(*variables, x, training=True)

    y, stats = call(x)
    with entered(SingleReplica()):
        expected, expected_stats = model.stateless_call(
            model.trainable_variables, model.non_trainable_variables, x, training=True
        )
    for got, wanted in zip([y, *stats], [expected, *expected_stats], strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    return {op.type for op in call.get_concrete_function(x).graph.get_operations()}


ON_A_TPU = LoweredReplica(2, tf.zeros([], tf.int32))


def test_on_a_tpu_it_takes_the_place_of_the_fused_form_behind_a_pointwise_convolution_that_widens():
    assert "FusedBatchNormV3" not in operations(ON_A_TPU, {"kernel_size": 1})


@pytest.mark.parametrize(
    ("replica", "layers", "more"),
    [
        (SingleReplica(), {"kernel_size": 1}, {}),
        (ON_A_TPU, {"kernel_size": 3}, {}),
        (ON_A_TPU, {"kernel_size": 3, "padding": "same"}, {}),
        (ON_A_TPU, {"kernel_size": 1, "strides": 2}, {}),
        (ON_A_TPU, {"kernel_size": 1}, {"filters": 2 * NARROW}),
        (ON_A_TPU, {"kernel_size": 1, "groups": 2}, {}),
        (ON_A_TPU, {"kernel_size": 1, "activation": "relu"}, {}),
        (ON_A_TPU, {"kernel_size": 1}, {"norm": lambda: SplitBatchNormalization(2)}),
    ],
    ids=["CPU", "3x3", "3x3 same", "strided", "hardly wider", "grouped", "activated", "split"],
)
def test_elsewhere_the_fused_form_stays(replica, layers, more):
    assert "FusedBatchNormV3" in operations(replica, layers, **more)
