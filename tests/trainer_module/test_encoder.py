"""The encoders: torchvision's shapes, the fused batch normalisation, seeds."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from torch_reference import layout

from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.config import EncoderConfig, Head, Precision, Stem
from trainer_module.encoder import build_encoder
from trainer_module.torch_weights import torch_tensors


@pytest.mark.parametrize("name", layout.PARAMETERS)
def test_backbone_has_torchvisions_tensors_by_name_and_shape(name):
    with keras.StatelessScope(initialize_variables=False):  # whose variables have shapes and never get values
        backbone = build_encoder(EncoderConfig(name), 64, Precision.float32, 0).backbone
    ours = torch_tensors((v.path, np.empty(v.shape, np.uint8)) for v in backbone.variables)
    assert {path: tensor.shape for path, tensor in ours.items()} == layout.shapes(name)
    assert sum(int(np.prod(v.shape)) for v in backbone.trainable_variables) == layout.PARAMETERS[name]
    assert backbone.output_shape == (None, 2048 if name in ("resnet50", "resnet101") else 512)


@pytest.mark.parametrize(("head", "layers"), [(Head.v1, ["fc"]), (Head.v2, ["fc.0", "fc.1", "fc.2"])])
def test_head_is_the_papers(head, layers):
    encoder = build_encoder(EncoderConfig("resnet18", width=4, head=head), 32, Precision.float32, 0)
    assert [layer.name for layer in encoder.model.layers][-len(layers) :] == layers
    assert encoder.model.output_shape == (None, 128)


def test_imagenet_stem_divides_the_side_by_32_and_the_cifar_stem_by_8():
    for stem, side in ((Stem.imagenet, 2), (Stem.cifar, 8)):
        encoder = build_encoder(EncoderConfig("resnet18", stem, width=4), 64, Precision.float32, 0)
        assert encoder.backbone.get_layer("layer4.1.relu").output.shape[1] == side


def test_same_seed_gives_same_weights_and_no_two_layers_share_theirs():
    first, again, other = (
        build_encoder(EncoderConfig("resnet18", width=4), 32, Precision.float32, s) for s in (1, 1, 2)
    )
    for a, b in zip(first.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(first.model.get_weights()[0] != other.model.get_weights()[0])
    same_shape = [first.model.get_layer(f"layer1.{i}.conv1").get_weights()[0] for i in (0, 1)]
    assert np.any(same_shape[0] != same_shape[1])


def test_fused_batch_normalisation_equals_keras_own_in_training_and_inference():
    x = np.random.default_rng(0).normal(3, 2, (8, 5, 5, 6)).astype("float32")
    fused, reference = FusedBatchNormalization(), keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
    np.testing.assert_allclose(fused(x, training=True), reference(x, training=True), atol=1e-5)
    np.testing.assert_allclose(fused.moving_mean, reference.moving_mean, rtol=1e-5)
    n = x.size / 6
    # PyTorch's running variance takes the unbiased estimate, Keras's the biased one.
    batch = (np.asarray(reference.moving_variance) - 0.9) * n / (n - 1) + 0.9
    np.testing.assert_allclose(fused.moving_variance, batch, rtol=1e-5)
    fused.moving_variance.assign(np.asarray(reference.moving_variance))
    np.testing.assert_allclose(fused(x), reference(x, training=False), atol=1e-5)


def test_fused_batch_normalisation_has_keras_gradients():
    x = tf.constant(np.random.default_rng(1).normal(1, 2, (4, 3, 3, 2)).astype("float32"))
    weight = tf.constant(np.random.default_rng(2).normal(size=(4, 3, 3, 2)).astype("float32"))
    gradients = []
    for layer in (FusedBatchNormalization(), keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) * weight)
        gradients.append(tape.gradient(loss, [x, layer.gamma.value, layer.beta.value]))
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_bfloat16_keeps_statistics_and_outputs_in_float32():
    encoder = build_encoder(EncoderConfig("resnet18", width=4), 32, Precision.bfloat16, 0)
    stats = [tf.convert_to_tensor(v.value) for v in encoder.model.non_trainable_variables]
    parameters = [v.value for v in encoder.model.trainable_variables]
    out, new = encoder.model.stateless_call(parameters, stats, tf.ones([2, 32, 32, 3]), training=True)
    assert out.dtype == tf.float32
    assert {v.dtype for v in encoder.model.variables} == {"float32"}
    assert {s.dtype for s in new} == {tf.float32}
