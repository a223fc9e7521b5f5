"""Encoders f_q and f_k for MoCo: ResNets in torchvision's shape, or any Keras 3 model, with MoCo's head.

ResNets are v1.5: the stride is in the 3x3 convolution. Their layer names are torchvision's (`layer1.0.conv1`), so that
weights map one to one. Convolutions have no bias and pad symmetrically, batch normalisation has eps 1e-5 and momentum
0.9 in Keras's sense (0.1 in PyTorch's).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import keras
import numpy as np

from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.column_pairs import Convolution, StemConvolution, StemPooling
from trainer_module.config import EncoderConfig, Head, Precision, Stem
from trainer_module.keras_models import keras_features

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BOTTLENECK = ("resnet50", "resnet101")
EXPANSION = 4  # of a bottleneck block


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One architecture that both f_q and f_k use; the weights are passed in at every call.

    Attributes:
        model: image -> embedding of size dim, not normalised; the network that the loss trains.
        backbone: image -> pooled features; the part that is evaluated and exported.
    """

    model: keras.Model
    backbone: keras.Model


def build_encoder(
    config: EncoderConfig,
    size: int,
    precision: Precision,
    seed: int,
    batch_norm: Callable[..., keras.Layer] = FusedBatchNormalization,
) -> Encoder:
    """Builds the architecture with its initial weights.

    Args:
        config: the architecture.
        size: side of the input image in pixels.
        precision: type of the activations.
        seed: of the initial weights; the same seed gives the same weights.
        batch_norm: makes a batch normalisation layer, given `name` and `dtype`, and for a Keras model its `momentum`
            and `epsilon`.

    Returns:
        The encoder; its input is float32[N, size, size, 3], normalised, its outputs are float32.

    Raises:
        UserError: config.name is the dotted name of what cannot be an encoder of such images.
    """
    layers = _Layers("mixed_bfloat16" if precision is Precision.bfloat16 else "float32", seed, batch_norm)
    if config.name in BLOCKS:
        image = keras.Input((size, size, 3), name="image")
        features = _resnet(layers, image, config)
    else:
        image, features = keras_features(config.name, size, layers.dtype, layers.seeds, batch_norm)
    features = _pool(features)
    return Encoder(
        model=keras.Model(image, _head(layers, features, config), name="encoder"),
        backbone=keras.Model(image, features, name="backbone"),
    )


class _Layers:
    """Makes layers of one precision, each with its own seed."""

    def __init__(self, dtype: str, seed: int, batch_norm: Callable[..., keras.Layer]) -> None:
        self.dtype, self.batch_norm = dtype, batch_norm
        self.seeds: Iterator[int] = (
            int(np.random.SeedSequence((seed, i)).generate_state(1)[0] >> 1) for i in itertools.count()
        )

    def conv(
        self,
        x: keras.KerasTensor,
        filters: int,
        kernel: int,
        stride: int,
        name: str,
        layer: type[Convolution] = Convolution,
    ) -> keras.KerasTensor:
        if stride > 1 and kernel > 1:
            # "same" would pad a strided convolution at the end first; torchvision pads both sides alike.
            x = keras.layers.ZeroPadding2D(_padding(x, kernel, stride), name=name + ".pad", dtype=self.dtype)(x)
        return layer(
            filters,
            kernel,
            strides=stride,
            padding="same" if stride == 1 else "valid",
            use_bias=False,
            name=name,
            dtype=self.dtype,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal", seed=next(self.seeds)
            ),
        )(x)

    def norm(self, x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return self.batch_norm(name=name, dtype=self.dtype)(x)

    def relu(self, x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return keras.layers.ReLU(name=name, dtype=self.dtype)(x)

    def dense(self, x: keras.KerasTensor, units: int, name: str, dtype: str | None = None) -> keras.KerasTensor:
        bound = 1.0 / np.sqrt(x.shape[-1])  # PyTorch's default for a linear layer, weight and bias

        def uniform() -> keras.initializers.Initializer:
            return keras.initializers.RandomUniform(-bound, bound, seed=next(self.seeds))

        return keras.layers.Dense(
            units, name=name, dtype=dtype or self.dtype, kernel_initializer=uniform(), bias_initializer=uniform()
        )(x)


def _resnet(layers: _Layers, image: keras.KerasTensor, config: EncoderConfig) -> keras.KerasTensor:
    x = _stem(layers, image, config)
    block: Callable[..., keras.KerasTensor] = _bottleneck if config.name in BOTTLENECK else _basic
    for stage, blocks in enumerate(BLOCKS[config.name]):
        for index in range(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            x = block(layers, x, config.width * 2**stage, stride, f"layer{stage + 1}.{index}")
    return x


def _stem(layers: _Layers, image: keras.KerasTensor, config: EncoderConfig) -> keras.KerasTensor:
    if config.stem is not Stem.imagenet:
        x = layers.conv(image, config.width, 3, 1, "conv1", StemConvolution)
        return layers.relu(layers.norm(x, "bn1"), "relu")
    x = layers.conv(image, config.width, 7, 2, "conv1", StemConvolution)
    x = layers.relu(layers.norm(x, "bn1"), "relu")
    # Zeros are safe padding for the maximum, since the activations are not negative.
    return StemPooling(*_padding(x, 3, 2)[0], name="maxpool", dtype=layers.dtype)(x)


def _padding(x: keras.KerasTensor, kernel: int, stride: int) -> tuple[tuple[int, int], ...]:
    """Zeros before and after rows and columns: as kernel // 2 on all sides, but for those that no window reaches."""
    half = kernel // 2

    def after(size: int) -> int:
        windows = (size + 2 * half - kernel) // stride + 1
        return max((windows - 1) * stride + kernel - half - size, 0)

    return tuple((half, after(size)) for size in x.shape[1:3])


def _basic(layers: _Layers, x: keras.KerasTensor, filters: int, stride: int, name: str) -> keras.KerasTensor:
    y = layers.conv(x, filters, 3, stride, name + ".conv1")
    y = layers.relu(layers.norm(y, name + ".bn1"), name + ".relu1")
    y = layers.norm(layers.conv(y, filters, 3, 1, name + ".conv2"), name + ".bn2")
    return _join(layers, _shortcut(layers, x, filters, stride, name), y, name)


def _bottleneck(layers: _Layers, x: keras.KerasTensor, filters: int, stride: int, name: str) -> keras.KerasTensor:
    y = layers.relu(layers.norm(layers.conv(x, filters, 1, 1, name + ".conv1"), name + ".bn1"), name + ".relu1")
    y = layers.relu(layers.norm(layers.conv(y, filters, 3, stride, name + ".conv2"), name + ".bn2"), name + ".relu2")
    y = layers.norm(layers.conv(y, filters * EXPANSION, 1, 1, name + ".conv3"), name + ".bn3")
    return _join(layers, _shortcut(layers, x, filters * EXPANSION, stride, name), y, name)


def _shortcut(layers: _Layers, x: keras.KerasTensor, filters: int, stride: int, name: str) -> keras.KerasTensor:
    if stride == 1 and x.shape[-1] == filters:
        return x
    return layers.norm(layers.conv(x, filters, 1, stride, name + ".downsample.0"), name + ".downsample.1")


def _join(layers: _Layers, shortcut: keras.KerasTensor, y: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.relu(keras.layers.Add(name=name + ".add", dtype=layers.dtype)([shortcut, y]), name + ".relu")


def _pool(features: keras.KerasTensor) -> keras.KerasTensor:
    if len(features.shape) == 2:  # the model pools by itself
        return keras.layers.Identity(name="avgpool", dtype="float32")(features)
    return keras.layers.GlobalAveragePooling2D(name="avgpool", dtype="float32")(features)


def _head(layers: _Layers, features: keras.KerasTensor, config: EncoderConfig) -> keras.KerasTensor:
    if config.head is Head.v2:
        features = layers.relu(layers.dense(features, features.shape[-1], "fc.0"), "fc.1")
    return layers.dense(features, config.dim, "fc.2" if config.head is Head.v2 else "fc", dtype="float32")
