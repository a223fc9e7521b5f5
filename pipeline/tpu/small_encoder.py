"""Small residual encoders that compile in seconds: what budgets and the proof of the lowered step are made with."""

import keras

from trainer_module.column_pairs import Convolution, StemConvolution, StemPooling


def two_convolutions(input_shape: tuple[int, int, int]) -> keras.Model:
    """conv3x3 / 2 -> BN -> ReLU -> residual (conv3x3 -> BN) -> ReLU: [N, H, W, 3] -> [N, H / 2, W / 2, 6]."""
    image = keras.Input(input_shape)
    x = keras.layers.Conv2D(6, 3, strides=2, use_bias=False)(keras.layers.ZeroPadding2D(1)(image))
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))
    y = keras.layers.Conv2D(6, 3, padding="same", use_bias=False)(x)
    y = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(y)
    return keras.Model(image, keras.layers.ReLU()(keras.layers.Add()([x, y])))


def bottleneck(input_shape: tuple[int, int, int]) -> keras.Model:
    """conv3x3 / 2 -> BN -> ReLU, then a ResNet's first bottleneck block: [N, H, W, 3] -> [N, H / 2, W / 2, 16]."""

    def conv_norm(x: keras.KerasTensor, filters: int, kernel: int) -> keras.KerasTensor:
        x = keras.layers.Conv2D(filters, kernel, padding="same", use_bias=False)(x)
        return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    def relu(x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.layers.ReLU()(x)

    image = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False)(keras.layers.ZeroPadding2D(1)(image))
    x = relu(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))
    y = conv_norm(relu(conv_norm(relu(conv_norm(x, 4, 1)), 4, 3)), 16, 1)
    return keras.Model(image, relu(keras.layers.Add()([conv_norm(x, 16, 1), y])))


def stem(input_shape: tuple[int, int, int]) -> keras.Model:
    """A ResNet's stem, a bottleneck block without its sum, conv3x3 / 2: [N, H, W, 3] -> [N, H / 8, W / 8, 8]."""

    def norm_relu(x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))

    def conv_norm_relu(x: keras.KerasTensor, filters: int, kernel: int) -> keras.KerasTensor:
        return norm_relu(Convolution(filters, kernel, padding="same", use_bias=False)(x))

    image = keras.Input(input_shape)
    x = StemConvolution(4, 7, strides=2, use_bias=False)(keras.layers.ZeroPadding2D(((3, 2), (3, 2)))(image))
    x = StemPooling(1, 0)(norm_relu(x))
    x = conv_norm_relu(conv_norm_relu(conv_norm_relu(x, 4, 1), 4, 3), 16, 1)
    x = Convolution(8, 3, strides=2, use_bias=False)(keras.layers.ZeroPadding2D(((1, 0), (1, 0)))(x))
    return keras.Model(image, norm_relu(x))
