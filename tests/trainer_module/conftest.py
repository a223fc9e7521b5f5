"""A small encoder with batch normalisation, so that tests of the step trace in a second."""

import keras
import pytest

from trainer_module.batch_norm import FusedBatchNormalization


@pytest.fixture(scope="session")
def tiny_encoder():
    """uint8-sized images of any side -> 16 numbers; one convolution, one batch normalisation, one dense layer."""
    image = keras.Input((None, None, 3))
    init = keras.initializers.RandomNormal(stddev=0.2, seed=3)
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False, kernel_initializer=init)(image)
    x = keras.layers.ReLU()(FusedBatchNormalization()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(16, kernel_initializer=keras.initializers.HeNormal(seed=4))(x))
